"""Speed of a file's rank levels: `make bench-levels`.

For each type, a random-weight file with levels and one file of its own for each level are written to
build/bench/, all loaded, and timed in turns by one process. Before each of its turns the file with levels is
switched from another level, so that each turn begins with a switch. Figures are medians of all turns, ratios
medians of those of the same round.

Decoding a token reads every weight of its level once: a level's ideal speed-up is the full level's bytes
over its own. The targets are marks to compare with, not tests: on a busy machine they are missed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
from bench_models import SEED, cached, written
from bench_report import Report, machine
from rich.table import Table

from skipcat_edge.decoding import clear
from skipcat_edge.levels import levels, set_level
from skipcat_edge.ranks import parse_ratios
from skipcat_edge.session import decode_error, default_threads, import_llama_cpp, open_model
from skipcat_edge.synth_plan import Plan, model_dimensions, plan
from skipcat_edge.terminal import new_progress, new_table
from skipcat_edge.traffic import weight_bytes_per_token
from skipcat_edge.weight_types import weight_type

TARGET = 0.97
WARM_UP = 2
"""Tokens before those of a turn, since another model was in the caches; at the level before the switch."""
BUSY = 0.03
"""Share of the CPUs that others may use before the page says so."""
EXPLANATION = """\
Random weights of the model's dimensions. In each round every level of the file, and every file that has \
only that ratio, had a turn: {tokens} tokens one by one, and a prompt of {prompt}. tokens/s are the median \
of all turns with the least and the greatest, ratios medians of those of the same round. *MB*: weights that \
a token reads. *bytes*: the full level's over this one's. *speed-up*: over the full level. *efficiency*: \
speed-up over bytes; {target} is the target. A turn's seconds contain its switch."""
OWN = """\
The second table sets each level beside a file that has only that ratio: its ratios are the level's over the \
file's. *per byte*: decode times bytes. Ranks are whole blocks of the type, and so a level that adds to a \
lower one may not keep what the file of its own does; it multiplies twice by shorter rows, which takes \
longer than once. A file that is loaded again may be up to 3 % faster or slower, by where its memory lies."""
SWITCHES = """\
The third table is what a switch takes. *set*: the call that changes the level. *first*: the token after it, \
beside the median one at that level. *cost*: the call and what the first token takes longer than its turn's \
median one, in tokens: below 1 is the target. *without*: the same of the file of its own, where nothing \
changes."""
Clock = Callable[[], float]
"""Tells seconds."""


@dataclass(frozen=True)
class Turn:
    """Seconds of what one turn did."""

    switch: float
    """The call."""
    tokens: tuple[float, ...]
    prompt: float

    @property
    def decode(self) -> float:
        return self.switch + sum(self.tokens)

    @property
    def token(self) -> float:
        """The median one, but for the first."""
        return statistics.median(self.tokens[1:])

    @property
    def cost(self) -> float:
        """Seconds that the switch took, and made the first token longer."""
        return self.switch + self.tokens[0] - self.token


@dataclass
class Subject:
    """A level of a file."""

    level: float
    nbytes: int
    """Of the weights that a token reads."""
    turns: list[Turn] = field(default_factory=list)

    def rates(self, tokens: int, seconds: Callable[[Turn], float]) -> list[float]:
        return [tokens / seconds(turn) for turn in self.turns]


def speedup(fast: Subject, slow: Subject, seconds: Callable[[Turn], float]) -> float:
    """Median over the rounds of how much faster `fast` was in the same one."""
    turns = zip(fast.turns, slow.turns, strict=True)
    return statistics.median(seconds(b) / seconds(a) for a, b in turns)


def decode_s(turn: Turn) -> float:
    return turn.decode


def prompt_s(turn: Turn) -> float:
    return turn.prompt


class Model:
    """A loaded file that takes turns."""

    def __init__(self, path: Path, threads: int, tokens: int, prompt: int, clock: Clock) -> None:
        self._clock = clock
        self._llama: Any = open_model(path, context=max(WARM_UP + tokens, prompt), threads=threads,
                                      needs_vocabulary=False)
        self.levels = levels(self._llama)
        draw = random.Random(0)
        vocabulary = self._llama.n_vocab()
        self._tokens = [[draw.randrange(vocabulary)] for _ in range(WARM_UP + tokens)]
        self._prompt = [draw.randrange(vocabulary) for _ in range(prompt)]

    def close(self) -> None:
        self._llama.close()

    def turn(self, level: float) -> Turn:
        """At `level`, switched to from another one if there is another."""
        llama = self._llama
        set_level(llama, self.levels[self.levels.index(level) - 1])
        clear(llama)
        for batch in self._tokens[:WARM_UP]:
            self._decode(batch)
        started = self._clock()
        set_level(llama, level)
        switch = self._clock() - started
        tokens = tuple(self._decode(batch) for batch in self._tokens[WARM_UP:])
        clear(llama)
        return Turn(switch, tokens, self._decode(self._prompt))

    def _decode(self, batch: Sequence[int]) -> float:
        llama_cpp = import_llama_cpp()
        array = (llama_cpp.llama_token * len(batch))(*batch)
        started = self._clock()
        code = llama_cpp.llama_decode(self._llama.ctx, llama_cpp.llama_batch_get_one(array, len(batch)))
        llama_cpp.llama_synchronize(self._llama.ctx)
        seconds = self._clock() - started
        if code:
            raise decode_error(f"llama_decode returned {code}")
        return seconds


class Others:
    """What other processes used of the CPUs since it was made."""

    def __init__(self) -> None:
        self._started, self._busy = time.monotonic(), self._others_s()

    def share(self) -> float:
        seconds = time.monotonic() - self._started
        return max(0.0, self._others_s() - self._busy) / seconds / (psutil.cpu_count() or 1)

    @staticmethod
    def _others_s() -> float:
        times = psutil.cpu_times()._asdict()
        # what guests use is in `user` and `nice` too
        idle = sum(times.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
        own = psutil.Process().cpu_times()
        return float(sum(times.values()) - idle - own.user - own.system)


def measure(file: Path, own: Sequence[Path], rounds: int, threads: int, tokens: int, prompt: int,
            title: str, clock: Clock = time.perf_counter) -> tuple[list[Subject], list[Subject]]:
    """The levels of `file`, and the files with one level of `own`, one for each of them in the same order."""
    with ExitStack() as stack, new_progress() as progress:

        def loaded(path: Path) -> Model:
            model = Model(path, threads, tokens, prompt, clock)
            stack.callback(model.close)
            return model

        leveled = loaded(file)
        pairs = [(Subject(level, weight_bytes_per_token(file, place)), leveled)
                 for place, level in enumerate(leveled.levels)]
        singles = [(Subject(level, weight_bytes_per_token(path)), loaded(path))
                   for level, path in zip(leveled.levels, own, strict=True)]
        turns = [*pairs, *singles]
        task = progress.add_task(title, total=(rounds + 1) * len(turns))
        for index in range(rounds + 1):
            for place in range(len(turns)):
                subject, model = turns[(index + place) % len(turns)]
                turn = model.turn(subject.level if model is leveled else model.levels[0])
                if index:  # else a warm-up
                    subject.turns.append(turn)
                progress.advance(task)
        return [subject for subject, _ in pairs], [subject for subject, _ in singles]


def speed_table(subjects: Sequence[Subject], prompt: int) -> Table:
    """Of the levels of a file, the full one last."""
    table = new_table("level", "MB", "tokens/s", "min", "max", "bytes", "speed-up", "efficiency", "",
                      f"prompt {prompt}", "min", "max", "speed-up", left=1)
    full = subjects[-1]
    for subject in subjects:
        ratio, faster = full.nbytes / subject.nbytes, speedup(subject, full, decode_s)
        compared = ("", "", "", "") if subject is full else (
            f"{ratio:.3f}", f"{faster:.3f}", f"{faster / ratio:.3f}",
            "met" if faster / ratio >= TARGET else "not met")
        table.add_row(
            f"{subject.level:g}", f"{subject.nbytes / 1e6:.0f}",
            *spread(subject.rates(len(subject.turns[0].tokens), decode_s)), *compared,
            *spread(subject.rates(prompt, prompt_s)),
            "" if subject is full else f"{speedup(subject, full, prompt_s):.3f}")
    return table


def spread(values: Sequence[float]) -> tuple[str, str, str]:
    return f"{statistics.median(values):.1f}", f"{min(values):.1f}", f"{max(values):.1f}"


def own_table(subjects: Sequence[Subject], own: Sequence[Subject]) -> Table:
    """Each level beside the file that has no other."""
    table = new_table("level", "its file's MB", "tokens/s", "bytes", "decode", "per byte", "prompt", left=1)
    for subject, single in zip(subjects, own, strict=True):
        ratio, faster = subject.nbytes / single.nbytes, speedup(subject, single, decode_s)
        rates = single.rates(len(single.turns[0].tokens), decode_s)
        table.add_row(f"{subject.level:g}", f"{single.nbytes / 1e6:.0f}", f"{statistics.median(rates):.1f}",
                      f"{ratio:.3f}", f"{faster:.3f}", f"{faster * ratio:.3f}",
                      f"{speedup(subject, single, prompt_s):.3f}")
    return table


def switch_table(subjects: Sequence[Subject], own: Sequence[Subject]) -> Table:
    """What it takes to come to each level."""
    table = new_table("to level", "set, µs", "first, ms", "median, ms", "cost", "max", "", "without", left=1)
    for subject, single in zip(subjects, own, strict=True):
        costs = [turn.cost / turn.token for turn in subject.turns]
        table.add_row(
            f"{subject.level:g}", f"{statistics.median(turn.switch for turn in subject.turns) * 1e6:.0f}",
            f"{statistics.median(turn.tokens[0] for turn in subject.turns) * 1e3:.2f}",
            f"{statistics.median(turn.token for turn in subject.turns) * 1e3:.2f}",
            f"{statistics.median(costs):.3f}", f"{max(costs):.3f}",
            "met" if statistics.median(costs) < 1 else "not met",
            f"{statistics.median(turn.cost / turn.token for turn in single.turns):.3f}")
    return table


def crowd(share: float, cpu_time: bool) -> str:
    """What to say of a machine of whose CPUs others used `share`."""
    used = f"Other processes used {share:.1%} of the CPUs meanwhile"
    if share <= BUSY:
        return f"{used}."
    advice = "their share of the CPUs is not in the figures, that of the memory is" if cpu_time else (
        "measure again, or with --cpu-time")
    return f"**The machine was not idle.** {used}; {advice}."


def planned(model: str, type_name: str, ratios: Sequence[float]) -> Iterator[Plan]:
    """The file with all levels, and one of its own for each."""
    dimensions, type_ = model_dimensions(model), weight_type(type_name)
    yield plan(dimensions, type_, ratios[-1], SEED, ratios)
    for ratio in ratios:
        yield plan(dimensions, type_, ratio, SEED)


@click.command(help=__doc__)
@click.option("--model", default="llama-3.2-1b", show_default=True)
@click.option("--types", default="Q4_0,Q8_0", show_default=True, help="Separated by commas.")
@click.option("--levels", "ratios", default="0.6,0.8", show_default=True, help="Rising.")
@click.option("--tokens", default=64, show_default=True, help="Decoded between two switches.")
@click.option("--prompt", default=128, show_default=True, help="Tokens.")
@click.option("--rounds", default=8, show_default=True)
@click.option("--threads", type=int, default=default_threads, show_default="one for each core")
@click.option("--cpu-time", is_flag=True, help="One thread's CPU seconds, for a machine that is not idle.")
@click.option("--source", help="Pinned source archive or directory, for skipcat-edge synth.")
@click.option("--keep", is_flag=True, help="Keep the models in build/bench/ for the next run.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as Markdown.")
def main(model: str, types: str, ratios: str, tokens: int, prompt: int, rounds: int, threads: int,
         cpu_time: bool, source: str | None, keep: bool, out: Path | None) -> None:
    # several wait for each other, and waiting takes CPU time
    threads = 1 if cpu_time else threads
    rising = parse_ratios(ratios, "--levels")[::-1]
    command = "tests/bench_levels.py --cpu-time" if cpu_time else "make bench-levels"
    report = Report("Speed of levels", command)
    report.text(f"{machine()} {threads} thread{'s' * (threads > 1)}, {rounds} rounds, {model} at the levels "
                f"{ratios}." + " Seconds are the CPU's, not the clock's." * cpu_time)
    for text in (EXPLANATION.format(tokens=tokens, prompt=prompt, target=TARGET), OWN, SWITCHES):
        report.text(text)
    for name in types.split(","):
        plans = list(planned(model, name, rising))
        file, *own = map(cached, plans)
        with written(plans, source, keep):
            others = Others()
            subjects, singles = measure(file, own, rounds, threads, tokens, prompt, f"{model} {name}",
                                        time.process_time if cpu_time else time.perf_counter)
            share = others.share()
        report.heading(name)
        report.text(crowd(share, cpu_time))
        report.table(speed_table(subjects, prompt))
        report.table(own_table(subjects, singles))
        report.table(switch_table(subjects, singles))
    if out:
        report.save(out)


if __name__ == "__main__":
    main()
