"""KL divergence and top-1 agreement of `eval --reference`, against NumPy, SciPy and the raw library."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command_line
import numpy as np
import pytest
from click.testing import Result
from gguf import GGUFWriter, PoolingType
from hypothesis import given
from hypothesis import strategies as st
from vocabulary import write_vocabulary

from skipcat_edge import divergence, reference
from skipcat_edge.divergence import compare, compare_rows, open_pair
from skipcat_edge.errors import UserError
from skipcat_edge.model_table import ModelDimensions
from skipcat_edge.perplexity import perplexity, text_chunks
from skipcat_edge.reference import LiveReference, StoredReference, stored_reference
from skipcat_edge.synth import write
from skipcat_edge.synth_plan import plan
from skipcat_edge.weight_types import weight_type

special = pytest.importorskip("scipy.special", reason="the expected values come from SciPy")

STORY = "Once upon a time there was a little girl named Lily. She had a red ball and a small dog. "
WINDOW = 24
MODEL = ModelDimensions(
    name="tiny", architecture="llama", vocabulary="tiny", n_vocab=320, n_embd=96, n_layer=2, n_head=4,
    n_head_kv=2, head_dim=32, n_ff=160, context_length=256, rope_theta=10000.0, norm_eps=1e-6,
)  # fmt: skip
WORDS = tuple(f"▁w{i}" for i in range(61))


def run(*arguments: str | Path) -> Result:
    return command_line.run("eval", *arguments)


def run_json(*arguments: str | Path) -> Any:
    return command_line.run_json("eval", *arguments, "--threads", "1")


def write_model(folder: Path, name: str, quant: str = "F16", ratio: float = 1.0, seed: int = 0,
                words: Sequence[str] = WORDS, context: int = 256) -> Path:
    """A random model of `MODEL`'s dimensions whose vocabulary is every byte and `words`.

    Models of one seed and ratio differ only in how the same weights are rounded.
    """
    dimensions = replace(MODEL, n_vocab=write_vocabulary(folder / name, words), context_length=context)
    out = folder / f"{name}.gguf"
    write(plan(dimensions, weight_type(quant), ratio, seed), out, folder / name)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense F16 model, the same one at 4 bits, and low-rank ones."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "dense": write_model(folder, "dense"),
        "rounded": write_model(folder, "rounded", "Q4_0"),
        "low rank": write_model(folder, "low-rank", ratio=0.8),
        "low rank, rounded": write_model(folder, "low-rank-rounded", "Q8_0", ratio=0.8),
    }


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY * 2, encoding="utf-8")
    return path


def logits_of_windows(path: Path, text: str, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [tokens, vocabulary] and the text's tokens [tokens], by llama_cpp's own `eval`."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=256, n_batch=window, n_threads=1, n_threads_batch=1, flash_attn=True,
                  logits_all=True, verbose=False)
    tokens = llama.tokenize(text.encode(), add_bos=False, special=False)
    size = window - 1
    logits, targets = [], []
    for first in range(0, len(tokens) - size + 1, size):
        chunk = tokens[first : first + size]
        llama.reset()
        llama.eval([llama.token_bos(), *chunk[:-1]])
        logits.append(np.array(llama.scores[: len(chunk)], np.float64))
        targets.append(chunk)
    return np.concatenate(logits), np.concatenate(targets)


class Library:
    """Stands in for the decoding: `all_logits` gives what was prepared for a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **logits: np.ndarray) -> None:
        self.calls: list[tuple[str, list[int]]] = []

        def all_logits(llama: str, tokens: list[int]) -> np.ndarray:
            self.calls.append((llama, list(tokens)))
            return logits[llama][: len(tokens)]

        monkeypatch.setattr(reference, "all_logits", all_logits)
        monkeypatch.setattr(divergence, "start_token", lambda llama: {"ours": 7, "theirs": 8}[llama])


values = st.floats(-80, 80, width=32)


@given(
    st.integers(2, 9).flatmap(
        lambda n: st.lists(st.tuples(*[st.lists(values, min_size=n, max_size=n)] * 2), min_size=1,
                           max_size=70)
    ),
    st.integers(0, 2**32 - 1),
)
def test_rows_are_those_of_scipy(rows: list[tuple[list[float], list[float]]], seed: int) -> None:
    ours, theirs = (np.array(side, np.float32) for side in zip(*rows, strict=True))
    targets = np.random.default_rng(seed).integers(0, ours.shape[1], len(rows))
    found = compare_rows(ours, theirs, targets)
    p, q = (special.softmax(side.astype(np.float64), axis=1) for side in (theirs, ours))
    assert found.kl == pytest.approx(special.kl_div(p, q).sum(axis=1), rel=1e-9, abs=1e-12)
    assert (found.kl >= 0).all()
    assert found.same_top.tolist() == [max(range(len(a)), key=a.__getitem__)
                                       == max(range(len(b)), key=b.__getitem__) for a, b in rows]
    losses = -special.log_softmax(ours.astype(np.float64), axis=1)[np.arange(len(rows)), targets]
    assert found.losses == pytest.approx(losses, rel=1e-9, abs=1e-12)


@given(st.lists(st.lists(values, min_size=5, max_size=5), min_size=1, max_size=40), values)
def test_a_constant_on_all_logits_changes_nothing(rows: list[list[float]], constant: float) -> None:
    logits = np.array(rows, np.float64)
    found = compare_rows(logits + constant, logits, np.zeros(len(rows), int))
    assert found.kl == pytest.approx(0, abs=1e-12)


def test_the_direction_is_from_the_reference() -> None:
    """KL(p || q) of p = (1/2, 1/2) and q = (1/4, 3/4) by hand; the other way round it is 0.1308."""
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    found = compare_rows(q, p, np.array([0]))
    assert found.kl == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3)])
    assert found.losses == pytest.approx([np.log(4)])


def test_masked_tokens_cost_nothing() -> None:
    """Some models give logits of -FLT_MAX to tokens that may not be written."""
    lowest = np.finfo(np.float32).min
    ours, theirs = np.array([[1.0, 2.0, lowest]]), np.array([[2.0, 1.0, lowest]])
    with_mask = compare_rows(ours.astype(np.float32), theirs.astype(np.float32), np.array([0]))
    without = compare_rows(ours[:, :2], theirs[:, :2], np.array([0]))
    assert astuple(with_mask) == astuple(without)


def test_means_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    ours, theirs = draw.normal(size=(2, 3, 5)).astype(np.float32)
    library = Library(monkeypatch, ours=ours, theirs=theirs)
    done: list[int] = []
    ppl, found = compare("ours", LiveReference("theirs"), [[1, 2, 3], [4, 0]], lambda: done.append(1))

    assert library.calls == [(name, tokens) for tokens in ([7, 1, 2], [7, 4]) for name in ("ours", "theirs")]
    assert len(done) == 2
    rows = [0, 1, 2, 0, 1]
    p, q = (special.softmax(side.astype(np.float64)[rows], axis=1) for side in (theirs, ours))
    kl = special.kl_div(p, q).sum(axis=1)
    same = (p.argmax(axis=1) == q.argmax(axis=1)).astype(float)
    assert 0 < same.mean() < 1
    root = np.sqrt(5)
    assert (found.kl, found.kl_se) == pytest.approx((kl.mean(), kl.std(ddof=1) / root))
    assert (found.top1, found.top1_se) == pytest.approx((same.mean(), same.std(ddof=1) / root))
    losses = -np.log(q[np.arange(5), [1, 2, 3, 4, 0]])
    assert (ppl.ppl, ppl.tokens) == (pytest.approx(np.exp(losses.mean())), 5)
    assert ppl.ppl_se == pytest.approx(np.exp(losses.mean()) * losses.std(ddof=1) / root)


@pytest.mark.parametrize("broken", ["ours", "theirs"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(broken: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = {name: np.zeros((2, 5), np.float32) for name in ("ours", "theirs")}
    logits[broken][1, 3] = value
    Library(monkeypatch, **logits)
    which = {"ours": "model", "theirs": "reference"}[broken]
    with pytest.raises(UserError, match=f"The {which}'s logits are not finite"):
        compare("ours", LiveReference("theirs"), [[1, 2]])


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("name", "reference"),
    [("rounded", "dense"), ("low rank", "dense"), ("low rank, rounded", "low rank"), ("dense", "rounded")],
)
def test_eval_is_that_of_numpy(name: str, reference: str, models: dict[str, Path], story: Path) -> None:
    path, dense = models[name], models[reference]
    found = run_json(path, "--text", story, "--window", str(WINDOW), "--reference", dense)

    (ours, targets), (theirs, _) = (logits_of_windows(each, STORY * 2, WINDOW) for each in (path, dense))
    log_q, log_p = (rows - np.log(np.exp(rows - rows.max()).sum(axis=1, keepdims=True)) - rows.max()
                    for rows in (ours, theirs))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    same = (ours.argmax(axis=1) == theirs.argmax(axis=1)).astype(float)
    count = len(targets)
    losses = -log_q[np.arange(count), targets]
    expected = {
        "ppl": np.exp(losses.mean()),
        "ppl_se": np.exp(losses.mean()) * losses.std(ddof=1) / np.sqrt(count),
        "tokens": count,
        "kl": kl.mean(), "kl_se": kl.std(ddof=1) / np.sqrt(count),
        "top1": same.mean(), "top1_se": same.std(ddof=1) / np.sqrt(count),
    }  # fmt: skip
    assert count >= 5 * (WINDOW - 1)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4)
    assert found["kl"] > 1e-4


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["dense", "low rank"])
def test_a_file_does_not_differ_from_itself(name: str, models: dict[str, Path], story: Path) -> None:
    found = run_json(models[name], "--text", story, "--window", str(WINDOW), "--reference", models[name])
    assert {key: found[key] for key in ("kl", "kl_se", "top1", "top1_se")} == {
        "kl": 0, "kl_se": 0, "top1": 1, "top1_se": 0
    }  # fmt: skip


@pytest.mark.runtime
def test_the_perplexity_is_the_one_without_a_reference(models: dict[str, Path]) -> None:
    model, dense = open_pair(models["rounded"], models["dense"], WINDOW, threads=1)
    chunks = text_chunks(model, STORY, WINDOW)
    assert compare(model, dense, chunks)[0] == perplexity(model, chunks)


class Loaded:
    """Stands in for a reference: its logits are its tokens; `closed` counts."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKIPCAT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "logits"


def store(file: Path, windows: list[list[int]], opened: list[Loaded]) -> StoredReference:
    def open_() -> Loaded:
        opened.append(Loaded())
        return opened[-1]

    return stored_reference(file, windows, 3, open_)


@pytest.mark.runtime
def test_logits_are_kept_for_the_same_file_and_tokens(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "all_logits",
                        lambda llama, tokens: np.float32(tokens)[:, None] + np.float32([0, 0.25, 0.5]))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"first")
    windows, opened = [[1, 5, 6], [1, 7], [1, 5]], []
    for _ in range(2):
        found = store(file, windows, opened)
        np.testing.assert_array_equal(found([1, 7]), [[1, 1.25, 1.5], [7, 7.25, 7.5]])
        np.testing.assert_array_equal(found([1, 5, 6])[:, 0], [1, 5, 6])
    assert [llama.closed for llama in opened] == [1]
    store(file, windows[:2], opened)
    file.write_bytes(b"other")
    os.utime(file, ns=(0, 0))
    old = max(cache.iterdir(), key=lambda path: path.stat().st_mtime)
    os.utime(old, (0, 0))
    store(file, windows, opened)
    assert [llama.closed for llama in opened] == [1, 1, 1]
    assert not old.exists() and len(list(cache.iterdir())) == 2


@pytest.mark.runtime
@pytest.mark.parametrize("damage", ["a byte", "the end", "a sum"])
def test_damaged_logits_are_computed_again(cache: Path, tmp_path: Path, damage: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "all_logits", lambda llama, tokens: np.ones((len(tokens), 3), np.float32))
    file, opened = tmp_path / "model.gguf", []
    file.touch()
    store(file, [[1, 5], [1]], opened)
    (kept,) = cache.iterdir()
    content = bytearray(kept.read_bytes())
    if damage == "the end":
        del content[-12:]
    else:
        content[14 if damage == "a byte" else -1] ^= 1
    kept.write_bytes(content)
    found = store(file, [[1, 5], [1]], opened)
    assert (found([1, 5]) == 1).all() and (found([1]) == 1).all()
    assert len(opened) == 2 and list(cache.iterdir()) == [kept]


@pytest.mark.runtime
def test_a_cache_that_takes_nothing_is_one_sentence(cache: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    file, opened = tmp_path / "model.gguf", []
    file.touch()
    cache.parent.write_text("no folder")
    with pytest.raises(UserError, match=r"cannot be kept in .*; use --no-cache"):
        store(file, [[1]], opened)
    cache.parent.unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reference, "all_logits", full)
    with pytest.raises(UserError, match="No space left on device"):
        store(file, [[1]], opened)
    assert not list(cache.iterdir()) and opened[0].closed == 1


@pytest.mark.runtime
def test_nothing_half_written_is_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, opened = tmp_path / "model.gguf", []
    file.touch()
    answers = iter([np.zeros((1, 3), np.float32), np.full((1, 3), np.nan, np.float32)])
    monkeypatch.setattr(reference, "all_logits", lambda llama, tokens: next(answers))
    with pytest.raises(UserError, match="reference's logits are not finite"):
        store(file, [[1], [2]], opened)
    assert list(cache.iterdir()) == [] and opened[0].closed == 1
    monkeypatch.setattr(reference.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="--no-cache"):
        store(file, [[1], [2]], opened)
    assert len(opened) == 1


@pytest.mark.runtime
def test_eval_is_the_same_with_and_without_a_cache(
    cache: Path, models: dict[str, Path], story: Path
) -> None:
    arguments = (models["rounded"], "--text", story, "--window", str(WINDOW), "--reference", models["dense"])
    live = run_json(*arguments, "--no-cache")
    assert not cache.exists()
    first = run_json(*arguments)
    assert len(list(cache.glob("*.f32"))) == 1
    assert live == first == run_json(*arguments)


@pytest.mark.runtime
def test_eval_sentences(models: dict[str, Path], story: Path) -> None:
    result = run(models["rounded"], "--text", story, "--window", str(WINDOW), "--threads", "1",
                 "--reference", models["dense"])
    assert result.exit_code == 0, result.output
    found = run_json(models["rounded"], "--text", story, "--window", str(WINDOW),
                     "--reference", models["dense"])
    first, second, third = result.stdout.splitlines()
    assert first.startswith(f"perplexity {found['ppl']:.4f} ± {found['ppl_se']:.4f} over ")
    assert second == (f"KL divergence from {models['dense']}: {found['kl']:.6f} ± {found['kl_se']:.6f} "
                      "nats per token")
    assert third == f"top-1 agreement with it: {100 * found['top1']:.2f} ± {100 * found['top1_se']:.2f} %"


def encoder(folder: Path) -> Path:
    path = folder / "encoder.gguf"
    writer = GGUFWriter(path, "bert")
    writer.add_uint32("bert.pooling_type", PoolingType.MEAN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


REFERENCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "embedding model": (encoder, "is an embedding model, but"),
    "larger vocabulary": (lambda folder: write_model(folder, "larger", words=[*WORDS, "▁more"]),
                          "has a vocabulary of 320 tokens, but"),
    "other pieces": (lambda folder: write_model(folder, "other", words=["▁W0", *WORDS[1:]]),
                     "Token 259 is '▁w0' in"),
    "short context": (lambda folder: write_model(folder, "short", context=16), "use --window 16 or less"),
    "no file": (lambda folder: folder / "missing.gguf", "no such file"),
}


@pytest.mark.runtime
@pytest.mark.parametrize("kind", REFERENCES)
def test_references_that_are_refused(kind: str, models: dict[str, Path], story: Path, tmp_path: Path) -> None:
    make, part = REFERENCES[kind]
    reference = make(tmp_path)
    result = run(models["dense"], "--text", story, "--window", str(WINDOW), "--reference", reference)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert part in result.stderr
    assert str(reference) in result.stderr


@pytest.mark.runtime
def test_a_reference_that_predicts_tokens_has_no_embedding(models: dict[str, Path], story: Path,
                                                           tmp_path: Path) -> None:
    result = run(encoder(tmp_path), "--text", story, "--reference", models["dense"])
    assert result.exit_code == 2
    assert f"{models['dense']} is not an embedding model" in result.stderr


@pytest.mark.runtime
def test_samples_are_what_generate_writes(
    demo_dense_gguf: Path, demo_low_rank_gguf: Path, shared: Path
) -> None:
    story = shared / "text" / "tinystories_eval.txt"
    found = run_json(demo_low_rank_gguf, "--text", story, "--max-tokens", "2000", "--samples", "2",
                     "--sample-tokens", "12", "--reference", demo_dense_gguf)
    first, second = found["samples"]
    text = " ".join(story.read_text("utf-8").split())
    assert text.startswith(" ".join(first["prompt"].split())) and first["prompt"] != second["prompt"]
    for path, written in ((demo_low_rank_gguf, first["model"]), (demo_dense_gguf, first["reference"])):
        alone = command_line.run("generate", path, "-p", first["prompt"], "-n", "12", "--threads", "1")
        assert written.strip() and written.strip() in alone.stdout
    shown = run(demo_low_rank_gguf, "--text", story, "--max-tokens", "2000", "--samples", "1")
    assert "reference" not in shown.stdout and f"model      {first['model'].split()[0]}" in shown.stdout
