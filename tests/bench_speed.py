"""Speed of low-rank models beside stock llama.cpp on dense ones: `make bench-speed`.

For each model and type, a dense and some low-rank random-weight files are written to build/bench/.
The stock library (dense) and the patched one (dense and low-rank), built from the same archive with
the same flags, each load their file in a process of its own, and are timed in turns, with the same
threads, some tenths of a second at a time. Figures are medians of all turns, ratios medians of
those of the same turn.

Decoding a token reads every weight once, and the keys and values of all tokens before it: its ideal
speed-up is dense over low-rank bytes (all tensors but an embedding table of its own; a tied one is
read as the head). A prompt is bound by arithmetic: its ideal is dense over low-rank
multiplications, of the linear layers and attention for every token and of the head for the last one.
Efficiency is measured over ideal speed-up. The targets are marks to compare with, not tests: on
a busy machine they are missed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from bench_models import ROOT, Test, bytes_read, cached, ideal, planned_models, written
from bench_report import Report, machine
from rich.table import Table

from skipcat_edge.bandwidth import read_bandwidth
from skipcat_edge.session import default_threads
from skipcat_edge.synth_plan import Plan
from skipcat_edge.terminal import new_progress, new_table

TARGET, BANDWIDTH_TARGET = 0.97, 0.85
STOCK_TARGET = (0.98, 1.02)
MEMORY_SLACK = 4 * 2**20
"""Bytes by which the same process differs from run to run."""
NATIVE = ROOT / "build" / "native"
EXPLANATION = """\
Random weights of the models' dimensions. Files took turns, some tenths of a second each: tokens/s are the \
median of all turns with the least and the greatest, ratios medians of those of the same turn. *speed-up*: \
over stock llama.cpp with the dense file. *ideal*: what the smaller number of bytes (decode) or \
multiplications (prompt) allows, attention and head included. *efficiency*: speed-up over ideal. *over \
patched dense*: the same with the dense file in the patched library. *of bandwidth*: bytes read per second \
over what the same threads read from memory in the same turn."""


@dataclass
class Subject:
    """A file, and the library that runs it."""

    plan: Plan
    kind: str
    """`stock` or `patched`."""
    seconds: dict[Test, list[float]] = field(default_factory=dict)
    """One for each turn."""
    buffers: dict[str, int] = field(default_factory=dict)
    """Bytes, by purpose and place."""
    peak_rss: int = 0
    """Bytes."""

    @property
    def path(self) -> Path:
        return cached(self.plan)

    def rates(self, test: Test) -> list[float]:
        """Tokens per second of each turn."""
        return [(test.prompt or test.generated) / seconds for seconds in self.seconds[test]]

    def rate(self, test: Test) -> float:
        return statistics.median(self.rates(test))


class Worker:
    """`subject`, loaded by speed_worker.py until the end of the context, which notes its memory."""

    def __init__(self, subject: Subject, threads: int, context: int) -> None:
        self._subject = subject
        libraries = {"LLAMA_CPP_LIB_PATH": str(NATIVE / subject.kind / "bin")}
        command = [sys.executable, str(ROOT / "tests" / "speed_worker.py"), str(subject.path), str(threads),
                   str(context)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         stderr=subprocess.DEVNULL, env={**os.environ, **libraries})
        subject.buffers = self._answer()["buffers"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if kind is None:
            self._subject.peak_rss = self._answer()["peak_rss"]
        self._process.wait()

    def time(self, test: Test) -> None:
        """One turn of `test`."""
        assert self._process.stdin is not None
        print(json.dumps(vars(test)), file=self._process.stdin, flush=True)
        self._subject.seconds.setdefault(test, []).append(self._answer()["seconds"])

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            kind = self._subject.kind
            raise click.ClickException(f"{kind} llama.cpp ran into an error with {self._subject.path}.")
        return json.loads(line)


def speedup(fast: Subject, slow: Subject, test: Test) -> float:
    """Median over the turns of how much faster `fast` was in the same turn."""
    turns = zip(fast.seconds[test], slow.seconds[test], strict=True)
    return statistics.median(slow_s / fast_s for fast_s, slow_s in turns)


@dataclass(frozen=True)
class Row:
    """One test of a file, against stock llama.cpp with the dense one."""

    subject: Subject
    test: Test
    ideal: float
    speedup: float
    over_own: float
    """Speed-up over the dense file in the patched library."""
    share_of_bandwidth: float | None

    @property
    def efficiency(self) -> float:
        return self.speedup / self.ideal

    @property
    def met(self) -> bool:
        """A low-rank file reaches its target; a dense one is as fast as in stock llama.cpp."""
        if self.subject.plan.low_rank:
            return self.efficiency >= TARGET
        return STOCK_TARGET[0] <= self.speedup <= STOCK_TARGET[1]

    def cells(self) -> tuple[str, ...]:
        rates, model = self.subject.rates(self.test), self.subject.plan
        share = "" if self.share_of_bandwidth is None else f"{self.share_of_bandwidth:.2f}"
        first = (model.type.name, f"{model.ratio:g}", self.subject.kind, str(self.test))
        speed = (f"{statistics.median(rates):.1f}", f"{min(rates):.1f}", f"{max(rates):.1f}", share)
        if self.subject.kind == "stock":
            return (*first, *speed, "", "", "", "", "")
        return (*first, *speed, f"{self.ideal:.3f}", f"{self.speedup:.3f}", f"{self.efficiency:.3f}",
                "met" if self.met else "not met", f"{self.over_own / self.ideal:.3f}")


HEADER = ("type", "ratio", "llama.cpp", "test", "tokens/s", "min", "max", "of bandwidth", "ideal", "speed-up",
          "efficiency", "", "over patched dense")


def compared(subjects: Sequence[Subject], tests: Sequence[Test],
             bandwidth: dict[Test, list[float]]) -> Iterator[Row]:
    """Each file and test against the first one, stock's."""
    stock, dense, *_ = subjects
    for subject in subjects:
        for test in tests:
            share = None
            if test.generated:
                used = [bytes_read(subject.plan, test) * rate for rate in subject.rates(test)]
                share = statistics.median(a / b for a, b in zip(used, bandwidth[test], strict=True))
            yield Row(subject, test, ideal(subject.plan, stock.plan, test), speedup(subject, stock, test),
                      speedup(subject, dense, test), share)


def speed_table(rows: Sequence[Row]) -> Table:
    table = new_table(*HEADER, left=4)
    for row in rows:
        table.add_row(*row.cells())
    return table


MEMORY_HEADER = ("model", "type", "ratio", "llama.cpp", "file MB", "repacked", "KV", "compute", "peak",
                 "beyond", "stock's", "")


def memory_cells(subjects: Sequence[Subject]) -> Iterator[tuple[str, ...]]:
    """Peak resident memory in MB, and what of it is neither the file nor the copy of its repacked weights."""
    stock_beyond = 0
    for subject in subjects:
        size = subject.path.stat().st_size
        repacked, kv, compute = (
            sum(nbytes for name, nbytes in subject.buffers.items() if part in name)
            for part in ("REPACK", "KV", "compute")
        )
        beyond = subject.peak_rss - size - repacked
        stock_beyond = stock_beyond or beyond
        numbers = (size, repacked, kv, compute, subject.peak_rss, beyond, stock_beyond)
        model = subject.plan
        yield (model.model.name, model.type.name, f"{model.ratio:g}", subject.kind,
               *(f"{nbytes / 1e6:.0f}" for nbytes in numbers),
               "met" if beyond <= stock_beyond + MEMORY_SLACK else "not met")


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence for each target."""
    for kind in ("decode", "prompt"):
        low_rank = [row for row in rows if row.subject.plan.low_rank and str(row.test).startswith(kind)]
        dense = [row for row in rows if row.subject.kind == "patched" and not row.subject.plan.low_rank
                 and str(row.test).startswith(kind)]
        if low_rank:
            efficiencies = [row.efficiency for row in low_rank]
            met = sum(row.met for row in low_rank)
            yield (f"{kind.capitalize()}: efficiency {min(efficiencies):.3f} to {max(efficiencies):.3f}, "
                   f"{statistics.geometric_mean(efficiencies):.3f} in the geometric mean (target 1); "
                   f"{met} of {len(efficiencies)} cells reach {TARGET}. Speed-up over the dense file in the "
                   "patched library, over the ideal: "
                   f"{statistics.geometric_mean(row.over_own / row.ideal for row in low_rank):.3f} in the "
                   "geometric mean.")
        if dense:
            ratios = [row.speedup for row in dense]
            yield (f"Dense files, {kind}, patched over stock: {min(ratios):.3f} to {max(ratios):.3f}, "
                   f"{statistics.geometric_mean(ratios):.3f} in the geometric mean; "
                   f"{sum(row.met for row in dense)} of {len(dense)} cells are within {STOCK_TARGET[0]} to "
                   f"{STOCK_TARGET[1]}.")
    shares = [(row.share_of_bandwidth, row) for row in rows if row.share_of_bandwidth is not None]
    if shares:
        share, row = max(shares, key=lambda pair: pair[0])
        model = row.subject.plan
        yield (f"Decoding reads at most {share:.0%} of the measured bandwidth ({model.model.name} "
               f"{model.type.name} {model.ratio:g}, {row.test}); {BANDWIDTH_TARGET:.0%} is the target.")


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=("llama-3.2-1b", "qwen2.5-0.5b"), show_default=True)
@click.option("--types", default="Q4_0,Q8_0,F16,Q4_K", show_default=True, help="Separated by commas.")
@click.option("--ratios", default="0.8,0.6", show_default=True)
@click.option("--prompts", default="32,128,512", show_default=True, help="Tokens.")
@click.option("--depths", default="0,2048", show_default=True, help="Tokens before the decoded ones.")
@click.option("--gen-tokens", default=16, show_default=True)
@click.option("--repetitions", default=5, show_default=True, help="Turns.")
@click.option("--threads", type=int, default=default_threads, show_default="one for each core")
@click.option("--source", help="Pinned source archive or directory, for skipcat-edge synth.")
@click.option("--keep", is_flag=True, help="Keep the models in build/bench/ for the next run.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as Markdown.")
def main(models: tuple[str, ...], types: str, ratios: str, prompts: str, depths: str, gen_tokens: int,
         repetitions: int, threads: int, source: str | None, keep: bool, out: Path | None) -> None:
    for kind in ("stock", "patched"):
        if not (NATIVE / kind / "bin" / "libllama.so").exists():
            raise click.ClickException(f"{kind} llama.cpp is missing; run make native-tools.")
    tests = [Test(int(tokens), 0, 0) for tokens in prompts.split(",") if tokens]
    tests += [Test(0, gen_tokens, int(depth)) for depth in depths.split(",") if depth]
    report = Report("Speed beside stock llama.cpp", "make bench-speed")
    report.text(f"{machine()} {threads} threads, {repetitions} turns.")
    report.text(EXPLANATION)
    rows: list[Row] = []
    memory: list[tuple[str, ...]] = []
    for model in models:
        report.heading(model)
        for name in types.split(","):
            found, beyond = measure(model, name, ratios, tests, repetitions, threads, source, keep)
            if found:
                report.table(speed_table(found))
            rows += found
            memory += beyond
    report.heading("Memory")
    report.text("MB. *beyond*: of the peak, what is neither the file nor the copy of its repacked weights.")
    table = new_table(*MEMORY_HEADER, left=4)
    for cells in memory:
        table.add_row(*cells)
    report.table(table)
    report.heading("In short")
    for sentence in summary(rows):
        report.text(sentence)
    if out:
        report.save(out)


def measure(model: str, type_name: str, ratios: str, tests: Sequence[Test], repetitions: int, threads: int,
            source: str | None, keep: bool) -> tuple[list[Row], list[tuple[str, ...]]]:
    """All files of one model and type, in turns: speed, and memory; nothing where the type's block does not
    fit."""
    plans = planned_models(model, type_name, ratios)
    if not plans:
        return [], []
    subjects = [Subject(plans[0], "stock"), *(Subject(planned, "patched") for planned in plans)]
    with written(plans, source, keep):
        bandwidth = time_all(subjects, tests, repetitions, threads, f"{model} {type_name}")
        return list(compared(subjects, tests, bandwidth)), list(memory_cells(subjects))


def time_all(subjects: Sequence[Subject], tests: Sequence[Test], repetitions: int, threads: int,
             title: str) -> dict[Test, list[float]]:
    """Each test in turns of all subjects, the first one moving on.

    Returns the bandwidth, bytes per second, that was read before each turn of decoding.
    """
    bandwidth: dict[Test, list[float]] = {}
    context = max(test.prompt + test.generated + test.depth for test in tests) + 64
    with ExitStack() as stack, new_progress() as progress:
        task = progress.add_task(title, total=repetitions * len(subjects) * len(tests))
        workers = [stack.enter_context(Worker(subject, threads, context)) for subject in subjects]
        for test in tests:
            for turn in range(repetitions):
                if test.generated:
                    bandwidth.setdefault(test, []).append(read_bandwidth(threads, 128 * 2**20, 2))
                for index in range(len(workers)):
                    workers[(turn + index) % len(workers)].time(test)
                    progress.advance(task)
    return bandwidth


if __name__ == "__main__":
    main()
