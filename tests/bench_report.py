"""A benchmark's page in docs/: what it prints, as Markdown."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from skipcat_edge.device import load_device
from skipcat_edge.runtime.pin import read_pin
from skipcat_edge.terminal import as_markdown, stdout_console


class Report:
    """Texts and tables, printed as they come, and kept."""

    def __init__(self, title: str, command: str) -> None:
        self._parts = [f"# {title}", f"Made by `{command}`."]

    def heading(self, text: str) -> None:
        self._parts.append(f"## {text}")

    def text(self, text: str) -> None:
        click.echo(text)
        self._parts.append(text)

    def table(self, table: Table) -> None:
        stdout_console().print(table)
        click.echo()
        self._parts.append(as_markdown(table))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(self._parts) + "\n", encoding="utf-8")
        click.echo(f"Wrote {path}.")


def machine() -> str:
    """What this runs on, and which runtime: a sentence."""
    host = load_device("host")
    cores = ", ".join(f"{cores.count} {cores.kind} ({' '.join(cores.features)})" for cores in host.cores)
    return f"Measured on {cores} with {read_pin().wheel_version}."
