"""`eval --progressive`: by token, against logits of single decodes whose level is set by hand."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run, run_json
from level_files import LEVELS, write_levels
from level_models import bert_base

from skipcat_edge import evaluate, progressive_eval
from skipcat_edge.decoding import all_logits, clear, last_logits
from skipcat_edge.errors import UserError
from skipcat_edge.levels import parse_schedule, set_level
from skipcat_edge.perplexity import start_token, text_chunks
from skipcat_edge.progressive_eval import rouge_l
from skipcat_edge.reference import LiveReference
from skipcat_edge.samples import PROMPT_TOKENS, spread
from skipcat_edge.session import open_model
from skipcat_edge.traffic import weight_bytes_per_token

pytestmark = pytest.mark.runtime

STORY = (
    "Once upon a time there was a little girl named Lily. She had a red ball and a small dog. One day "
    "they went to the park. The dog saw a bird and ran after it. Lily was sad, but the dog came back. "
    "Tom found a big box under the tree. He wanted to open it, but his mom said no. They went home. "
)
TEXT = STORY * 8
TOKENS = 12
WINDOW = 1 + PROMPT_TOKENS + TOKENS
SCHEDULE = "0:0.6,4:0.8,9:0.6"
LEVEL_OF = [0.8, *[0.6] * 3, *[0.8] * 5, *[0.6] * 3]
"""The schedule written out: token 0 comes out of the prompt, which has the full level."""


@pytest.fixture(scope="module")
def leveled(tmp_path_factory: pytest.TempPathFactory, demo_dense_gguf: Path) -> Path:
    return write_levels(demo_dense_gguf, tmp_path_factory.mktemp("levels") / "levels.gguf")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def found(leveled: Path, demo_dense_gguf: Path, story: Path) -> Any:
    return measured(leveled, demo_dense_gguf, story, "--progressive", SCHEDULE, "--prompts", 3)


def measured(file: Path, dense: Path, story: Path, *options: object) -> Any:
    return run_json("eval", file, "--reference", dense, "--text", story, "--window", WINDOW, "--threads", 1,
                    "--no-cache", *options)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def decode(model: Any, prompt: list[int], levels: list[float] | None, follow: list[int] | None) -> Any:
    """float64 logits [TOKENS, vocabulary] and the tokens after `prompt`, the likeliest without `follow`."""
    clear(model)
    batch, position, rows, tokens = prompt, 0, [], []
    for index in range(TOKENS):
        if levels is not None:
            set_level(model, levels[index])
        rows.append(last_logits(model, batch, position, 1)[0].astype(np.float64))
        position += len(batch)
        batch = [follow[index] if follow else int(rows[-1].argmax())]
        tokens += batch
    return np.array(rows), tokens


@pytest.fixture(scope="module")
def expected(leveled: Path, demo_dense_gguf: Path) -> dict[str, np.ndarray]:
    """KL, agreement and ROUGE-L by prompt and token; each prompt by itself."""
    ours, theirs = (open_model(path, context=256, threads=1) for path in (leveled, demo_dense_gguf))
    kl, same, rouge = [], [], []
    for chunk in spread(text_chunks(ours, TEXT, WINDOW), 3):
        prompt, follow = [start_token(ours), *chunk[:PROMPT_TOKENS]], [*chunk[PROMPT_TOKENS:]]
        logits, _ = decode(ours, prompt, LEVEL_OF, follow)
        dense = all_logits(theirs, [*prompt, *follow[:-1]])[-TOKENS:].astype(np.float64)
        p, q = (np.array([softmax(row) for row in rows]) for rows in (dense, logits))
        kl.append((p * np.log(p / q)).sum(axis=1))
        same.append(dense.argmax(axis=1) == logits.argmax(axis=1))
        texts = [b"".join(model.detokenize([token]) for token in decode(model, prompt, levels, None)[1])
                 for model, levels in ((theirs, None), (ours, LEVEL_OF))]
        rouge.append(f_measure(*(text.decode("utf-8", "replace") for text in texts)))
    for model in (ours, theirs):
        model.close()
    return {"kl": np.array(kl), "top1": np.array(same), "rouge_l": np.array(rouge)}


def f_measure(first: str, second: str) -> float:
    """ROUGE-L's, by the definition: of the longest common subsequence of the words."""
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (first, second))
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, word in enumerate(a):
        for j, other in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if word == other else max(table[i, j + 1], table[i + 1, j])
    return 2 * table[-1, -1] / (len(a) + len(b))


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def test_by_token(found: Any, expected: dict[str, np.ndarray]) -> None:
    assert (found["prompts"], found["prompt_tokens"], found["tokens"]) == (3, PROMPT_TOKENS, TOKENS)
    assert found["progressive"] == SCHEDULE
    assert [(each["token"], each["level"]) for each in found["positions"]] == [*enumerate(LEVEL_OF)]
    for name in ("kl", "top1"):
        values = expected[name]
        by_token = [each[name] for each in found["positions"]]
        assert by_token == pytest.approx(values.mean(axis=0), rel=2e-2, abs=1e-4), name
        errors = [each[f"{name}_se"] for each in found["positions"]]
        assert errors == pytest.approx([standard_error(column) for column in values.T], rel=5e-2, abs=1e-4)
        assert found[name] == pytest.approx(values.mean(), rel=1e-2)
        assert found[f"{name}_se"] == pytest.approx(standard_error(values.mean(axis=1)), rel=2e-2)


def test_spans_are_the_schedules(found: Any, expected: dict[str, np.ndarray]) -> None:
    spans = [(each["first"], each["last"], each["level"]) for each in found["spans"]]
    assert spans == [(0, 0, 0.8), (1, 3, 0.6), (4, 8, 0.8), (9, 11, 0.6)]
    for each in found["spans"]:
        part = expected["kl"][:, each["first"] : each["last"] + 1].mean(axis=1)
        assert (each["kl"], each["kl_se"]) == pytest.approx((part.mean(), standard_error(part)), rel=3e-2)


def test_rouge_is_of_the_continuations(found: Any, expected: dict[str, np.ndarray]) -> None:
    values = expected["rouge_l"]
    assert 0.05 < values.mean() < 0.95  # else it would prove nothing
    assert found["rouge_l"] == pytest.approx(values.mean(), abs=1e-9)
    assert found["rouge_l_se"] == pytest.approx(standard_error(values), abs=1e-9)


def test_a_continuation_ends_where_its_text_does(leveled: Path, demo_dense_gguf: Path, story: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of its batch go on. Here a full stop is the end of a text."""
    import llama_cpp

    texts, lengths = [], []
    for path, levels in ((demo_dense_gguf, None), (leveled, LEVEL_OF)):
        model = open_model(path, context=256, threads=1)
        end = model.tokenize(b"home.", add_bos=False)[-1]
        written = []
        for chunk in spread(text_chunks(model, TEXT, WINDOW), 5):
            tokens = decode(model, [start_token(model), *chunk[:PROMPT_TOKENS]], levels, None)[1]
            tokens = tokens[: tokens.index(end)] if end in tokens else tokens
            lengths.append(len(tokens))
            written.append(b"".join(model.detokenize([token]) for token in tokens).decode("utf-8", "replace"))
        texts.append(written)
        model.close()
    assert len({*lengths}) > 2 and min(lengths) < TOKENS  # at different places
    monkeypatch.setattr(llama_cpp, "llama_vocab_is_eog", lambda vocab, token: token == end)
    found = measured(leveled, demo_dense_gguf, story, "--progressive", SCHEDULE, "--prompts", 5)
    assert found["rouge_l"] == pytest.approx(np.mean([f_measure(*pair) for pair in zip(*texts, strict=True)]))


def test_bytes_are_those_of_the_decoded_tokens(found: Any, leveled: Path) -> None:
    low, high = (weight_bytes_per_token(leveled, place) for place in range(2))
    assert found["bytes_per_token"] == pytest.approx((6 * low + 5 * high) / 11)


@pytest.mark.parametrize(("first", "second"), [
    ("The dog ran home.", "the cat ran far from home"), ("a b c d", "d c b a"), ("one two", "three"),
    ("It's 3 o'clock", "it s 3 clock"),
])  # fmt: skip
def test_rouge_is_the_longest_common_subsequence(first: str, second: str) -> None:
    assert rouge_l(first, second) == pytest.approx(f_measure(first, second))


def test_rouge_of_texts_without_words() -> None:
    assert (rouge_l("", ""), rouge_l("...", "..."), rouge_l("...", "!"), rouge_l("", "a")) == (1, 1, 0, 0)


def test_the_full_level_is_the_plain_divergence(leveled: Path, demo_dense_gguf: Path, story: Path) -> None:
    """A whole window in one batch, and token by token."""
    ours, theirs = (open_model(path, context=256, threads=1) for path in (leveled, demo_dense_gguf))
    found = measured(leveled, demo_dense_gguf, story, "--progressive", "0:0.8", "--prompts", 4)
    kl = []
    for chunk in spread(text_chunks(ours, TEXT, WINDOW), 4):
        tokens = [start_token(ours), *chunk[:-1]]
        p, q = (np.array([softmax(row) for row in all_logits(model, tokens)[PROMPT_TOKENS:].astype(float)])
                for model in (theirs, ours))
        kl.append((p * np.log(p / q)).sum(axis=1))
    assert [each["kl"] for each in found["positions"]] == pytest.approx(np.mean(kl, axis=0), rel=2e-2,
                                                                        abs=1e-4)
    ends = [(each["first"], each["last"]) for each in found["spans"]]
    assert ends == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 11)]


def test_batches_change_no_figure(leveled: Path, demo_dense_gguf: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    dense = open_model(demo_dense_gguf, context=256, threads=1)
    chunks = spread(text_chunks(dense, TEXT, WINDOW), 5)
    results = []
    for at_once in (1, 2, 5, 16):
        if at_once == 16:  # less memory than for all prompts
            monkeypatch.setattr(progressive_eval, "_REFERENCE_BYTES", 3 * 4 * dense.n_vocab() * TOKENS)
        results.append(progressive_eval.measure(
            leveled, demo_dense_gguf, LiveReference(dense), start_token(dense), chunks,
            parse_schedule(SCHEDULE).checked(leveled, LEVELS), threads=1, at_once=at_once))
    for one, other in pairwise(results):
        assert other.rouge_l == pytest.approx(one.rouge_l, abs=1e-9)
        kl, others = ([each.kl for each in result.positions] for result in (one, other))
        assert others == pytest.approx(kl, rel=2e-2, abs=1e-4)
    dense.close()


def test_the_reference_and_its_cache(demo_dense_gguf: Path, story: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without levels has its own ratio, and the dense one agrees with itself; from the disk too."""
    monkeypatch.setenv("SKIPCAT_EDGE_CACHE", str(tmp_path))
    for _ in range(2):
        found = evaluate(demo_dense_gguf, story.read_text(), reference=demo_dense_gguf, window=WINDOW,
                         progressive="0:1", prompts=2, threads=1).progressive
        assert found is not None
        assert (found.rouge_l, found.divergence.top1) == (1, 1) and found.divergence.kl < 1e-4


def test_what_it_says(leveled: Path, demo_dense_gguf: Path, story: Path) -> None:
    result = run("eval", leveled, "--reference", demo_dense_gguf, "--text", story, "--window", WINDOW,
                 "--threads", 1, "--no-cache", "--progressive", "0:0.8,6:0.6")
    assert result.exit_code == 0, result.output
    assert re.match(rf"\d+ prompts \(the text has no more windows of {WINDOW}\), 12 tokens after each, "
                    r"levels 0:0\.8,6:0\.6; \d", result.stdout)
    rows = [line.split() for line in result.stdout.splitlines() if re.match(r"\d+-\d+ ", line)]
    assert [row[:2] for row in rows] == [["0-5", "0.8"], ["6-11", "0.6"]]


@pytest.mark.parametrize(("options", "part"), [
    (["--progressive", "0:0.7"], "has no level 0.7; its levels are 0.6 and 0.8."),
    (["--progressive", "0:0.8,12:0.6"], "--window 38"),
    (["--progressive", "0:0.8", "--max-tokens", "24"], "--window 26"),
    (["--progressive", "0:0.8", "--rank-level", "0.6"], "--rank-level"),
    (["--progressive", "0:0.8", "--samples", "1"], "--samples"),
    (["--progressive", "0:0.8", "--tasks", "arc_easy"], "--tasks"),
    (["--progressive", "0:0.8", "--card"], "--card"),
    (["--progressive", "later"], "write it like"),
    (["--progressive", "0:0.8", "--window", "600"], "use --window 512 or less"),
])  # fmt: skip
def test_refusals(options: list[str], part: str, leveled: Path, demo_dense_gguf: Path, story: Path) -> None:
    refused(part, "eval", leveled, "--reference", demo_dense_gguf, "--text", story, "--window", WINDOW,
            *options)


def test_a_reference_is_needed(leveled: Path, story: Path) -> None:
    refused("--reference", "eval", leveled, "--text", story, "--progressive", "0:0.8")


def test_embedding_models_write_nothing(demo_dense_gguf: Path, story: Path, tmp_path: Path) -> None:
    encoder = bert_base().write(tmp_path / "bert.gguf")
    refused("is an embedding model", "eval", encoder, "--text", story, "--reference", demo_dense_gguf,
            "--progressive", "0:1")


def refused(part: str, *arguments: object) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert part in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_without_rouge_score(leveled: Path, demo_dense_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipcat_edge.extra.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ROUGE-L needs rouge_score; .*skipcat-edge\[eval\]"):
        evaluate(leveled, TEXT, reference=demo_dense_gguf, progressive="0:0.8", window=WINDOW)


def test_json_is_flat(found: Any) -> None:
    assert {"kl", "kl_se", "top1", "top1_se", "rouge_l", "rouge_l_se", "bytes_per_token"} <= {*found}
    assert {*found["positions"][0]} == {"token", "level", "kl", "kl_se", "top1", "top1_se"}
    assert json.dumps(found) and "ppl" not in found
