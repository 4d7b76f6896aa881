"""The sweep command: predictions from kept statistics, beside what convert then writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conversion import DEMO

from skipcat_edge.cli import main
from skipcat_edge.inspection import inspect

torch = pytest.importorskip("torch", reason="the converter needs torch")

pytestmark = pytest.mark.runtime

TEXT = DEMO / "calibration.txt"


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def stats(demo_dense_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's statistics, from its calibration text."""
    folder = tmp_path_factory.mktemp("statistics")
    result = convert(DEMO / "model", "-o", folder / "first.gguf", "--base", demo_dense_gguf, "--quant", "F16",
                     "--calibration", TEXT, "--calib-tokens", 3000, "--stats", folder / "demo.safetensors",
                     "--no-compensation")
    assert result.exit_code == 0, result.output
    return folder / "demo.safetensors"


def no_model(*_: object) -> None:
    raise AssertionError("the model was loaded")


def sweep(*arguments: object) -> list[dict[str, Any]]:
    result = CliRunner().invoke(main, ["sweep", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)["rows"]
    return rows


def test_a_sweep_runs_no_model_and_decomposes_each_layer_once(
    stats: Path, demo_dense_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skipcat_converter import calibrate, candidates

    calls: list[int] = []
    measured = candidates.squared_singular_values
    monkeypatch.setattr(calibrate, "load_source", no_model)
    monkeypatch.setattr(candidates, "squared_singular_values",
                        lambda *args: calls.append(1) or measured(*args))
    rows = sweep(DEMO / "model", "--base", demo_dense_gguf, "--stats", stats, "--quant", "F16")
    # 7 layers a block, and two groups that may share
    assert len(calls) == 6 * 9
    assert [row["ratio"] for row in rows] == [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    losses = [row["loss"] for row in rows]
    assert losses[0] == 0
    assert losses == sorted(losses)


def test_a_sweep_tells_what_convert_then_writes(stats: Path, demo_dense_gguf: Path, tmp_path: Path) -> None:
    from skipcat_edge import divergence
    from skipcat_edge.perplexity import text_chunks

    arguments = [DEMO / "model", "--base", demo_dense_gguf, "--stats", stats, "--quant", "Q4_0"]
    for row in sweep(*arguments, "--ratios", "1,0.8"):
        out = tmp_path / f"{row['ratio']}.gguf"
        result = convert(*arguments, "-o", out, "--ratio", row["ratio"])
        assert result.exit_code == 0, result.output
        found = inspect(out)
        assert found.totals.low_rank_bytes + found.totals.dense_layer_bytes == pytest.approx(
            row["nbytes"], rel=0.001)
        assert len(found.dense_layers) == row["dense"]
        models = divergence.open_pair(out, demo_dense_gguf, 256)
        chunks = text_chunks(models[0], TEXT.read_text("utf-8"), 256, 3000)
        kl = divergence.compare(*models, chunks)[1].kl
        # errors of different layers are taken for independent, which those of cut ranks are not
        assert 0.5 < kl / row["loss"] < (2 if row["ratio"] == 1 else 4)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--ratios", "0.9,many"], ["'0.9,many'", "commas"]),
    (["--ratios", "0.9,1.5"], ["ratio is 1.5"]),
    (["--quant", "Q9_9"], ["Q9_9"]),
    (["--stats", "missing.safetensors"], ["missing.safetensors does not exist", "convert --calibration"]),
])
def test_a_sweep_refuses(
    arguments: list[str], words: list[str], stats: Path, demo_dense_gguf: Path
) -> None:
    given = ["sweep", str(DEMO / "model"), "--base", str(demo_dense_gguf), "--stats", str(stats)]
    result = CliRunner().invoke(main, [*given, *arguments])
    assert result.exit_code == 2
    for word in words:
        assert word in result.output


def test_what_cannot_be_had_is_said(stats: Path, demo_dense_gguf: Path) -> None:
    given = ["sweep", str(DEMO / "model"), "--base", str(demo_dense_gguf), "--stats", str(stats)]
    result = CliRunner().invoke(main, [*given, "--quant", "Q4_K", "--ratios", "0.05"])
    assert result.exit_code == 0, result.output
    assert "Q4_K at 0.05 cannot be had" in result.output and "grid of 256" in result.output


def test_statistics_without_gradients_are_refused_at_once(
    demo_dense_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = tmp_path / "half.safetensors"
    result = convert(DEMO / "model", "-o", tmp_path / "out.gguf", "--base", demo_dense_gguf, "--stats", stats,
                     "--calibration", TEXT, "--calib-tokens", 500, "--no-grad", "--no-compensation")
    assert result.exit_code == 0, result.output
    from skipcat_converter import sweep as stage

    monkeypatch.setattr(stage, "open_base", no_model)
    result = CliRunner().invoke(main, ["sweep", str(DEMO / "model"), "--stats", str(stats)])
    assert result.exit_code == 2
    assert "without gradients" in result.output
