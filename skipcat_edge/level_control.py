"""Setting a model's level while it writes: by a fixed choice, a schedule or the dial."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcat_edge.dial import Dial
from skipcat_edge.errors import UserError
from skipcat_edge.levels import Schedule, file_levels, require_level, set_level
from skipcat_edge.thermal import hottest_cpu, this_machines_zones
from skipcat_edge.traffic import weight_bytes_per_token

_THERMOMETER_S = 0.5
"""Seconds for which a temperature is good: reading one takes as long as a small model's token."""

Choose = Callable[[int, float | None], float]
"""(number of a generated token, seconds that the one before took) -> the level that computes it."""


@dataclass(frozen=True)
class Auto:
    """What the dial aims at."""

    target_tps: float | None = None
    max_celsius: float | None = None


Wish = float | Schedule | Auto
"""A level, which prompts have too, or what sets the level of each token after a prompt at the full level."""


class Control:
    """Sets the level of one model for one text after the other, and counts what it did."""

    def __init__(self, llama: Any, choose: Choose, prompt: float) -> None:
        """`prompt`: the level of prompts."""
        self._llama = llama
        self._choose = choose
        self.prompt = prompt
        self._level = prompt
        self._counts: Counter[float] = Counter()
        self._switches = 0
        self._seconds = 0.0

    def begin(self) -> None:
        """Set the level for a prompt."""
        set_level(self._llama, self.prompt)
        self._level = self.prompt
        self._counts.clear()
        self._switches, self._seconds = 0, 0.0

    def over(self, tokens: Iterator[int]) -> Iterator[int]:
        """`tokens`, as Llama.generate computes them, each at its level."""
        self.begin()
        seconds: float | None = None  # of the first one they would be the prompt's
        started, before = 0.0, self.prompt
        for index, token in enumerate(tokens):
            if index:
                seconds = time.perf_counter() - started
                self._seconds += seconds
            self._counts[self._level] += 1
            self._switches += self._level != before
            before = self._level
            yield token
            self._turn(self._choose(index + 1, seconds))
            started = time.perf_counter()

    def _turn(self, level: float) -> None:
        if level != self._level:
            set_level(self._llama, level)
            self._level = level

    def report(self) -> str:
        """What was done since the last prompt: `level 0.8 for 48 tokens, 0.6 for 80; 2 switches; 12.1
        tokens/s`."""
        told = [f"{level:g} for {count}" for level, count in sorted(self._counts.items(), reverse=True)]
        if told:
            told[0] = f"level {told[0]} token{'' if told[0].endswith(' 1') else 's'}"
        switches = f"{self._switches} switch{'' if self._switches == 1 else 'es'}"
        speed = [f"{(self._counts.total() - 1) / self._seconds:.1f} tokens/s"] if self._seconds else []
        return "; ".join([", ".join(told) or "no tokens", switches, *speed])


def check_wish(path: Path, wish: Wish) -> tuple[Wish, tuple[float, ...]]:
    """`wish` in the levels of `path`, and these.

    Raises UserError where it names another one, or a temperature that this machine does not show, and as
    `file_levels`.
    """
    known = file_levels(path)
    if isinstance(wish, Auto) and wish.max_celsius is not None and _celsius() is None:
        raise UserError("This machine shows no temperature of its CPU, so --max-temp cannot be kept; "
                        "give --target-tps instead.")
    return checked(wish, path, known), known


def checked(wish: Wish, file: Any, known: Sequence[float]) -> Wish:
    """`wish` in the levels `known` of `file`. Raises UserError where it names another one."""
    if isinstance(wish, Schedule):
        return wish.checked(file, known)
    return wish if isinstance(wish, Auto) else require_level(file, known, wish)


def new_control(llama: Any, wish: Wish, known: Sequence[float]) -> Control:
    """What sets `llama`, whose file has the levels `known`, to a `wish` that is checked."""
    if isinstance(wish, Schedule):
        schedule = wish
        return Control(llama, lambda index, _: schedule.at(index), known[-1])
    if isinstance(wish, Auto):
        path = Path(llama.model_path)
        dial = Dial(known, [weight_bytes_per_token(path, place) for place in range(len(known))],
                    target_tps=wish.target_tps, max_celsius=wish.max_celsius)
        thermometer = (lambda: None) if wish.max_celsius is None else _Thermometer()

        def turn(_: int, seconds: float | None) -> float:
            return dial.level if seconds is None else dial.step(seconds, thermometer())

        return Control(llama, turn, known[-1])
    level = wish
    return Control(llama, lambda *_: level, level)


def _celsius() -> float | None:
    return hottest_cpu(this_machines_zones())


class _Thermometer:
    """The CPU's temperature, read no more often than it is worth."""

    def __init__(self) -> None:
        self._celsius: float | None = None
        self._read = float("-inf")

    def __call__(self) -> float | None:
        now = time.monotonic()
        if now - self._read >= _THERMOMETER_S:
            self._celsius, self._read = _celsius(), now
        return self._celsius
