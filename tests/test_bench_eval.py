"""`bench` and `eval` on a small real model, against NumPy and the raw library."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from command_line import run
from gguf import GGUFWriter, PoolingType

from skipcat_edge.benchmark import Spread, bench
from skipcat_edge.embedding_eval import EmbeddingSimilarity, compare, lines_of
from skipcat_edge.errors import UserError
from skipcat_edge.perplexity import negative_log_likelihoods, perplexity, start_token, text_chunks

STORY = (
    "Once upon a time there was a little girl named Lily. She had a red ball and a small dog. One day "
    "they went to the park. The dog saw a bird and ran after it. Lily was sad, but the dog came back. "
)
WINDOW = 24


def run_json(*arguments: str | Path) -> Any:
    return command_line.run_json(*arguments, "--threads", "1")


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY * 3, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(demo_dense_gguf: Path) -> Any:
    from llama_cpp import Llama

    return Llama(str(demo_dense_gguf), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)


def losses_token_by_token(model: Any, window: Sequence[int]) -> list[float]:
    """-log p of every token of `window` but the first, from one llama_decode for each token."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    losses = []
    for token, target in pairwise(window):
        one = (llama_cpp.llama_token * 1)(token)
        assert llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(one, 1)) == 0
        logits = [float(x) for x in llama_cpp.llama_get_logits_ith(model.ctx, -1)[: model.n_vocab()]]
        top = max(logits)
        losses.append(top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[target])
    return losses


class ByteTokenizer:
    """Stands in for a model where only its tokens matter: one for each byte."""

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        assert not add_bos
        assert not special
        return list(text)


@pytest.mark.parametrize(
    ("length", "window", "max_tokens", "expected"),
    [
        (10, 4, None, [3, 3, 3]),
        (9, 4, None, [3, 3, 3]),
        (3, 4, None, [3]),
        (10, 4, 7, [3, 3]),
        (10, 4, 2, [2]),
        (10, 11, 99, [10]),
    ],
)
def test_chunks(length: int, window: int, max_tokens: int | None, expected: list[int]) -> None:
    text = "abcdefghij"[:length]
    chunks = text_chunks(ByteTokenizer(), text, window, max_tokens)
    assert [len(chunk) for chunk in chunks] == expected
    assert bytes(chain(*chunks)).decode() == text[: sum(expected)]


@pytest.mark.parametrize(("text", "part"), [("", "empty"), ("abc", "3 tokens"), ("abc", "--window 4")])
def test_text_shorter_than_a_window(text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        text_chunks(ByteTokenizer(), text, 256)


def test_negative_log_likelihoods() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 30, (70, 11)).astype(np.float32)
    targets = draw.integers(0, 11, 70)
    expected = [
        math.log(math.fsum(math.exp(x - row[target]) for x in row))
        for row, target in zip(logits.tolist(), targets, strict=True)
    ]
    assert negative_log_likelihoods(logits, targets) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_lines() -> None:
    assert lines_of("one\n\n  two \n") == ["one", "two"]
    with pytest.raises(UserError, match="empty"):
        lines_of("\n \n")


class Embedder:
    """Stands in for an embedding model: each line has a vector."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self._vectors = vectors

    def embed(self, lines: list[str]) -> list[list[float]]:
        return [self._vectors[line] for line in lines]


def test_cosines() -> None:
    lines = [f"line {i}" for i in range(40)]
    draw = np.random.default_rng(0)
    ours, theirs = (dict(zip(lines, draw.normal(size=(40, 5)).tolist(), strict=True)) for _ in range(2))
    expected = [
        math.fsum(a * b for a, b in zip(ours[line], theirs[line], strict=True))
        / math.hypot(*ours[line]) / math.hypot(*theirs[line])
        for line in lines
    ]
    done: list[int] = []
    found = compare(Embedder(ours), Embedder(theirs), lines, done.append)
    assert found.lines == sum(done) == 40
    assert found.cosine_mean == pytest.approx(math.fsum(expected) / 40)
    assert found.cosine_min == pytest.approx(min(expected))
    same = compare(Embedder(ours), Embedder(ours), lines[:1])
    assert same == EmbeddingSimilarity(pytest.approx(1.0), pytest.approx(1.0), 1)


def test_an_embedding_without_a_direction() -> None:
    with pytest.raises(UserError, match="not finite"):
        compare(Embedder({"a": [0.0, 0.0]}), Embedder({"a": [1.0, 0.0]}), ["a"])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["eval", "{model}", "--text", "{story}"], "--reference"),
        (["eval", "{model}", "--text", "{story}", "--reference", "{model}", "--max-tokens", "9"],
         "--max-tokens"),
        (["generate", "{model}", "-p", "x"], "embedding model"),
        (["chat", "{model}"], "embedding model"),
    ],
)
def test_embedding_models_are_told_apart(arguments: list[str], part: str, story: Path,
                                         tmp_path: Path) -> None:
    path = tmp_path / "encoder.gguf"
    writer = GGUFWriter(path, "skipcat-bert")
    writer.add_uint32("bert.pooling_type", PoolingType.MEAN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    result = run(*(argument.format(model=path, story=story) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert part in result.stderr


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


@pytest.mark.runtime
def test_perplexity_is_that_of_single_tokens(demo_dense_gguf: Path, model: Any, story: Path) -> None:
    found = run_json("eval", demo_dense_gguf, "--text", story, "--window", str(WINDOW), "--max-tokens", "100")

    tokens = model.tokenize(story.read_bytes(), add_bos=False, special=False)[:100]
    size = WINDOW - 1
    windows = [[model.token_bos(), *tokens[i : i + size]] for i in range(0, len(tokens) - size + 1, size)]
    losses = np.array([loss for window in windows for loss in losses_token_by_token(model, window)])
    assert found["tokens"] == len(losses) == len(windows) * size
    assert found["ppl"] == pytest.approx(np.exp(losses.mean()), rel=2e-3)
    error = np.exp(losses.mean()) * losses.std(ddof=1) / np.sqrt(len(losses))
    assert found["ppl_se"] == pytest.approx(error, rel=2e-3)


@pytest.mark.runtime
def test_windows_do_not_see_each_other(model: Any) -> None:
    chunks = text_chunks(model, STORY, WINDOW)[:2]
    together, first, second = (perplexity(model, part) for part in (chunks, chunks[:1], chunks[1:]))
    product = math.log(first.ppl) * first.tokens + math.log(second.ppl) * second.tokens
    assert together.tokens == first.tokens + second.tokens
    assert math.log(together.ppl) * together.tokens == pytest.approx(product, rel=1e-6)


@pytest.mark.runtime
def test_start_token_is_bos(model: Any) -> None:
    assert start_token(model) == model.token_bos()


@pytest.mark.runtime
def test_eval_sentence(demo_dense_gguf: Path, story: Path) -> None:
    result = run("eval", demo_dense_gguf, "--text", story, "--window", str(WINDOW), "--threads", "1")
    assert result.exit_code == 0
    assert result.stdout.startswith("perplexity ")
    assert f"windows of {WINDOW}" in result.stdout


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--window", "100000"], "--window"),
        (["--reference", "{missing}"], "no such file"),
        (["--text", "{empty}"], "is empty"),
        (["--text", "{missing}"], "cannot be read"),
        (["--text", "{model}"], "not UTF-8"),
    ],
)
def test_eval_refuses(options: list[str], part: str, demo_dense_gguf: Path, story: Path,
                      tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    names = {"model": demo_dense_gguf, "empty": tmp_path / "empty", "missing": tmp_path / "missing"}
    result = run("eval", demo_dense_gguf, "--text", story, *(option.format(**names) for option in options))
    assert result.exit_code == 2
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.runtime
def test_bench_json(demo_dense_gguf: Path) -> None:
    found = run_json("bench", demo_dense_gguf, demo_dense_gguf, "--prompt-tokens", "16", "--gen-tokens", "4",
                     "--repetitions", "3", "--no-bandwidth")
    assert len(found) == 2
    size = demo_dense_gguf.stat().st_size
    for row in found:
        assert (row["file"], row["file_bytes"], row["threads"]) == (str(demo_dense_gguf), size, 1)
        for speed in ("prompt_tps", "decode_tps", "first_token_s"):
            assert 0 < row[f"{speed}_min"] <= row[speed] <= row[f"{speed}_max"]
        assert row["first_token_s"] * row["prompt_tps"] == pytest.approx(16)
        assert row["load_s"] > 0 and row["peak_rss_bytes"] > size
        assert row["allocated_bytes"] == sum(row["buffers"].values()) > size - 2**20
        # one that is mapped, and one that is read for each token with its tied head
        assert 0.95 * size < row["bytes_per_token"] < 1.05 * size
        assert row["achieved_bandwidth"] == pytest.approx(row["bytes_per_token"] * row["decode_tps"])


@pytest.mark.runtime
def test_bench_takes_turns_after_a_warm_up(demo_dense_gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.symlink_to(demo_dense_gguf)
    files = [str(demo_dense_gguf), str(other)]
    turns: list[str] = []
    started = time.perf_counter()
    results = bench(files, prompt_tokens=8, gen_tokens=8, threads=[1], repetitions=2, advance=turns.append)
    elapsed = time.perf_counter() - started
    assert turns == files * 3
    # A speed is tokens over seconds, so no kept repetition can have taken longer than everything.
    for result in results:
        assert result.decode_tps is not None
        assert 8 / result.decode_tps.min + 8 / result.prompt_tps.min < elapsed


@pytest.mark.runtime
def test_peak_memory_is_the_workers_own(demo_dense_gguf: Path) -> None:
    ballast = np.ones(30_000_000)
    (result,) = bench([str(demo_dense_gguf)], prompt_tokens=8, gen_tokens=2, threads=[1],
                      repetitions=1)
    assert result.peak_rss_bytes < ballast.nbytes


@pytest.mark.runtime
def test_bench_table(demo_dense_gguf: Path) -> None:
    result = run("bench", demo_dense_gguf, "--prompt-tokens", "8", "--gen-tokens", "2", "--repetitions", "1",
                 "--threads", "1")
    assert result.exit_code == 0, result.output
    assert demo_dense_gguf.name in result.stdout
    # "on CPU 0" where a process may use no other
    assert re.search(r"1 thread( on CPU \d+)?; prompt of 8 tokens, 2 tokens decoded", result.stdout)


@pytest.mark.runtime
def test_bench_refuses_more_tokens_than_the_context(demo_dense_gguf: Path) -> None:
    result = run("bench", demo_dense_gguf, "--prompt-tokens", "1000000", "--threads", "1")
    assert result.exit_code == 2
    assert "--prompt-tokens" in result.stderr


@pytest.mark.runtime
def test_a_worker_that_dies_is_one_sentence(demo_dense_gguf: Path) -> None:
    from skipcat_edge.bench_process import BenchProcess
    from skipcat_edge.bench_worker import Job

    process = BenchProcess(Job(str(demo_dense_gguf), 8, 2, 1))
    try:
        process._process.kill()
        with pytest.raises(UserError, match="SIGKILL"):
            process.measure(1)
    finally:
        process.stop()


@pytest.mark.runtime
def test_worker_output_is_only_answers(demo_dense_gguf: Path) -> None:
    job = {"file": str(demo_dense_gguf), "prompt_tokens": 8, "gen_tokens": 2, "threads": 1}
    done = subprocess.run(
        [sys.executable, "-m", "skipcat_edge.bench_worker"], input=f'{json.dumps(job)}\n{{"threads": 1}}\n',
        capture_output=True, text=True, check=True, env=dict(os.environ),
    )
    load, seconds, memory = [json.loads(line) for line in done.stdout.splitlines()]
    assert load["load_s"] > 0
    assert min(seconds["prompt_s"], seconds["decode_s"]) > 0
    assert memory["peak_rss_bytes"] > 0
