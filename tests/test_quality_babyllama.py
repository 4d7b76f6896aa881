"""What compression costs babyllama361: perplexity, also by transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from command_line import run_json
from conversion import convert_model, multiplied_out, tensors
from test_architectures import llama_logits, put_factors_into, relative_error

torch = pytest.importorskip("torch", reason="the converter needs torch")

pytestmark = [pytest.mark.runtime, pytest.mark.slow]

WINDOW, EVAL_TOKENS, CALIBRATION_TOKENS = 256, 60_000, 120_000


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


def test_multiplied_out_matches_the_layers_it_replaces(babyllama: Callable[..., Path]) -> None:
    dense, weights = tensors(babyllama("svd", 1.0)), multiplied_out(babyllama("skipcat", 0.8))
    assert weights.keys() == {name for name in dense if ".attn_norm" not in name and ".ffn_norm" not in name
                              and name.startswith("blk.")}
    for name, W in weights.items():
        assert W.shape == dense[name].shape
        assert relative_error(W, dense[name]) < 0.6
