"""Stock llama.cpp, built from the same archive, beside the patched library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conversion import DEMO, convert_model

HERE = Path(__file__).resolve().parent
STOCK = HERE.parent / "build" / "native" / "stock" / "bin"

pytestmark = [
    pytest.mark.native,
    pytest.mark.runtime,
    pytest.mark.skipif(not STOCK.is_dir(), reason="no build/native/stock; run `make native-tools`"),
]


def run_worker(worker: str, *arguments: str | Path, stock: bool) -> str:
    env = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_LIB_PATH"}
    if stock:
        env["LLAMA_CPP_LIB_PATH"] = str(STOCK)
    command = [sys.executable, str(HERE / worker), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=["F16", "Q8_0", "Q4_0", "Q4_0 feedback", "Q4_K feedback"])
def dense(request: pytest.FixtureRequest, demo_dense_gguf: Path,
          tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense demo model, quantised by stock llama.cpp or by our error feedback."""
    if request.param == "F16":
        return demo_dense_gguf
    if request.param.endswith("feedback"):
        pytest.importorskip("torch", reason="the converter needs torch")
        out = tmp_path_factory.mktemp("ours") / "dense.gguf"
        convert_model(DEMO / "model", out, base=demo_dense_gguf, method="auto", ratio=1.0,
                      quant=request.param.split()[0], calibration=DEMO / "calibration.txt", calib_tokens=2000)
        return out
    out = tmp_path_factory.mktemp("stock") / f"{request.param}.gguf"
    command = [str(STOCK / "llama-quantize"), str(demo_dense_gguf), str(out), request.param, "1"]
    subprocess.run(command, capture_output=True, check=True)
    return out


def test_stock_names_the_architecture_it_refuses(demo_low_rank_gguf: Path) -> None:
    lines = run_worker("load_worker.py", "native", demo_low_rank_gguf, stock=True).splitlines()
    result = json.loads(lines[-1])
    assert not result["loaded"]
    assert "skipcat-llama" in result["message"]


def test_logits_of_dense_files_are_bit_identical(dense: Path, tmp_path: Path) -> None:
    logits = {}
    for name in ("stock", "patched"):
        out = tmp_path / f"{name}.npy"
        assert run_worker("logits_worker.py", dense, out, stock=name == "stock").split() == [name]
        logits[name] = np.load(out)
    assert np.isfinite(logits["stock"]).all()
    assert logits["stock"].std() > 0.1
    np.testing.assert_array_equal(logits["patched"].view(np.uint32), logits["stock"].view(np.uint32))
