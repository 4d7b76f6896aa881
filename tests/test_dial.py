"""The dial on simulated machines: it keeps what is wanted where that can be kept, and does not oscillate."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skipcat_edge.dial import HOLD, Dial


@dataclass(frozen=True)
class Machine:
    """Reads a level's bytes at some speed, after some work that all levels have."""

    sizes: tuple[float, ...]
    """Bytes per token of each level."""
    fixed_s: float = 0.0

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(round(0.1 * (place + 1), 1) for place in range(len(self.sizes)))

    def seconds(self, level: float) -> float:
        return self.fixed_s + self.sizes[self.levels.index(level)]


def machines() -> st.SearchStrategy[Machine]:
    steps = st.lists(st.floats(1.02, 2.0), min_size=1, max_size=7)
    sizes = steps.map(lambda found: tuple(0.01 * math.prod(found[:n]) for n in range(len(found) + 1)))
    return st.builds(Machine, sizes, st.floats(0, 0.05))


def run(dial: Dial, seconds: Callable[[int, float], float], tokens: int,
        celsius: Callable[[int, float], float | None] = lambda index, level: None) -> list[float]:
    """The levels of so many tokens on a machine that tells what each one took."""
    levels = []
    for index in range(tokens):
        levels.append(level := dial.level)
        assert dial.step(seconds(index, level), celsius(index, level)) == dial.level
    return levels


def switches(levels: Sequence[float]) -> int:
    return sum(before != after for before, after in pairwise(levels))


def holds(levels: Sequence[float]) -> Iterator[int]:
    """Lengths of all runs but the last, which the end cuts."""
    lengths = [len(list(run)) for _, run in groupby(levels)]
    return iter(lengths[:-1])


@given(machines(), st.floats(0.5, 2.0))
@example(Machine((0.6, 0.8)), 1.0)
@settings(max_examples=30, deadline=None)
def test_constant_machine_settles_at_the_highest_level_that_keeps_the_speed(
    machine: Machine, share: float
) -> None:
    """And gets there one way, without ever coming back."""
    target = share / machine.seconds(machine.levels[-1])
    levels = run(Dial(machine.levels, machine.sizes, target_tps=target),
                 lambda _, level: machine.seconds(level), 2000)
    fast = [level for level in machine.levels if machine.seconds(level) <= 1 / target]
    # a speed that is the wanted one to the last bit may go either way
    if not any(math.isclose(machine.seconds(level) * target, 1, rel_tol=1e-9) for level in machine.levels):
        assert levels[-1] == max(fast, default=machine.levels[0])
    assert all(before >= after for before, after in pairwise(levels))


@given(machines(), st.floats(0.5, 2.0), st.floats(0.01, 0.3), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_noise_does_not_make_it_oscillate(machine: Machine, share: float, noise: float, seed: int) -> None:
    draw, tokens = random.Random(seed), 4000
    target = share / machine.seconds(machine.levels[-1])
    levels = run(Dial(machine.levels, machine.sizes, target_tps=target),
                 lambda _, level: machine.seconds(level) * draw.lognormvariate(0, noise), tokens)
    # Each failed rise doubles the wait for the next one.
    assert switches(levels) <= len(machine.levels) - 1 + 2 * math.log2(tokens / HOLD) + 4


@given(st.data(), machines(), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_levels_are_held_whatever_is_measured(data: st.DataObject, machine: Machine, seed: int) -> None:
    draw = random.Random(seed)
    dial = Dial(machine.levels, machine.sizes, target_tps=data.draw(st.none() | st.floats(1, 1000)),
                max_celsius=data.draw(st.none() | st.floats(40, 90)))
    levels = run(dial, lambda _, level: draw.choice((0.0, 1e-9, 0.01, 1.0, 1e6)), 1000,
                 lambda _, level: draw.choice((None, -20.0, 60.0, 200.0)))
    assert all(length >= HOLD for length in holds(levels))
    places = [machine.levels.index(level) for level in levels]
    assert all(abs(before - after) <= 1 for before, after in pairwise(places))


@given(machines(), st.floats(1.3, 4.0))
@settings(max_examples=20, deadline=None)
def test_what_is_lost_to_throttling_comes_back(machine: Machine, slower: float) -> None:
    """Full speed with room to spare, then throttled for a while."""
    full = machine.levels[-1]
    target = 0.8 / machine.seconds(full)
    levels = run(Dial(machine.levels, machine.sizes, target_tps=target), lambda index, level:
                 machine.seconds(level) * (slower if 500 <= index < 1500 else 1), 8000)
    assert set(levels[:500]) == {full} and levels[-1] == full
    if slower * 0.8 > 1.01:
        # it may try again whether that was another program
        assert levels[500 + 2 * HOLD : 1500].count(full) <= 4 * HOLD


@given(machines(), st.integers(8, 60))
@settings(max_examples=20, deadline=None)
def test_another_program_for_a_moment_costs_little(machine: Machine, moment: int) -> None:
    """Ten times as slow until the level has changed: what was measured then must not be believed for ever."""
    full = machine.levels[-1]
    target = 0.8 / machine.seconds(full)
    levels = run(Dial(machine.levels, machine.sizes, target_tps=target), lambda index, level:
                 machine.seconds(level) * (10 if 100 <= index < 100 + moment else 1), 8000)
    assert levels[-1] == full


def test_a_single_slow_token_changes_nothing() -> None:
    machine = Machine((0.06, 0.08))
    dial = Dial(machine.levels, machine.sizes, target_tps=0.8 / 0.08)
    levels = run(dial, lambda index, level: 2.0 if index % 50 == 49 else machine.seconds(level), 1000)
    assert switches(levels) == 0


def test_a_wrong_prediction_is_not_made_again() -> None:
    """Of a machine whose higher level is slower than its bytes say: it is measured, then left alone."""
    def seconds(index: int, level: float) -> float:
        hot = 1.6 if index < 200 else 1.0
        return hot * (0.09 if level == 0.2 else 0.04)

    levels = run(Dial((0.1, 0.2), (1.0, 1.1), target_tps=1 / 0.08), seconds, 20_000)
    assert levels[-1] == 0.1 and switches(levels) < 20


@given(machines(), st.floats(50, 90))
@settings(max_examples=20, deadline=None)
def test_heat_that_does_not_end_leads_to_the_lowest_level(machine: Machine, limit: float) -> None:
    levels = run(Dial(machine.levels, machine.sizes, max_celsius=limit), lambda _, level: 0.1, 400,
                 lambda _, level: limit + 0.5)
    assert levels[-1] == machine.levels[0] and switches(levels) == len(machine.levels) - 1


@pytest.mark.parametrize("celsius", [None, 56.0])
def test_it_does_not_rise_where_the_machine_may_still_be_hot(celsius: float | None) -> None:
    levels = run(Dial((0.6, 0.8), (6, 8), max_celsius=60), lambda _, level: 0.1, 5000,
                 lambda index, level: 61.0 if index < HOLD else celsius)
    assert levels[-1] == 0.6 and switches(levels) == 1


@given(st.floats(55, 75), st.floats(20, 400))
@settings(max_examples=20, deadline=None)
def test_a_machine_that_warms_and_cools_stays_near_its_limit(limit: float, inertia: float) -> None:
    """The full level would heat it to 85 °C, the lower ones to 70 and 50."""
    ends = {0.6: 50.0, 0.7: 70.0, 0.8: 85.0}
    state = {"celsius": 40.0}
    seen: list[float] = []

    def celsius(_: int, level: float) -> float:
        state["celsius"] += (ends[level] - state["celsius"]) / inertia
        seen.append(state["celsius"])
        return state["celsius"]

    levels = run(Dial((0.6, 0.7, 0.8), (6, 7, 8), max_celsius=limit), lambda _, level: 0.1, 10_000, celsius)
    # what one hold at the full level adds above the limit, and the next one at the level below
    assert max(seen) <= limit + 2 * HOLD * (85 - 50) / inertia + 1
    assert switches(levels) <= len(levels) / (4 * HOLD)


def test_speed_and_heat_together() -> None:
    """Cool enough for the full level, but too slow there; then fast enough, but too hot."""
    dial = Dial((0.6, 0.8), (0.06, 0.08), target_tps=15, max_celsius=70)
    assert run(dial, lambda _, level: level / 10, 100, lambda *_: 50.0)[-1] == 0.6
    dial = Dial((0.6, 0.8), (0.06, 0.08), target_tps=5, max_celsius=70)
    assert run(dial, lambda _, level: level / 10, 100, lambda *_: 71.0)[-1] == 0.6
