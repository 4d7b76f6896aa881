"""`skipcat-edge bench`: measure speed, load time and memory."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from skipcat_edge.bench import Result, Spread

_STEADY = 0.9  # of the first repetition's speed: less is reported


@click.command(short_help="Measure prompt and decode speed, load time and memory.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(min=1),
              help="Tokens of the prompt, one batch.")
@click.option("--gen-tokens", default=64, show_default=True, type=click.IntRange(min=1),
              help="Tokens decoded one by one.")
@click.option("--threads", type=click.IntRange(min=1),
              help="Default: one for each physical core; with --device, what suits it.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="Print a list with one object per file.")
@click.option("--adb", is_flag=True, help="Measure on the phone that adb sees, with the tools of "
                                          "`skipcat-edge runtime phone`.")
@click.option("--device", help="With --adb: the phone's name, for its threads and their CPUs "
                               "(`skipcat-edge devices` lists them).")
@click.option("--serial", help="With --adb: which phone, of those that `adb devices` lists.")
@click.option("--phone-tools", type=click.Path(file_okay=False, path_type=Path),
              help="With --adb: the folder with llama-bench.  [default: build/phone/DEVICE]")
def command(files: tuple[str, ...], prompt_tokens: int, gen_tokens: int, threads: int | None,
            repetitions: int, as_json: bool, adb: bool, device: str | None, serial: str | None,
            phone_tools: Path | None) -> None:
    """Measure FILEs side by side: tokens per second, load time and peak memory.

    Each file has a fresh process; they take turns, so that several files share the machine's
    good and bad moments. Speeds are medians with the slowest and the fastest repetition, and
    "x" is the speed over that of the first file.

    With --adb all this happens on a phone. It keeps the files, in /data/local/tmp/skipcat-edge, and
    tells neither load time nor memory, but its temperature.
    """
    from skipcat_edge.terminal import new_progress

    if adb:
        measure = _on_phone(device, threads, serial, phone_tools)
    elif device or serial or phone_tools:
        raise UserError("--device, --serial and --phone-tools are about a phone; add --adb.")
    else:
        measure = _here(threads)

    with new_progress() as progress:
        task = progress.add_task("loading", total=(repetitions + 1) * len(files))
        started = False

        def advance(file: str) -> None:
            nonlocal started
            progress.update(task, description=Path(file).name, advance=1 if started else 0)
            started = True

        results = measure(files, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, repetitions=repetitions,
                          advance=advance)
    if as_json:
        click.echo(json.dumps([result.to_json() for result in results], indent=2))
    else:
        _print(results, prompt_tokens, gen_tokens)


def _here(threads: int | None) -> Callable[..., list[Result]]:
    from skipcat_edge.bench import bench
    from skipcat_edge.session import default_threads

    return partial(bench, threads=threads or default_threads())


def _on_phone(name: str | None, threads: int | None, serial: str | None,
              tools: Path | None) -> Callable[..., list[Result]]:
    from skipcat_edge.adb import bench_adb, phone_device, threads_and_cpus, tools_folder

    cpus: tuple[int, ...] = ()
    if name is not None:
        device = phone_device(name)
        threads, cpus = threads_and_cpus(device, threads)
        tools = tools or tools_folder(device)
    if threads is None or tools is None:
        raise UserError("Which phone is it? Give --device, or both --threads and --phone-tools.")
    return partial(bench_adb, threads=threads, cpus=cpus, tools=tools, device=name or "...", serial=serial)


def _print(results: list[Result], prompt_tokens: int, gen_tokens: int) -> None:
    from rich.markup import escape

    from skipcat_edge.terminal import decimal_bytes, new_table, stdout_console

    table = new_table("file", "size", "load", "peak memory", "prompt tokens/s", "x", "decode tokens/s", "x")
    first = results[0]
    for result in results:
        table.add_row(
            escape(Path(result.file).name), decimal_bytes(Path(result.file).stat().st_size),
            "-" if result.load_s is None else f"{result.load_s:.2f} s",
            "-" if result.peak_rss_bytes is None else decimal_bytes(result.peak_rss_bytes),
            _speed(result.prompt_tps), _ratio(result.prompt_tps, first.prompt_tps),
            _speed(result.decode_tps), _ratio(result.decode_tps, first.decode_tps),
        )
    console = stdout_console()
    console.print(table)
    console.print()
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    if first.phone and first.phone.cpus:
        cpus = ", ".join(map(str, first.phone.cpus))
        threads += f" on CPU {cpus}" if len(first.phone.cpus) == 1 else f" on CPUs {cpus}"
    console.print(f"{threads}; prompt of {prompt_tokens} tokens, {gen_tokens} tokens decoded")
    for result in results:
        if result.decode_tps is None:
            console.print(escape(f"{result.file} has no decoder: only its prompt speed is measured."))
    for line in _phone_lines(results):
        console.print(escape(line))


def _phone_lines(results: list[Result]) -> Iterator[str]:
    """What is to be known of a phone's measurements, and nothing of this machine's."""
    if phone := results[0].phone:
        yield (f"CPU temperature: {_celsius(phone.celsius_before)} before, {_celsius(phone.celsius_after)} "
               "after")
    for result in results:
        if result.phone is None:
            continue
        for what, change in (("prompt", result.phone.prompt_last_to_first),
                             ("decoding", result.phone.decode_last_to_first)):
            if change is not None and change < _STEADY:
                yield (f"{result.file}: {what} got {1 - change:.0%} slower from the first repetition to the "
                       "last; the phone may throttle: let it cool down.")


def _celsius(degrees: float | None) -> str:
    return "unknown" if degrees is None else f"{degrees:.1f} °C"


def _speed(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    digits = 0 if spread.max >= 1000 else 1 if spread.max >= 10 else 2
    return f"{spread.median:.{digits}f} ({spread.min:.{digits}f}-{spread.max:.{digits}f})"


def _ratio(spread: Spread | None, first: Spread | None) -> str:
    return "-" if spread is None or first is None else f"{spread.median / first.median:.2f}"
