"""Rank levels without the runtime: schedules, choices, and what a file says of its levels."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run, run_json
from gguf import GGUFReader
from level_files import LEVELS, LOSSES, write_levels

from skipcat_edge import levels
from skipcat_edge.errors import UserError
from skipcat_edge.inspection import inspect
from skipcat_edge.level_control import Auto, Control, new_control
from skipcat_edge.levels import Schedule, get_level, parse_level, parse_schedule, set_level
from skipcat_edge.traffic import weight_bytes_per_token


@pytest.fixture(scope="module")
def leveled(tmp_path_factory: pytest.TempPathFactory, demo_dense_gguf: Path) -> Path:
    return write_levels(demo_dense_gguf, tmp_path_factory.mktemp("levels") / "levels.gguf")


class Library:
    """The C functions, for one file."""

    def __init__(self, *ratios: float) -> None:
        self.ratios, self.place, self.calls = ratios, len(ratios) - 1, 0

    def skipcat_n_levels(self, model: Any) -> int:
        return len(self.ratios)

    def skipcat_level_ratio(self, model: Any, level: int) -> float:
        from ctypes import c_float

        return c_float(self.ratios[level]).value if level < len(self.ratios) else -1

    def skipcat_get_level(self, context: Any) -> int:
        return self.place

    def skipcat_set_level(self, context: Any, level: int) -> int:
        assert 0 <= level < len(self.ratios)
        self.place, self.calls = level, self.calls + 1
        return 0


class Model:
    """What is asked of a llama_cpp.Llama."""

    model, ctx, model_path, _requires_eval = 1, 2, "small.gguf", False


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library(0.6, 0.7, 0.8)
    monkeypatch.setattr(levels, "_library", lambda: found)
    return found


def test_levels_are_named_by_their_ratio(library: Library) -> None:
    model: Any = Model()
    assert levels.levels(model) == (0.6, 0.7, 0.8) and get_level(model) == 0.8
    set_level(model, 0.6)
    assert (library.place, get_level(model), model._requires_eval) == (0, 0.6, True)
    set_level(model, 0.6)
    assert library.calls == 1
    with pytest.raises(UserError) as error:
        set_level(model, 0.65)
    assert error.value.message == "small.gguf has no level 0.65; its levels are 0.6, 0.7 and 0.8."
    assert get_level(model) == 0.6


@pytest.mark.parametrize("level", [0, -1, 1.5, 1e300, float("nan")])
def test_numbers_that_are_no_level(level: float, library: Library) -> None:
    with pytest.raises(UserError, match="has no level"):
        set_level(Model(), level)


def test_only_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "_library", lambda: Library(0.8))
    set_level(Model(), 0.8)
    with pytest.raises(UserError, match=r"its only level is 0\.8\."):
        set_level(Model(), 0.6)


def test_a_runtime_without_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        class llama_cpp:  # noqa: N801
            class _lib:  # noqa: N801
                pass

    monkeypatch.setattr("skipcat_edge.session.import_llama_cpp", lambda: Package)
    levels._library.cache_clear()
    with pytest.raises(UserError, match="has no levels; run"):
        levels.levels(Model())


def test_schedule() -> None:
    schedule = parse_schedule("0:0.8, 32:0.7,128:0.6")
    assert schedule == Schedule(((0, 0.8), (32, 0.7), (128, 0.6)))
    assert [schedule.at(index) for index in (0, 31, 32, 127, 128, 10**6)] == [0.8, 0.8, 0.7, 0.7, 0.6, 0.6]
    assert parse_schedule(str(schedule)) == schedule


@pytest.mark.parametrize(("text", "part"), [
    ("", "write it like"), ("0.8", "write it like"), ("0:0.8,", "write it like"), ("0:0.8;9:0.6", "write it"),
    ("-1:0.8", "write it like"), ("0:x", "write it like"), ("0:0.8:3", "write it like"),
    ("1:0.8", "begin it with 0"), ("0:0.8,5:0.7,5:0.6", "let the tokens rise"),
    ("0:0.8,5:0.7,4:0.6", "let the tokens rise"), ("0:0", "not a level"), ("0:1.2", "not a level"),
    ("0:..", "not a level"),
])  # fmt: skip
def test_schedules_that_are_none(text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        parse_schedule(text)


@pytest.mark.parametrize("text", ["", "x", "0", "0.0", "1.1", "-0.5", "nan", "1e-1", "0,8", ".", "0.8 "])
def test_texts_that_are_no_level(text: str) -> None:
    with pytest.raises(UserError, match="not a level"):
        parse_level(text)


@pytest.mark.parametrize(("options", "part"), [
    (["--rank-level", "0.7"], "levels.gguf has no level 0.7; its levels are 0.6 and 0.8."),
    (["--progressive", "0:0.8,4:0.5"], "levels.gguf has no level 0.5; its levels are 0.6 and 0.8."),
    (["--rank-level", "fast"], "'fast' is not a level"),
    (["--rank-level", "auto"], "nothing to aim at"),
    (["--target-tps", "5"], "are of --rank-level auto"),
    (["--rank-level", "0.6", "--max-temp", "70"], "are of --rank-level auto"),
    (["--rank-level", "0.6", "--progressive", "0:0.6"], "leave out --rank-level"),
    (["--progressive", "0:0.6", "--level", "auto", "--target-tps", "9"], "leave out --rank-level"),
    (["--rank-level", "auto", "--max-temp", "60"], "shows no temperature"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_refused(command: str, options: list[str], part: str, leveled: Path,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipcat_edge.level_control.this_machines_zones", list)
    result = run(command, leveled, *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert part in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [
    ["bench", "FILE", "--rank-level", "0.7"], ["bench", "FILE", "--progressive", "0:0.7"],
    ["bench", "FILE", "--progressive", "0:0.6", "--rank-level", "all"],
    ["eval", "FILE", "--text", "x", "--rank-level", "0.7"], ["serve", "FILE", "--rank-level", "0.7"],
    ["bench", "FILE", "--adb", "--rank-level", "0.6"],
])  # fmt: skip
def test_other_commands_refuse_too(arguments: list[Any], leveled: Path) -> None:
    result = run(*[leveled if word == "FILE" else word for word in arguments])
    assert result.exit_code == 2 and result.stdout == ""
    assert "level" in result.stderr and result.stderr.count("\n") == 1


def test_a_file_without_levels_has_its_own_ratio(demo_low_rank_gguf: Path, demo_dense_gguf: Path) -> None:
    refused = run("generate", demo_low_rank_gguf, "--rank-level", "0.6")
    assert refused.exit_code == 2 and "has no level 0.6; its only level is 0.8." in refused.stderr
    assert levels.file_levels(demo_low_rank_gguf) == (0.8,) and levels.file_levels(demo_dense_gguf) == (1.0,)


def replay(control: Control, count: int) -> Iterator[int]:
    return control.over(iter(range(count)))


def test_control_follows_a_schedule_and_reports(library: Library) -> None:
    control = new_control(Model(), parse_schedule("0:0.7,3:0.6"), (0.6, 0.7, 0.8))
    places = [library.place for _ in replay(control, 6)]
    # when a token has come, what computed it is still set; the first one is the prompt's
    assert places == [2, 1, 1, 0, 0, 0]
    assert control.report().startswith("level 0.8 for 1 token, 0.7 for 2, 0.6 for 3; 2 switches; ")
    assert [library.place for _ in replay(control, 1)] == [2]
    assert control.report() == "level 0.8 for 1 token; 0 switches"


def test_control_of_one_level(library: Library) -> None:
    control = new_control(Model(), 0.6, (0.6, 0.7, 0.8))
    assert [library.place for _ in replay(control, 3)] == [0, 0, 0]
    assert control.report().startswith("level 0.6 for 3 tokens; 0 switches; ")


def test_control_by_the_dial(library: Library, leveled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.ratios, library.place = LEVELS, 1
    monkeypatch.setattr(Model, "model_path", str(leveled))
    control = new_control(Model(), Auto(target_tps=1e9), LEVELS)
    assert [library.place for _ in replay(control, 40)] == [1] * 17 + [0] * 23
    # prompts are at the full level, and the dial stands where it stood
    assert [library.place for _ in replay(control, 3)] == [1, 0, 0]


def test_the_dial_reads_the_thermometer(library: Library, leveled: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    library.ratios, library.place = LEVELS, 1
    monkeypatch.setattr(Model, "model_path", str(leveled))
    monkeypatch.setattr("skipcat_edge.level_control.this_machines_zones", lambda: [("cpu-thermal", "71000")])
    for limit, last in ((70, 0), (72, 1)):
        control = new_control(Model(), Auto(max_celsius=limit), LEVELS)
        assert [library.place for _ in replay(control, 40)][-1] == last


def names_at(reader: GGUFReader, level: int) -> set[str]:
    """By what `level_files` wrote."""
    other = ".1.1" if level == 0 else ".0.0"
    dense = "attn_output.weight" if level == 0 else "attn_output.weight.never"
    return {tensor.name for tensor in reader.tensors
            if other not in tensor.name and not tensor.name.endswith(dense)}


@pytest.mark.parametrize("level", [0, 1])
def test_only_what_a_level_reads_is_counted(level: int, leveled: Path) -> None:
    reader = GGUFReader(leveled)
    tables = {"token_embd.weight"} if any(t.name == "output.weight" for t in reader.tensors) else set()
    expected = sum(int(t.n_bytes) for t in reader.tensors if t.name in names_at(reader, level) - tables)
    assert weight_bytes_per_token(leveled, level) == expected
    if level == 1:
        assert weight_bytes_per_token(leveled) == expected


def test_inspect(leveled: Path, demo_dense_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    found, dense = run_json("inspect", leveled), run_json("inspect", demo_dense_gguf)
    assert [level["ratio"] for level in found["levels"]] == [*LEVELS]
    assert [level["loss"] for level in found["levels"]] == [*LOSSES]
    nbytes = [weight_bytes_per_token(leveled, level) for level in (0, 1)]
    assert [level["bytes_per_token"] for level in found["levels"]] == nbytes
    assert [level["share"] for level in found["levels"]] == [nbytes[0] / nbytes[1], 1.0]
    totals = found["totals"]
    assert totals["dense_parameters"] == dense["totals"]["dense_parameters"]
    stored = {(part["layer"], part.get("owner", part.get("name"))): part["levels"]
              for part in found["owners"] + found["dense_layers"] if part.get("owner") != "attn_in"}
    assert stored[0, "ffn_down"] == [0.6, 0.8]
    assert [owner["levels"] for owner in found["owners"] if owner["owner"] == "ffn_up"][:2] == [[0.6], [0.8]]
    assert {tuple(layer["levels"]) for layer in found["dense_layers"]} == {(0.8,)}
    reader = GGUFReader(leveled)
    for level, told in enumerate(found["levels"]):
        used = sum(int(t.n_elements) for t in reader.tensors if t.name in names_at(reader, level)
                   and "mask" not in t.name and t.name.startswith("blk.") and "norm" not in t.name)
        assert told["kept"] == pytest.approx(used / totals["dense_parameters"])
    assert "levels" not in json.dumps(dense)


def test_inspect_table(leveled: Path) -> None:
    lines = run("inspect", leveled).stdout.splitlines()
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows if row and row[0] in ("0.6", "0.8")] == ["0.6", "0.8"]
    assert [row[2] for row in rows if row[:2] == ["0", "ffn_gate"]] == ["0.6", "0.8"]
    assert [row[2] for row in rows if row[:2] == ["0", "ffn_down"]] == ["all"]


def test_the_picture_shows_the_full_level(leveled: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from skipcat_edge.rank_plot import cells

    found = [cell for cell in cells(inspect(leveled)) if cell.block == 0]
    assert [(cell.members, cell.rank) for cell in found] == [
        (("attn_q", "attn_k", "attn_v"), 192), (("attn_output",), None), (("ffn_gate",), 192),
        (("ffn_up",), 192), (("ffn_down",), 192),
    ]
    assert found[0].kept == pytest.approx(192 * (512 + 256) / (512 * 256))
    assert run("inspect", leveled, "--plot", tmp_path / "ranks.png").exit_code == 0


def test_the_card_names_the_levels(leveled: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra `push` is not installed")
    from skipcat_edge.card import new_card
    from skipcat_edge.card_source import source_of_gguf

    card = new_card(leveled, source_of_gguf(leveled))
    levels = ", ".join(f"{level.ratio:g}" for level in inspect(leveled).levels)
    assert f"at several levels, {levels}: large matrices" in card
    assert "| levels | 0.6 (" in card and "--rank-level 0.6" in card
