"""The dial: which level keeps a wanted speed, or a machine below a temperature, from what was measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

HOLD = 16
"""Tokens for which a level is held at least; the speed is that of so many."""
_MARGIN = 1.1
"""Predicted speed over the wanted one that a higher level must have."""
_COOLER = 5.0
"""°C below the limit that the machine must have for a higher level."""
_HICCUP = 3.0
"""What a token may take, in medians: one that waits for another program says nothing of the level."""
_LONG = 16
"""A level that is held so often as long as the last wait was no mistake; and so often as long as a wait is
waited before a measured speed, which may have been another program's fault, is doubted."""
_LONGEST_WAIT = 4096


class Dial:
    """Answers, token by token, the level for the next one.

    It begins at the highest level and goes one level down where the speed is below the wanted one or the
    temperature above its limit. It goes up only where the speed predicted for the next level clears the
    wanted one, and the machine is some degrees cooler than it may be; each time that this proves wrong, it
    waits twice as long for the next time.
    """

    def __init__(self, levels: Sequence[float], costs: Sequence[float], *, target_tps: float | None = None,
                 max_celsius: float | None = None) -> None:
        """`levels`: ascending; `costs`: bytes per token of each."""
        self._levels = tuple(levels)
        self._target_s = None if target_tps is None else 1 / target_tps
        self._max_celsius = max_celsius
        self._bytes = [high / low for low, high in pairwise(costs)]
        """Time at a level's next higher one over that at the level itself, as the bytes have it."""
        self._measured: list[float | None] = [None] * len(self._bytes)
        """The same as it was, where both were measured one after the other."""
        self._place = len(levels) - 1
        self._fastest = [float("inf")] * len(self._levels)
        """Seconds per token of each level at its best."""
        self._seconds: deque[float] = deque(maxlen=HOLD)
        self._held = 0
        self._wait = HOLD
        self._last: tuple[int, float] | None = None
        """Place and seconds per token of the level before this one, until it is compared."""
        self._tried = False
        """This level was entered from below."""

    @property
    def level(self) -> float:
        """The level for the next token."""
        return self._levels[self._place]

    def step(self, seconds: float, celsius: float | None = None) -> float:
        """The level for the next token, after one that took `seconds` at `level` on a CPU of `celsius`."""
        self._seconds.append(seconds)
        self._held += 1
        if self._held < HOLD:
            return self.level
        now = self._speed()
        self._fastest[self._place] = min(self._fastest[self._place], now)
        if self._last is not None:
            self._compare(*self._last, now)
            self._last = None
        if self._too_slow(now) or self._too_hot(celsius):
            if self._place > 0:
                self._learn_from_failure()
                self._move(-1, now)
        elif self._may_rise(now, celsius):
            self._move(1, now)
        return self.level

    def _speed(self) -> float:
        """Seconds per token."""
        most = _HICCUP * sorted(self._seconds)[HOLD // 2]
        return sum(min(each, most) for each in self._seconds) / HOLD

    def _too_slow(self, now: float) -> bool:
        return self._target_s is not None and now > self._target_s

    def _too_hot(self, celsius: float | None) -> bool:
        return self._max_celsius is not None and celsius is not None and celsius > self._max_celsius

    def _may_rise(self, now: float, celsius: float | None) -> bool:
        if self._place == len(self._levels) - 1 or self._held < self._wait:
            return False
        if self._max_celsius is not None and (celsius is None or celsius > self._max_celsius - _COOLER):
            return False
        if self._target_s is None:
            return True
        most = self._target_s / _MARGIN
        measured, predicted = self._measured[self._place], now * self._bytes[self._place]
        if measured is None:
            return predicted <= most
        if now * measured <= most:
            return True
        # a level is never slower than those above it
        at_best = min(predicted, *self._fastest[self._place + 1 :])
        return self._held >= _LONG * self._wait and at_best <= most

    def _compare(self, place: int, before: float, now: float) -> None:
        """`before`: seconds per token of the level at `place`, the next to this one."""
        low, high = (before, now) if self._place > place else (now, before)
        # a higher level is never the faster one: then the machine has changed
        self._measured[min(place, self._place)] = max(1.0, high / low if low else 1.0)

    def _learn_from_failure(self) -> None:
        if self._tried:
            long = self._held >= _LONG * self._wait
            self._wait = HOLD if long else min(2 * self._wait, _LONGEST_WAIT)

    def _move(self, step: int, now: float) -> None:
        self._last = self._place, now
        self._place += step
        self._tried = step > 0
        self._held = 0
        self._seconds.clear()
