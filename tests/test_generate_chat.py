"""`generate` and `chat` on a small real model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from gguf_edit import GGUF

from skipcat_edge import generation
from skipcat_edge.cli import main
from skipcat_edge.conversation import Conversation
from skipcat_edge.errors import UserError
from skipcat_edge.generation import Sampling, encode, generate, piece

pytestmark = pytest.mark.runtime

PROMPT = "Once upon a time"
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--threads", "1"], input=stdin)


@pytest.fixture(scope="module")
def model(demo_dense_gguf: Path) -> Any:
    from llama_cpp import Llama

    return Llama(str(demo_dense_gguf), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)


def greedy_by_hand(model: Any, tokens: list[int], count: int) -> list[int]:
    """The likeliest token again and again, by the C API alone."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    found: list[int] = []
    batch = tokens
    for _ in range(count):
        array = (llama_cpp.llama_token * len(batch))(*batch)
        assert llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(array, len(batch))) == 0
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)[: model.n_vocab()]
        found.append(max(range(len(logits)), key=logits.__getitem__))
        batch = found[-1:]
    return found


def test_greedy_text_on_stdout_statistics_on_stderr(demo_dense_gguf: Path, model: Any) -> None:
    result = run("generate", demo_dense_gguf, "-p", PROMPT, "-n", "12")
    tokens = model.tokenize(PROMPT.encode(), add_bos=True)
    expected = b"".join(piece(model, token) for token in greedy_by_hand(model, tokens, 12)).decode()
    assert result.exit_code == 0, result.output
    assert result.stdout == expected + "\n"
    pattern = rf"{len(tokens)} prompt tokens in .* s; 12 tokens in .*; token limit\n"
    assert re.fullmatch(pattern, result.stderr)


def test_seed_repeats_a_warm_generation(demo_dense_gguf: Path) -> None:
    def text(seed: int) -> str:
        options = ["-p", PROMPT, "-n", "12", "--temp", "4", "--seed", str(seed)]
        return run("generate", demo_dense_gguf, *options).stdout

    first = text(1)
    assert first == text(1)
    assert any(text(seed) != first for seed in (2, 3, 4))


def test_without_a_prompt_the_text_has_no_leading_space(demo_dense_gguf: Path) -> None:
    result = run("generate", demo_dense_gguf, "-n", "8")
    assert result.exit_code == 0, result.output
    assert result.stdout == result.stdout.lstrip()


def test_characters_are_whole_when_their_bytes_are_not(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = iter([b"caf", b"\xc3", b"\xa9 \xf0\x9f", b"\x98\x80!", b"\xe2\x82"])
    monkeypatch.setattr(generation, "piece", lambda *_, **__: next(pieces))
    emitted: list[str] = []
    generate(model, encode(model, PROMPT), max_tokens=5, context=64, emit=emitted.append)
    whole = ["caf", "é ", "\N{GRINNING FACE}!", "\N{REPLACEMENT CHARACTER}"]
    assert [text for text in emitted if text] == whole


def test_generation_ends_with_the_context(model: Any) -> None:
    tokens = encode(model, PROMPT)
    context = len(tokens) + 3
    statistics = generate(model, tokens, max_tokens=100, context=context, emit=lambda _: None)
    assert (statistics.tokens, statistics.stop) == (3, "context full")
    with pytest.raises(UserError, match="shorten it"):
        generate(model, tokens, max_tokens=1, context=len(tokens), emit=lambda _: None)


def test_prompt_longer_than_the_model_knows(demo_dense_gguf: Path) -> None:
    result = run("generate", demo_dense_gguf, "-p", "a story " * 5000, "-n", "5")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "shorten it" in result.stderr


def test_missing_tensor_is_named(demo_dense_gguf: Path, tmp_path: Path) -> None:
    name = "blk.1.attn_output.weight"
    model = GGUF.read(demo_dense_gguf)
    del model.tensors[name]
    broken = model.write(tmp_path / "broken.gguf")
    result = run("generate", broken, "-p", PROMPT)
    assert result.exit_code == 2
    assert name in result.stderr
    assert str(broken) in result.stderr
    assert result.stderr.count("\n") == 1


def test_chat_in_a_pipe(demo_dense_gguf: Path, model: Any) -> None:
    lines = f"{PROMPT}\n\nThe dog\n/exit\nnever read\n"
    result = run("chat", demo_dense_gguf, "-n", "6", "--temp", "0", stdin=lines)
    assert result.exit_code == 0, result.output
    conversation = Conversation(model, context=256, max_tokens=6, sampling=Sampling())
    replies = [conversation.reply(line, lambda _: None).text for line in (PROMPT, "The dog")]
    assert result.stdout == "".join(f"{reply}\n" for reply in replies)


def test_chat_ends_with_its_input(demo_dense_gguf: Path) -> None:
    assert run("chat", demo_dense_gguf, stdin="").exit_code == 0


@pytest.fixture
def templated(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(model.metadata, "tokenizer.chat_template", TEMPLATE)
    return model


def test_history_goes_through_the_template(templated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    monkeypatch.setattr("skipcat_edge.conversation.encode",
                        lambda llama, text: prompts.append(text) or encode(llama, text))
    conversation = Conversation(templated, context=256, max_tokens=5, sampling=Sampling())
    emitted: list[str] = []
    first = conversation.reply("hello", emitted.append)
    conversation.reply("and then", emitted.append)
    assert "".join(emitted).startswith(first.text)
    bos = templated._model.token_get_text(templated.token_bos())
    assert prompts[0] == f"{bos}[user] hello\n[assistant] "
    assert prompts[1] == f"{bos}[user] hello\n[assistant] {first.text}\n[user] and then\n[assistant] "


def test_without_a_template_the_text_goes_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(model.metadata, "tokenizer.chat_template", raising=False)
    prompts: list[str] = []
    monkeypatch.setattr("skipcat_edge.conversation.encode",
                        lambda llama, text: prompts.append(text) or encode(llama, text))
    conversation = Conversation(model, context=256, max_tokens=5, sampling=Sampling())
    first = conversation.reply(PROMPT, lambda _: None)
    conversation.reply("The dog", lambda _: None)
    assert not conversation.has_template
    assert prompts == [PROMPT, f"{PROMPT}{first.text}\nThe dog"]


def test_oldest_turns_make_room(templated: Any) -> None:
    conversation = Conversation(templated, context=96, max_tokens=8, sampling=Sampling())
    dropped = [conversation.reply(f"message {i} about the park", lambda _: None).dropped for i in range(8)]
    assert dropped[0] == 0
    assert sum(dropped) > 0
    assert len(conversation.turns) == 8 - sum(dropped)
    assert conversation.turns[-1].user == "message 7 about the park"


def test_message_that_never_fits_changes_nothing(templated: Any) -> None:
    conversation = Conversation(templated, context=64, max_tokens=8, sampling=Sampling())
    conversation.reply("hello", lambda _: None)
    turns = list(conversation.turns)
    with pytest.raises(UserError, match="shorten it"):
        conversation.reply("word " * 100, lambda _: None)
    assert conversation.turns == turns


def test_template_that_refuses(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setitem(model.metadata, "tokenizer.chat_template", template)
    conversation = Conversation(model, context=64, max_tokens=8, sampling=Sampling())
    with pytest.raises(UserError, match="roles must alternate"):
        conversation.reply("hello", lambda _: None)
