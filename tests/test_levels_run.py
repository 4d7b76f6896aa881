"""Rank levels in the commands that run models: the same as levels that are set by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
from command_line import run, run_json
from level_files import LEVELS, write_levels
from serving import CHAT, COMPLETIONS, Local, ask, chat_body

from skipcat_edge.bench_rows import changes
from skipcat_edge.benchmark import bench
from skipcat_edge.decoding import all_logits
from skipcat_edge.embedding_eval import compare, lines_of
from skipcat_edge.errors import UserError
from skipcat_edge.generation import encode, generate, piece
from skipcat_edge.level_control import new_control
from skipcat_edge.levels import get_level, levels, parse_schedule, set_level
from skipcat_edge.session import open_model
from skipcat_edge.traffic import weight_bytes_per_token

pytestmark = pytest.mark.runtime

PROMPT = "Once upon a time"
SCHEDULE = "0:0.8,8:0.6,20:0.8"
TOKENS = 28


@pytest.fixture(scope="module")
def leveled(tmp_path_factory: pytest.TempPathFactory, demo_dense_gguf: Path) -> Path:
    return write_levels(demo_dense_gguf, tmp_path_factory.mktemp("levels") / "levels.gguf")


@pytest.fixture
def model(leveled: Path) -> Iterator[Any]:
    llama = open_model(leveled, context=256, threads=1)
    yield llama
    llama.close()


def by_hand(model: Any, prompt: str, count: int, level_of: Callable[[int], float],
            prompt_level: float = LEVELS[-1]) -> str:
    """The likeliest tokens by the C API alone, generated token i computed at level_of(i)."""
    import llama_cpp

    library = llama_cpp.llama_cpp._lib
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    batch, found = encode(model, prompt), []
    for index in range(count):
        level = level_of(index) if index else prompt_level
        assert library.skipcat_set_level(model.ctx, LEVELS.index(level)) == 0
        array = (llama_cpp.llama_token * len(batch))(*batch)
        assert llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(array, len(batch))) == 0
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
        batch = [int(logits.argmax())]
        found += batch
    return b"".join(piece(model, token) for token in found).decode()


def generated(file: Path, *options: object, threads: int = 1) -> Any:
    result = run("generate", file, "-p", PROMPT, "-n", TOKENS, "--threads", threads, *options)
    assert result.exit_code == 0, result.output
    return result


def test_set_level(model: Any) -> None:
    tokens = encode(model, PROMPT)
    assert (levels(model), get_level(model)) == (LEVELS, 0.8)
    full = all_logits(model, tokens).copy()
    set_level(model, 0.6)
    lower = all_logits(model, tokens).copy()
    assert get_level(model) == 0.6 and np.abs(lower - full).max() > 0.1
    with pytest.raises(UserError, match=r"has no level 0\.7; its levels are 0\.6 and 0\.8\."):
        set_level(model, 0.7)
    set_level(model, 0.8)
    assert np.array_equal(all_logits(model, tokens), full)


def test_a_prompt_seen_before_is_sampled_at_the_new_level(model: Any) -> None:
    """Llama.generate would take the logits that it has, which are of the old level."""
    import llama_cpp

    tokens = encode(model, PROMPT)
    next(model.generate(tokens, temp=0))
    seen = []
    for level in LEVELS:
        set_level(model, level)
        next(model.generate(tokens, temp=0))
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        seen.append(np.ctypeslib.as_array(logits, (model.n_vocab(),)).copy())
    assert np.abs(seen[0] - seen[1]).max() > 0.01


def test_progressive_is_switching_by_hand(leveled: Path, model: Any) -> None:
    schedule = parse_schedule(SCHEDULE)
    result = generated(leveled, "--progressive", SCHEDULE)
    assert result.stdout == by_hand(model, PROMPT, TOKENS, schedule.at) + "\n"
    assert "level 0.8 for 16 tokens, 0.6 for 12; 2 switches; " in result.stderr
    plain = {generated(leveled, *options).stdout for options in ([], ["--rank-level", "0.6"])}
    assert len({result.stdout, *plain}) == 3
    parts: list[str] = []
    generate(model, encode(model, PROMPT), max_tokens=TOKENS, context=256, emit=parts.append,
             control=new_control(model, schedule, LEVELS))
    assert "".join(parts) + "\n" == result.stdout


@pytest.mark.parametrize("options", [["--progressive", SCHEDULE], ["--rank-level", "0.6"]])
def test_threads_change_nothing(options: list[str], leveled: Path) -> None:
    one, two = (generated(leveled, *options, threads=threads).stdout for threads in (1, 2))
    assert one == two


@pytest.mark.parametrize("level", LEVELS)
def test_a_fixed_level_holds_for_the_prompt_too(level: float, leveled: Path, model: Any) -> None:
    result = generated(leveled, "--level", level)
    assert result.stdout == by_hand(model, PROMPT, TOKENS, lambda _: level, level) + "\n"
    assert f"level {level} for {TOKENS} tokens; 0 switches; " in result.stderr


def test_the_dial(leveled: Path, model: Any) -> None:
    fast = generated(leveled, "--rank-level", "auto", "--target-tps", "1e9")
    # 16 tokens are measured, after the one that comes out of the prompt
    assert fast.stdout == by_hand(model, PROMPT, TOKENS, lambda index: 0.8 if index < 17 else 0.6) + "\n"
    assert "level 0.8 for 17 tokens, 0.6 for 11; 1 switch; " in fast.stderr
    slow = generated(leveled, "--rank-level", "auto", "--target-tps", "0.001")
    assert slow.stdout == generated(leveled).stdout
    assert re.search(r"level 0\.8 for 28 tokens; 0 switches; [\d.]+ tokens/s\n$", slow.stderr)


def test_chat_tells_what_it_did(leveled: Path) -> None:
    result = run("chat", leveled, "-n", 6, "--temp", 0, "--threads", 1, "--progressive", "0:0.8,2:0.6",
                 stdin=f"{PROMPT}\nThe dog\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("level 0.8 for 2 tokens, 0.6 for 4; 1 switch; ") == 2


def test_bench_measures_each_level_in_turn(leveled: Path, demo_dense_gguf: Path) -> None:
    turns: list[str] = []
    results = bench([leveled, demo_dense_gguf], prompt_tokens=8, gen_tokens=4, threads=[1], repetitions=2,
                    rank_level="all", advance=lambda file: turns.append(Path(file).name))
    assert [(Path(each.file).name, each.rank_level) for each in results] == [
        ("levels.gguf", 0.6), ("levels.gguf", 0.8), ("dense.gguf", None)]
    assert turns == ["levels.gguf", "levels.gguf", "dense.gguf"] * 3
    read = [each.bytes_per_token for each in results[:2]]
    assert read[0] is not None and read[1] is not None
    assert read[1] - read[0] == (weight_bytes_per_token(leveled, 1) - weight_bytes_per_token(leveled, 0))


def test_bench_rows_carry_the_level(leveled: Path) -> None:
    few = ("--prompt-tokens", 8, "--gen-tokens", 4, "--repetitions", 1, "--threads", 1, "--no-bandwidth")
    rows = run_json("bench", leveled, *few, "--rank-level", "all")
    assert [row["rank_level"] for row in rows] == [*LEVELS]
    (row,) = run_json("bench", leveled, *few)
    assert (row["rank_level"], row["progressive"]) == (0.8, None)
    assert [change.decode is None for change in changes([row], rows)] == [False]
    (stepped,) = run_json("bench", leveled, *few, "--progressive", "0:0.8,1:0.6")
    assert stepped["progressive"] == "0:0.8,1:0.6"
    assert stepped["bytes_per_token"] == pytest.approx((rows[1]["bytes_per_token"]
                                                        + 3 * rows[0]["bytes_per_token"]) / 4)
    assert [change.decode for change in changes([stepped], rows)] == [None]
    table = run("bench", leveled, *few, "--level", "all").stdout.splitlines()
    assert table[0].split()[:2] == ["file", "level"]
    assert [line.split()[1] for line in table if line.startswith("levels.gguf ")] == ["0.6", "0.8"]


def test_eval_at_a_level(leveled: Path, demo_dense_gguf: Path, model: Any, tmp_path: Path) -> None:
    from skipcat_edge.perplexity import perplexity, text_chunks

    story = "Once upon a time there was a little girl named Lily. She had a red ball. " * 8
    text = tmp_path / "story.txt"
    text.write_text(story, encoding="utf-8")
    options = ("--text", text, "--window", 32, "--threads", 1, "--no-cache")
    chunks = text_chunks(model, story, 32)
    for level in (None, *LEVELS):
        set_level(model, level or 0.8)
        expected = perplexity(model, chunks).ppl
        found = run_json("eval", leveled, *options, *([] if level is None else ["--rank-level", level]))
        assert found["ppl"] == pytest.approx(expected, rel=1e-6)
        assert found.get("rank_level") == level
    low, full = (run_json("eval", leveled, *options, "--reference", demo_dense_gguf, "--rank-level", level)
                 for level in LEVELS)
    assert low["kl"] > full["kl"] > 0


def test_embeddings_at_a_level(leveled: Path) -> None:
    """A level is a property of any context, embeddings' too."""
    llamas = [open_model(leveled, context=64, batch=64, threads=1, embedding=True, pooled=False)
              for _ in range(2)]
    lines = lines_of("the dog ran home\na red ball")
    assert compare(*llamas, lines).cosine_min == pytest.approx(1)
    set_level(llamas[0], 0.6)
    assert compare(*llamas, lines).cosine_min < 0.9999
    for llama in llamas:
        llama.close()


@pytest.fixture(scope="module")
def server(leveled: Path) -> Iterator[Local]:
    with serving.local_server(leveled) as local:
        yield local


def completion(server: Local, **options: Any) -> str:
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **options}
    status, found = ask(server.url, COMPLETIONS, body)
    assert status == 200, found
    return str(found["choices"][0]["text"])


def test_requests_do_not_disturb_each_other(server: Local, leveled: Path) -> None:
    expected = {name: generated(leveled, *options).stdout.removesuffix("\n") for name, options in {
        "full": [], "low": ["--rank-level", "0.6"], "steps": ["--progressive", SCHEDULE]}.items()}
    options: dict[str, dict[str, Any]] = {"full": {}, "low": {"rank_level": 0.6},
                                          "steps": {"progressive": SCHEDULE}}
    for name in ("low", "full", "steps", "full", "low", "steps", "low", "low"):
        assert completion(server, **options[name]) == expected[name], name


def test_a_prompt_of_another_level_is_computed_again(server: Local) -> None:
    """Whole batches of an earlier prompt are used again otherwise."""
    long = f"{PROMPT} there was a dog. The dog saw a bird. " * 16
    computed = []
    for level in (0.8, 0.6, 0.6, 0.8):
        server.computed.clear()
        completion(server, prompt=long, max_tokens=1, rank_level=level)
        computed.append(sum(server.computed))
    fresh, other, same, back = computed
    assert fresh == other == back > 200 and same == fresh - 128


def test_embeddings_are_served_at_a_level(leveled: Path) -> None:
    with serving.local_server(leveled, embedding=True) as local:
        def embedded(**options: Any) -> np.ndarray:
            status, found = ask(local.url, "/v1/embeddings", {"input": "the dog ran home", **options})
            assert status == 200, found
            return np.asarray(found["data"][0]["embedding"])

        full, low, again = embedded(), embedded(rank_level=0.6), embedded()
        assert np.array_equal(full, again) and np.abs(full - low).max() > 1e-4
        assert ask(local.url, "/v1/embeddings", {"input": "x", "rank_level": 0.5})[0] == 400


@pytest.mark.parametrize(("options", "part"), [
    ({"rank_level": 0.7}, "local has no level 0.7; its levels are 0.6 and 0.8."),
    ({"progressive": "0:0.8,3:0.5"}, "local has no level 0.5"), ({"progressive": "later"}, "write it like"),
    ({"progressive": "0:0.6", "rank_level": 0.6}, "leave out rank_level"),
    ({"rank_level": "low"}, "rank_level"),
])  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_wrong_levels_are_bad_requests(path: str, options: dict[str, Any], part: str, server: Local) -> None:
    body = chat_body("hello") if path == CHAT else {"prompt": "hello"}
    status, found = ask(server.url, path, {**body, **options})
    assert status == 400
    assert part in found["error"]["message"] and found["error"]["type"] == "invalid_request_error"


def test_a_served_level_is_the_default_of_requests(leveled: Path) -> None:
    with serving.serving(leveled, "--rank-level", 0.6) as process:
        def text(**options: Any) -> str:
            status, found = ask(process.url, COMPLETIONS, {"prompt": PROMPT, "max_tokens": TOKENS,
                                                           "temperature": 0, **options})
            assert status == 200, found
            return str(found["choices"][0]["text"])

        low = generated(leveled, "--rank-level", "0.6").stdout.removesuffix("\n")
        assert text() == low
        assert text(rank_level=0.8) == generated(leveled).stdout.removesuffix("\n")
        assert text() == low


def test_openai_clients_send_it_as_extra_body(server: Local) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}v1", api_key="none")
    answer = client.completions.create(model="local", prompt=PROMPT, max_tokens=TOKENS, temperature=0,
                                       extra_body={"rank_level": 0.6})
    assert answer.choices[0].text == completion(server, rank_level=0.6)
    with pytest.raises(openai.BadRequestError, match="has no level"):
        client.completions.create(model="local", prompt=PROMPT, extra_body={"rank_level": 0.1})
    assert json.loads(answer.model_dump_json())["usage"]["completion_tokens"] > 0
