"""From Python: the functions of the package return what the commands print."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from command_line import run_json

import skipcat_edge
from skipcat_edge.errors import UserError

DEMO = Path(__file__).resolve().parent.parent / "converter" / "demo"


def test_the_package_loads_nothing_before_it_is_asked() -> None:
    code = ("import sys, skipcat_edge; assert callable(skipcat_edge.inspect); "
            "sys.exit(bool({'torch', 'llama_cpp', 'rich', 'transformers'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names() -> None:
    assert all(callable(getattr(skipcat_edge, name)) for name in skipcat_edge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        skipcat_edge.compress  # noqa: B018
    # a module of the same name would replace the function where it is imported
    folder = Path(skipcat_edge.__file__).parent
    assert not [name for name in skipcat_edge.__all__ if (folder / f"{name}.py").exists()]


def test_inspect(demo_low_rank_gguf: Path) -> None:
    found = skipcat_edge.inspect(str(demo_low_rank_gguf))
    assert is_dataclass(found) and found.to_json() == run_json("inspect", demo_low_rank_gguf)


@pytest.mark.runtime
def test_bench(demo_dense_gguf: Path, demo_low_rank_gguf: Path) -> None:
    results = skipcat_edge.bench([demo_dense_gguf, demo_low_rank_gguf], prompt_tokens=16, gen_tokens=4,
                                 repetitions=1)
    assert [result.file for result in results] == [str(demo_dense_gguf), str(demo_low_rank_gguf)]
    assert all(is_dataclass(result) and result.decode_tps is not None for result in results)


@pytest.mark.runtime
def test_evaluate(demo_dense_gguf: Path, demo_low_rank_gguf: Path) -> None:
    text = DEMO / "calibration.txt"
    found = skipcat_edge.evaluate(str(demo_low_rank_gguf), text.read_text("utf-8"), max_tokens=512, threads=1,
                                  reference=str(demo_dense_gguf))
    told = run_json("eval", demo_low_rank_gguf, "--text", text, "--max-tokens", 512, "--threads", 1,
                    "--reference", demo_dense_gguf)
    assert is_dataclass(found) and found.to_json() == told


def test_plan() -> None:
    found = skipcat_edge.plan("llama-3.2-1b", device="rpi5")
    plain = json.loads(json.dumps(found.to_json()))
    assert is_dataclass(found) and plain == run_json("plan", "llama-3.2-1b", "--device", "rpi5")


@pytest.mark.runtime
@pytest.mark.slow
def test_convert(tmp_path: Path, demo_dense_gguf: Path) -> None:
    pytest.importorskip("torch", reason="the converter needs torch")
    out = tmp_path / "out.gguf"
    result = skipcat_edge.convert(DEMO / "model", str(out), ratio=0.7, quant="F16", method="skipcat",
                                  base=demo_dense_gguf, calibration=str(DEMO / "calibration.txt"),
                                  calib_tokens=1024, gradients=False)
    assert is_dataclass(result) and result.output_bytes == out.stat().st_size
    assert skipcat_edge.inspect(out).totals.ratio == pytest.approx(result.kept)
    with pytest.raises(UserError, match="no method qr"):
        skipcat_edge.convert(DEMO / "model", tmp_path / "other.gguf", method="qr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.md"]
    with pytest.raises(UserError, match="no rounding exact"):
        skipcat_edge.convert(DEMO / "model", tmp_path / "other.gguf", rounding="exact",
                             calibration=DEMO / "calibration.txt")
