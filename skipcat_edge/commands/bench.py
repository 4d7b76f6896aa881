"""`skipcat-edge bench`: measure speed, load time and memory."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.commands.level_options import progressive_option, rank_level_option
from skipcat_edge.commands.rpc_option import rpc_option
from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from skipcat_edge.bench_rows import Row, Setting
    from skipcat_edge.benchmark import Result
    from skipcat_edge.device import Device
    from skipcat_edge.levels import Schedule


def _thread_counts(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
    """Numbers separated by commas; an empty list for `auto`."""
    if value is None or value == "auto":
        return None if value is None else []
    parts = value.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is neither auto nor numbers from 1 on, separated by commas.")
    return list(dict.fromkeys(map(int, parts)))


@click.command(short_help="Measure prompt and decode speed, load time and memory.",
               epilog=example("bench dense.gguf skipcat.gguf --threads auto"))
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(min=1),
              help="Tokens of the prompt, one batch.")
@click.option("--gen-tokens", default=64, show_default=True, type=click.IntRange(min=1),
              help="Tokens decoded one by one.")
@click.option("--threads", callback=_thread_counts, metavar="N[,N...]|auto",
              help="Several are compared; `auto` tries numbers up to that of the cores.  [default: one for "
                   "each physical core; with --device, what suits it]")
@rank_level_option("all", say="`all` measures every level of each file in turn.")
@progressive_option
@rpc_option
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--bandwidth/--no-bandwidth", default=True, show_default=True,
              help="Also measure how fast the threads read memory, which takes a few seconds.")
@click.option("--output", type=click.Choice(("md", "csv", "json", "jsonl")),
              help="Print this instead of a table; json, jsonl and csv hold all figures, versions and flags.")
@click.option("--json", "as_json", is_flag=True, help="The same as --output json.")
@click.option("--against", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Compare with what an earlier --output json or jsonl wrote.")
@click.option("--device", help="The preset of what is measured, for its threads and their CPUs "
                               "(`skipcat-edge devices` lists them).")
@click.option("--adb", is_flag=True, help="Measure on the phone that adb sees, with the tools of "
                                          "`skipcat-edge runtime phone`.")
@click.option("--serial", help="With --adb: which phone, of those that `adb devices` lists.")
@click.option("--phone-tools", type=click.Path(file_okay=False, path_type=Path),
              help="With --adb: the folder with llama-bench.  [default: build/phone/DEVICE]")
def command(files: tuple[str, ...], prompt_tokens: int, gen_tokens: int, threads: list[int] | None,
            rank_level: float | Literal["all"] | None, progressive: Schedule | None, repetitions: int,
            rpc: tuple[str, ...], bandwidth: bool, output: str | None, as_json: bool, against: Path | None,
            device: str | None, adb: bool, serial: str | None, phone_tools: Path | None) -> None:
    """Measure FILEs side by side: tokens per second, time to first token, load time and memory.

    Each file has a fresh process; they take turns, so that several files share the machine's
    good and bad moments. Speeds are medians with the slowest and the fastest repetition, and
    "x" is the speed over that of the first line. GB/s is what decoding reads.

    With --adb all this happens on a phone. It keeps the files, in /data/local/tmp/skipcat-edge, and
    tells neither load time nor memory, but its temperature.
    """
    from skipcat_edge.bench_rows import read_rows
    from skipcat_edge.terminal import new_progress

    if progressive is not None and rank_level is not None:
        raise UserError("--progressive sets the level of every token; leave out --rank-level.")
    earlier = None if against is None else read_rows(against)
    if adb:
        if rank_level is not None or progressive is not None:
            raise UserError("llama-bench, which measures on phones, knows only the full level; leave out "
                            "--rank-level and --progressive.")
        if rpc:
            raise UserError("A phone computes by itself; leave out --rpc or --adb.")
        measure, steps, setting = _on_phone(device, threads, serial, phone_tools)
    elif serial or phone_tools:
        raise UserError("--serial and --phone-tools are about a phone; add --adb.")
    else:
        measure, steps, setting = _here(device, threads, bandwidth, rank_level, progressive, rpc)

    with new_progress() as progress:
        task = progress.add_task("loading", total=steps(files, repetitions))
        started = False

        def advance(file: str) -> None:
            nonlocal started
            progress.update(task, description=Path(file).name, advance=1 if started else 0)
            started = True

        results = measure(files, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, repetitions=repetitions,
                          advance=advance)
    _print(results, setting(), "json" if as_json else output, earlier)


_Plan = tuple["Callable[..., list[Result]]", "Callable[[Sequence[str], int], int]", "Callable[[], Setting]"]
"""What measures, in how many steps, and what then tells the setting."""


def _here(name: str | None, threads: list[int] | None, bandwidth: bool,
          rank_level: float | Literal["all"] | None, progressive: Schedule | None,
          rpc: tuple[str, ...]) -> _Plan:
    from skipcat_edge.bandwidth import affordable_bandwidth
    from skipcat_edge.bench_rows import this_machine
    from skipcat_edge.benchmark import bench, bench_levels, steps, sweep
    from skipcat_edge.cores import usable_cores
    from skipcat_edge.device import load_device
    from skipcat_edge.session import default_threads

    default = default_threads()
    if name is not None:
        default = _pin(load_device(name), default)
    counts = [default] if threads is None else threads or sweep(usable_cores())
    measure = partial(bench, threads=counts, bandwidth=affordable_bandwidth if bandwidth else None,
                      rank_level=rank_level, progressive=progressive, servers=rpc)

    def all_steps(files: Sequence[str], repetitions: int) -> int:
        measured = sum(len(bench_levels(Path(file), rank_level, progressive)) for file in files)
        return steps(measured, len(counts), repetitions)

    return measure, all_steps, lambda: this_machine(name or "host")


def _pin(device: Device, default: int) -> int:
    """Keep this process and its children on the CPUs that suit `device`; how many threads do."""
    if device.threads is None:
        return default
    cpus = set(device.threads.affinity)
    if hasattr(os, "sched_setaffinity"):
        if missing := cpus - os.sched_getaffinity(0):
            raise UserError(f"{device.name} runs its threads on CPU {min(missing)}, which this machine does "
                            "not have; name the preset of this machine, or none.")
        os.sched_setaffinity(0, cpus)
    return device.threads.recommended


def _on_phone(name: str | None, threads: list[int] | None, serial: str | None, tools: Path | None) -> _Plan:
    from skipcat_edge.adb import bench_adb, phone_device, threads_and_cpus, tools_folder
    from skipcat_edge.bench_rows import a_phone

    if threads is not None and len(threads) != 1:
        raise UserError("With --adb, --threads is one number.")
    count = None if threads is None else threads[0]
    cpus: tuple[int, ...] = ()
    if name is not None:
        device = phone_device(name)
        count, cpus = threads_and_cpus(device, count)
        tools = tools or tools_folder(device)
    if count is None or tools is None:
        raise UserError("Which phone is it? Give --device, or both --threads and --phone-tools.")
    measure = partial(bench_adb, threads=count, cpus=cpus, tools=tools, device=name or "...", serial=serial)
    return (measure, lambda files, repetitions: len(files) * (repetitions + 1),
            lambda: a_phone(name or "unknown"))


def _print(results: Sequence[Result], setting: Setting, output: str | None,
           earlier: Sequence[Row] | None) -> None:
    from rich.markup import escape

    from skipcat_edge import bench_print, bench_rows
    from skipcat_edge.terminal import as_markdown, stdout_console

    rows = bench_rows.rows_of(results, setting)
    formats = {"csv": bench_rows.as_csv, "json": bench_rows.as_json, "jsonl": bench_rows.as_json_lines}
    if output in formats:
        click.echo(formats[output](rows))
        return
    tables = [bench_print.table_of(results)]
    lines = list(bench_print.sentences(results))
    if output == "md":
        lines.append(f"skipcat-edge {rows[0]['skipcat_edge']}, llama-cpp-python {setting.llama_cpp}, "
                     f"{setting.device}: {setting.cpu}")
    changes = None if earlier is None else bench_print.change_table(bench_rows.changes(rows, earlier))
    console = stdout_console()
    for table in tables if changes is None else [*tables, changes]:
        if output == "md":
            click.echo(as_markdown(table))
        else:
            console.print(table)
        click.echo()
    for line in lines:
        console.print(escape(line))
