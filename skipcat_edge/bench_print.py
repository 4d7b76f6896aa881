"""Results of `bench` for people: a table and a few sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skipcat_edge.bench_rows import Change, Row
from skipcat_edge.benchmark import Result, Spread
from skipcat_edge.terminal import decimal_bytes, new_table, ranges

if TYPE_CHECKING:
    from rich.table import Table

_STEADY = 0.9  # of the first repetition's speed: less is reported


def table_of(results: Sequence[Result]) -> Table:
    """A line for each result; "x" is the speed over the first one's."""
    from rich.markup import escape

    several = len({result.threads for result in results}) > 1
    leveled = any(map(_level, results))
    table = new_table("file", *(["level"] if leveled else []), *(["threads"] if several else []),
                      "size", "load", "peak memory", "allocated", "prompt tokens/s", "x", "first token",
                      "decode tokens/s", "x", "GB/s")
    first = results[0]
    for result in results:
        table.add_row(
            escape(Path(result.file).name), *([_level(result) or "-"] if leveled else []),
            *([str(result.threads)] if several else []), decimal_bytes(result.file_bytes),
            "-" if result.load_s is None else f"{result.load_s:.2f} s",
            "-" if result.peak_rss_bytes is None else decimal_bytes(result.peak_rss_bytes),
            "-" if result.allocated_bytes is None else decimal_bytes(result.allocated_bytes),
            _speed(result.prompt_tps), _ratio(result.prompt_tps, first.prompt_tps),
            _seconds(result.first_token_s.median),
            _speed(result.decode_tps), _ratio(result.decode_tps, first.decode_tps),
            "-" if result.achieved_bandwidth is None else f"{result.achieved_bandwidth / 1e9:.1f}",
        )
    return table


def sentences(results: Sequence[Result]) -> Iterator[str]:
    """What is to be known of the measurement besides its figures."""
    first = results[0]
    counts = list(dict.fromkeys(result.threads for result in results))
    threads = "1 thread" if counts == [1] else f"{', '.join(map(str, counts))} threads"
    if cpus := first.conditions.cpus:
        threads += f" on CPU {cpus[0]}" if len(cpus) == 1 else f" on CPUs {ranges(cpus)}"
    yield f"{threads}; prompt of {first.prompt_tokens} tokens, {first.gen_tokens} tokens decoded"
    yield from _fastest(results)
    yield from _bandwidth(results)
    conditions = first.conditions
    if conditions.celsius_before is not None or conditions.celsius_after is not None:
        yield (f"CPU temperature: {_celsius(conditions.celsius_before)} before, "
               f"{_celsius(conditions.celsius_after)} after")
    if conditions.governor not in (None, "performance"):
        yield f"The CPUs' governor is {conditions.governor}: clocks may change while it measures."
    if conditions.throttled:
        yield f"The machine slowed itself down ({', '.join(conditions.throttled)}): the figures are too low."
    for result in results:
        if result.decode_tps is None:
            yield f"{_named(result)} has no decoder: only its prompt speed is measured."
        if result.steadiness < _STEADY:
            yield (f"{_named(result)}: {1 - result.steadiness:.0%} slower in the last repetition than in the "
                   "first; the machine may throttle or be busy.")


def _fastest(results: Sequence[Result]) -> Iterator[str]:
    """Which number of threads suits each file, of several."""
    for file in dict.fromkeys(map(_named, results)):
        own = [result for result in results if _named(result) == file]
        if len({result.threads for result in own}) < 2:
            continue
        best = max(own, key=lambda result: result.prompt_tps.median).threads
        line = f"{file} is fastest with {_threads(best)}"
        decodes = {result.threads: result.decode_tps.median for result in own if result.decode_tps}
        if decodes:
            decode = max(decodes, key=lambda threads: decodes[threads])
            line += "." if decode == best else f" in the prompt, and with {_threads(decode)} in decoding."
        yield line if line.endswith(".") else line + "."


def _bandwidth(results: Sequence[Result]) -> Iterator[str]:
    """How near decoding comes to what memory gives."""
    told = [result for result in results if result.read_bandwidth and result.achieved_bandwidth]
    for threads in dict.fromkeys(result.threads for result in told):
        of_these = [result for result in told if result.threads == threads]
        bandwidth = of_these[0].read_bandwidth or 0.0
        shares = ", ".join(f"{(result.achieved_bandwidth or 0) / bandwidth:.0%}" for result in of_these)
        verb = "reads" if threads == 1 else "read"
        yield (f"{_threads(threads)} {verb} {bandwidth / 1e9:.1f} GB/s from memory; decoding reaches "
               f"{shares} of that.")


def change_table(changes: Sequence[Change]) -> Table:
    """Speeds over those of an earlier run."""
    from rich.markup import escape

    leveled = any(_row_level(change.row) != "-" for change in changes)
    table = new_table("file", *(["level"] if leveled else []), "threads", "prompt x", "decode x",
                      "not as it was")
    for change in changes:
        known = change.prompt is not None or change.decode is not None
        table.add_row(
            escape(Path(change.row["file"]).name), *([_row_level(change.row)] if leveled else []),
            str(change.row["threads"]),
            "-" if change.prompt is None else f"{change.prompt:.2f}",
            "-" if change.decode is None else f"{change.decode:.2f}",
            escape("; ".join(change.differences)) if known else "not measured then",
        )
    return table


def _level(result: Result) -> str:
    if result.progressive is not None:
        return result.progressive
    return "" if result.rank_level is None else f"{result.rank_level:g}"


def _row_level(row: Row) -> str:
    level = row["rank_level"]
    return str(row["progressive"] or ("-" if level is None else f"{level:g}"))


def _named(result: Result) -> str:
    """The file, and the level where it has one."""
    return f"{result.file} at level {_level(result)}" if _level(result) else result.file


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _celsius(degrees: float | None) -> str:
    return "unknown" if degrees is None else f"{degrees:.1f} °C"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _speed(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    digits = 0 if spread.max >= 1000 else 1 if spread.max >= 10 else 2
    return f"{spread.median:.{digits}f} ({spread.min:.{digits}f}-{spread.max:.{digits}f})"


def _ratio(spread: Spread | None, first: Spread | None) -> str:
    return "-" if spread is None or first is None else f"{spread.median / first.median:.2f}"
