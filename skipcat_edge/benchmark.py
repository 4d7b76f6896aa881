"""Speed, load time and memory of several files, measured in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipcat_edge.bench_process import BenchProcess
from skipcat_edge.bench_worker import Job
from skipcat_edge.conditions import Conditions, conditions, look
from skipcat_edge.errors import UserError, require_at_least
from skipcat_edge.gguf_file import require_gguf
from skipcat_edge.levels import Schedule, file_levels, require_level
from skipcat_edge.session import default_threads
from skipcat_edge.traffic import weight_bytes_per_token


@dataclass(frozen=True)
class Spread:
    """Repetitions of one measurement."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of `values`."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Result:
    """One file's measurements with one number of threads; speeds in tokens per second."""

    file: str
    threads: int
    prompt_tokens: int
    gen_tokens: int
    repetitions: int
    prompt_tps: Spread
    decode_tps: Spread | None
    """None for a model without a decoder."""
    conditions: Conditions
    steadiness: float
    """Speed of the last repetition over that of the first, the lower one of prompt and decoding: below 1
    where the machine slows down."""
    file_bytes: int
    load_s: float | None = None
    """Seconds from nothing to ready, the page cache as it was. None for a phone, whose llama-bench does not
    tell; so are all below."""
    peak_rss_bytes: int | None = None
    """Resident memory at its highest, of a fresh process that measured only this file; Python and the library
    are about 60 MB of it."""
    buffers: dict[str, int] = field(default_factory=dict)
    """Bytes that llama.cpp allocated, by purpose and place; the mapped file is among them."""
    bytes_per_token: float | None = None
    """Weights, and on average keys and values, that decoding a token reads."""
    read_bandwidth: float | None = None
    """Bytes per second that as many threads read from this machine's memory."""
    rank_level: float | None = None
    """The level, of a file that has several."""
    progressive: str | None = None
    """Which level decoded which token, as in --progressive; the prompt's was `rank_level`."""

    @property
    def first_token_s(self) -> Spread:
        """Time to first token: seconds from a prompt of `prompt_tokens` to the logits of what follows."""
        tps = self.prompt_tps
        return Spread(*(self.prompt_tokens / speed for speed in (tps.median, tps.max, tps.min)))

    @property
    def allocated_bytes(self) -> int | None:
        """Sum of `buffers`."""
        return sum(self.buffers.values()) if self.buffers else None

    @property
    def achieved_bandwidth(self) -> float | None:
        """Bytes per second that decoding reads."""
        if self.bytes_per_token is None or self.decode_tps is None:
            return None
        return self.bytes_per_token * self.decode_tps.median

    def to_json(self) -> dict[str, Any]:
        """The fields and properties above as plain values."""
        derived = ("first_token_s", "allocated_bytes", "achieved_bandwidth")
        values = {name: getattr(self, name) for name in derived}
        return {**asdict(self), **values, "first_token_s": asdict(self.first_token_s)}


def steadiness(*speeds: Sequence[float]) -> float:
    """Of some series of speeds, the least of last over first."""
    return min(series[-1] / series[0] for series in speeds if series)


def bench(files: str | Path | Sequence[str | Path], *, prompt_tokens: int = 128, gen_tokens: int = 64,
          threads: Sequence[int] = (), repetitions: int = 5, bandwidth: Callable[[int], float] | None = None,
          rank_level: float | Literal["all"] | None = None, progressive: Schedule | None = None,
          servers: Sequence[str] = (), advance: Callable[[str], None] = lambda _: None) -> list[Result]:
    """Measure `files` with each number of `threads` (none: one for each physical core), one process each, one
    repetition of each in turn, after a warm-up of each; at `rank_level`, at each of their levels in turn for
    "all", or decoding as `progressive` says.

    Turns spread the machine's moods evenly, so that files can be compared. `advance` hears the file before
    each of the `steps` steps. Prompt: `prompt_tokens` random tokens in one batch; decode: `gen_tokens` tokens
    one by one; both from an empty cache. `bandwidth`: tells the bytes per second that a number of threads
    read from memory, and is asked before the files are loaded. `servers`: RPC servers that compute, as
    HOST:PORT; they serve one process, and so one file.

    Returns a result for each file, number of threads and level, in this order. Raises UserError if there is
    no file, one cannot be loaded or has no such level, a process fails, or a number is out of range.
    """
    names = [str(files)] if isinstance(files, str | Path) else [str(file) for file in files]
    if not names:
        raise UserError("There is no file to measure; give one or more.")
    if servers and len(names) > 1:
        raise UserError("An RPC server serves one client at a time; measure one file after another.")
    threads = threads or [default_threads()]
    require_at_least(1, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, repetitions=repetitions,
                     threads=min(threads))
    for name in names:
        require_gguf(Path(name))
    levels = {name: bench_levels(Path(name), rank_level, progressive) for name in names}
    schedule = None if progressive is None else str(progressive)
    read_bandwidths = {count: bandwidth(count) for count in threads} if bandwidth else {}
    with ExitStack() as stack:
        subjects: list[_Subject] = []
        for name in names:
            process = BenchProcess(Job(name, prompt_tokens, gen_tokens, max(threads), servers))
            stack.callback(process.stop)
            subjects.append(_Subject(name, process))
        before = look()
        for repetition in range(repetitions + 1):
            for count in threads if repetition else threads[:1]:
                for subject, level in ((each, level) for each in subjects for level in levels[each.file]):
                    advance(subject.file)
                    seconds = subject.process.measure(count, level, schedule)
                    if repetition:  # else a warm-up
                        subject.seconds.setdefault((count, level), []).append(seconds)
        around = conditions(before, look())
        return [result for subject in subjects for result in _results(
            subject, prompt_tokens, gen_tokens, around, read_bandwidths, progressive)]


def bench_levels(path: Path, rank_level: float | Literal["all"] | None,
                 progressive: Schedule | None) -> list[float | None]:
    """The levels that `path` is measured at: those that are wished for, else the full one; [None] for a file
    without levels. Raises UserError where it has no such level, and as `file_levels`."""
    known = file_levels(path)
    if progressive is not None:
        progressive.checked(path, known)
    chosen = known if rank_level == "all" else known[-1:] if rank_level is None else (
        require_level(path, known, rank_level),)
    return list(chosen) if len(known) > 1 else [None]


@dataclass
class _Subject:
    file: str
    process: BenchProcess
    seconds: dict[tuple[int, float | None], list[dict[str, float | None]]] = field(default_factory=dict)
    """By number of threads and level, one for each repetition."""


def _results(subject: _Subject, prompt_tokens: int, gen_tokens: int, around: Conditions,
             read_bandwidths: Mapping[int, float], progressive: Schedule | None) -> Iterator[Result]:
    """Ends the process, and sums up."""
    peak, process, path = subject.process.finish(), subject.process, Path(subject.file)
    kv_bytes = sum(size for name, size in process.buffers.items() if name.startswith("KV "))
    kv_read = kv_bytes / process.context * (gen_tokens + 1) / 2
    known = file_levels(path)
    weights = {level: weight_bytes_per_token(path, place) for place, level in enumerate(known)}
    for (threads, level), rows in subject.seconds.items():
        read = kv_read + weights[known[-1] if level is None else level]
        if progressive is not None:
            schedule = progressive.checked(path, known)
            read = kv_read + statistics.fmean(weights[schedule.at(index)] for index in range(gen_tokens))
        prompts = [prompt_tokens / s for row in rows if (s := row["prompt_s"])]
        decodes = [gen_tokens / s for row in rows if (s := row["decode_s"])]
        yield Result(
            file=subject.file, threads=threads, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens,
            repetitions=len(rows), prompt_tps=Spread.of(prompts),
            decode_tps=Spread.of(decodes) if decodes else None, conditions=around,
            steadiness=steadiness(prompts, decodes), file_bytes=path.stat().st_size, load_s=process.load_s,
            peak_rss_bytes=peak, buffers=process.buffers, bytes_per_token=read if decodes else None,
            read_bandwidth=read_bandwidths.get(threads), rank_level=level,
            progressive=None if progressive is None else str(progressive),
        )


def steps(files: int, threads: int, repetitions: int) -> int:
    """How often `bench` tells that it advances; a file counts once for each of its levels."""
    return files * (1 + threads * repetitions)


def sweep(cores: int) -> list[int]:
    """Numbers of threads to try on a machine: few, and that of its cores."""
    tried = [count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if count < cores]
    return [*tried, cores]
