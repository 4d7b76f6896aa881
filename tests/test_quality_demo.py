"""What rounding to eight and four bits costs the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import run_json
from conversion import DEMO, convert_model

pytest.importorskip("torch", reason="the converter needs torch")

pytestmark = [pytest.mark.runtime, pytest.mark.slow]


def test_demo_at_eight_and_four_bits(shared: Path, demo_dense_gguf: Path, tmp_path: Path) -> None:
    def perplexity(ratio: float, quant: str, method: str = "auto", **options: Any) -> float:
        out = tmp_path / "out.gguf"
        convert_model(DEMO / "model", out, base=demo_dense_gguf, method=method, ratio=ratio, quant=quant,
                      force=True, **options)
        answer = run_json("eval", out, "--text", shared / "text" / "tinystories_eval.txt",
                          "--max-tokens", 20_000)
        return float(answer["ppl"])

    text = {"calibration": shared / "text" / "tinystories_train.txt", "calib_tokens": 40_000,
            "stats": tmp_path / "statistics"}
    plain = perplexity(1.0, "Q4_0")
    low_rank = perplexity(0.9, "Q4_0", **text)
    assert low_rank <= 1.02 * plain
    assert low_rank < perplexity(0.9, "Q4_0", "skipcat", **text)
    at_f16 = perplexity(0.8, "F16", grid=32, **text)
    assert perplexity(0.8, "Q8_0", **text) == pytest.approx(at_f16, rel=0.002)
