"""`skipcat-edge bench`: measure speed, load time and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from skipcat_edge.bench import Result, Spread


@click.command(short_help="Measure prompt and decode speed, load time and memory.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(min=1),
              help="Tokens of the prompt, one batch.")
@click.option("--gen-tokens", default=64, show_default=True, type=click.IntRange(min=1),
              help="Tokens decoded one by one.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="Print a list with one object per file.")
def command(files: tuple[str, ...], prompt_tokens: int, gen_tokens: int, threads: int | None,
            repetitions: int, as_json: bool) -> None:
    """Measure FILEs side by side: tokens per second, load time and peak memory.

    Each file has a fresh process; they take turns, so that several files share the machine's
    good and bad moments. Speeds are medians with the slowest and the fastest repetition, and
    "x" is the speed over that of the first file.
    """
    from skipcat_edge.bench import bench
    from skipcat_edge.session import default_threads
    from skipcat_edge.terminal import new_progress

    with new_progress() as progress:
        task = progress.add_task("loading", total=(repetitions + 1) * len(files))
        started = False

        def advance(file: str) -> None:
            nonlocal started
            progress.update(task, description=Path(file).name, advance=1 if started else 0)
            started = True

        results = bench(files, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, repetitions=repetitions,
                        threads=threads or default_threads(), advance=advance)
    if as_json:
        click.echo(json.dumps([result.to_json() for result in results], indent=2))
    else:
        _print(results, prompt_tokens, gen_tokens)


def _print(results: list[Result], prompt_tokens: int, gen_tokens: int) -> None:
    from rich.markup import escape

    from skipcat_edge.terminal import decimal_bytes, new_table, stdout_console

    table = new_table("file", "size", "load", "peak memory", "prompt tokens/s", "x", "decode tokens/s", "x")
    first = results[0]
    for result in results:
        table.add_row(
            escape(Path(result.file).name), decimal_bytes(Path(result.file).stat().st_size),
            f"{result.load_s:.2f} s", decimal_bytes(result.peak_rss_bytes),
            _speed(result.prompt_tps), _ratio(result.prompt_tps, first.prompt_tps),
            _speed(result.decode_tps), _ratio(result.decode_tps, first.decode_tps),
        )
    console = stdout_console()
    console.print(table)
    console.print()
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    console.print(f"{threads}; prompt of {prompt_tokens} tokens, {gen_tokens} tokens decoded")
    for result in results:
        if result.decode_tps is None:
            console.print(escape(f"{result.file} has no decoder: only its prompt speed is measured."))


def _speed(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    digits = 0 if spread.max >= 1000 else 1 if spread.max >= 10 else 2
    return f"{spread.median:.{digits}f} ({spread.min:.{digits}f}-{spread.max:.{digits}f})"


def _ratio(spread: Spread | None, first: Spread | None) -> str:
    return "-" if spread is None or first is None else f"{spread.median / first.median:.2f}"
