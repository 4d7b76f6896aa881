"""The benchmark of rank levels: its ratios, and that it runs."""

from __future__ import annotations

from pathlib import Path

import bench_levels as bench
import pytest
from bench_levels import Subject, Turn
from level_models import LEVELS, SMALL
from rich.table import Table

from skipcat_edge.synth import write
from skipcat_edge.synth_plan import plan
from skipcat_edge.weight_types import weight_type


def subject(level: float, nbytes: int, *turns: tuple[float, float, float]) -> Subject:
    """Turns of four tokens: seconds of the call, of the first token, and of each other one."""
    return Subject(level, nbytes, [Turn(call, (first, rest, rest, rest), 2.0) for call, first, rest in turns])


def column(table: Table, index: int) -> list[str]:
    return [str(cell) for cell in table.columns[index].cells]


def test_ratios_are_medians_over_the_rounds_of_what_took_place_in_the_same_one() -> None:
    fast = subject(0.6, 100, (0, 1, 1), (0, 2, 2), (0, 4, 4))
    slow = subject(0.8, 150, (0, 1, 1), (0, 3, 3), (0, 8, 8))
    assert bench.speedup(fast, slow, bench.decode_s) == 1.5
    table = bench.speed_table([fast, slow], 128)
    assert column(table, 5) == ["1.500", ""]
    assert column(table, 7) == ["1.000", ""] and column(table, 8) == ["met", ""]
    assert column(bench.own_table([slow], [fast]), 3) == ["1.500"]
    assert column(bench.own_table([slow], [fast]), 5) == ["1.000"]


def test_a_switch_costs_its_call_and_what_the_first_token_takes_longer() -> None:
    low, full = subject(0.6, 1, (0.25, 2.5, 2)), subject(0.8, 1, (1, 4, 2))
    table = bench.switch_table([low, full], [low, low])
    assert column(table, 4) == ["0.375", "1.500"] and column(table, 6) == ["met", "not met"]


def test_a_busy_machine_is_told() -> None:
    assert "not idle" in bench.crowd(0.2, False) and "20.0%" in bench.crowd(0.2, True)
    assert "not idle" not in bench.crowd(0.01, False)


@pytest.mark.runtime
def test_every_level_and_file_has_its_turns(tmp_path: Path) -> None:
    type_ = weight_type("F32")  # small as the model is, it has ranks for all levels
    files = [tmp_path / f"{name}.gguf" for name in ("levels", *map(str, LEVELS))]
    for file, levels in zip(files, (LEVELS, *((level,) for level in LEVELS)), strict=True):
        write(plan(SMALL, type_, levels[-1], 0, levels if len(levels) > 1 else ()), file, None)
    subjects, own = bench.measure(files[0], files[1:], 2, 1, 3, 4, "small")
    assert [each.level for each in subjects] == [each.level for each in own] == [*LEVELS]
    assert all(len(each.turns) == 2 and len(each.turns[0].tokens) == 3 for each in (*subjects, *own))
    assert subjects[0].nbytes < subjects[1].nbytes < subjects[2].nbytes
