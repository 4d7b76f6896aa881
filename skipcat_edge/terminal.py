"""What commands print with: tables on stdout, progress with time left on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from skipcat_edge.control_characters import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text


def stdout_console() -> Console:
    """A console on stdout that neither wraps nor shortens, in a pipe or in a narrow terminal."""
    return _console(soft_wrap=True)


def _console(**options: Any) -> Console:
    """One that shows control characters in what it is given; rich passes most of them on."""
    from rich.console import Console

    class Visible(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text), **options)

    return Visible(highlight=False, width=1000, **options)


def echo_generated(text: str) -> None:
    """A part of what a model writes, to stdout: as it is into a file or a pipe, but a terminal obeys nothing
    of it."""
    import sys

    import click

    click.echo(visible(text) if sys.stdout.isatty() else text, nl=False)


def new_table(*columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are aligned left and all others right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def as_markdown(table: Table) -> str:
    """What `new_table` made, as Markdown."""
    import io

    from rich import box

    table.box, table.show_edge, table.pad_edge, table.padding = box.MARKDOWN, True, True, (0, 1)
    out = io.StringIO()
    _console(file=out).print(table)
    return "\n".join(line.strip() for line in out.getvalue().splitlines() if line.strip())


def new_progress() -> Progress:
    """A progress display on stderr, silent where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as `0-2,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def decimal_bytes(size: float) -> str:
    """`size` bytes as `1.9 MB`."""
    from rich.filesize import decimal

    return decimal(round(size))
