"""Continuing a text token by token."""

from __future__ import annotations

import codecs
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from skipcat_edge.abort import abort_on_ctrl_c
from skipcat_edge.errors import UserError
from skipcat_edge.session import (
    BATCH,
    decode_error,
    import_llama_cpp,
    model_info,
    open_generative,
    open_model,
)

if TYPE_CHECKING:
    from skipcat_edge.level_control import Control

# Below this many bytes of prompt, a token for each byte wastes less memory than counting costs time.
_COUNT_FROM_BYTES = 2048

Stop = Literal["end of text", "token limit", "context full", "interrupted"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; above 0, llama.cpp's top-k 40, top-p 0.95 and min-p 0.05 apply."""
    seed: int | None = None
    """None draws another one each time."""


@dataclass(frozen=True)
class Statistics:
    """What one generation took."""

    prompt_tokens: int
    prompt_s: float
    """Seconds until the first token, or until the prompt was interrupted."""
    tokens: int
    decode_s: float
    """Seconds from the first token to the last."""
    stop: Stop

    def __str__(self) -> str:
        if not self.tokens:
            return f"{self.stop} after {self.prompt_s:.2f} s of {self.prompt_tokens} prompt tokens"
        prompt = f"{self.prompt_tokens} prompt tokens in {self.prompt_s:.2f} s"
        speed = f" ({(self.tokens - 1) / self.decode_s:.1f} tokens/s)" if self.decode_s > 0 else ""
        return f"{prompt}; {self.tokens} tokens in {self.decode_s:.2f} s{speed}; {self.stop}"


def open_for_prompt(path: Path, prompt: str, max_tokens: int, threads: int | None = None) -> tuple[Any, int]:
    """Load `path` with a context for `prompt` and `max_tokens` more.

    Returns the model and its context in tokens: less than asked where the model was trained
    for less. Raises UserError as `session.open_generative`.
    """
    limit = model_info(path).context_length
    wanted = _most_tokens(path, prompt) + max_tokens
    context = min(wanted, limit) if limit else wanted
    return open_generative(path, context, threads), context


def _most_tokens(path: Path, prompt: str) -> int:
    size = len(prompt.encode("utf-8", errors="replace"))
    if size < _COUNT_FROM_BYTES:
        return size + 2  # a token is a byte at least; BOS and a leading space come on top
    return len(encode(open_model(path, context=BATCH, vocabulary_only=True), prompt))


def encode(llama: Any, text: str, add_bos: bool = True) -> list[int]:
    """Tokens of `text`, special tokens recognised, after BOS where model and `add_bos` want it."""
    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    tokens = list(llama.tokenize(text.encode("utf-8", errors="replace"), add_bos=False, special=True))
    bos = llama_cpp.llama_vocab_bos(vocab)
    if add_bos and llama_cpp.llama_vocab_get_add_bos(vocab) and tokens[:1] != [bos]:
        tokens.insert(0, bos)
    return tokens


def piece(llama: Any, token: int, starts_text: bool = False) -> bytes:
    """The bytes that `token` adds to a text; they may end inside a character.

    Where it starts the text, the space that SentencePiece puts there is left out.
    """
    # Llama.detokenize drops pieces of more than 32 bytes, which large vocabularies have.
    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, int(starts_text), False)
        if length >= 0:
            return buffer.raw[:length]
        size = -length


def detokenize(llama: Any, tokens: Sequence[int]) -> str:
    """The text of `tokens`, without special ones and the space that SentencePiece puts before a text."""
    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    size = 16 * len(tokens) + 16
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = llama_cpp.llama_detokenize(vocab, array, len(tokens), buffer, size, True, False)
        if length >= 0:
            return buffer.raw[:length].decode("utf-8", errors="replace")
        size = -length


def generate(llama: Any, tokens: Sequence[int], *, max_tokens: int, context: int, emit: Callable[[str], None],
             sampling: Sampling = Sampling(), control: Control | None = None) -> Statistics:
    """Continue `tokens` until the model ends the text, `max_tokens` are out or `context` is full.

    `emit` gets the text as soon as it is whole characters; `control` sets the level. Ctrl-C ends the
    generation, not the program, and waits for no batch of the prompt. Raises UserError if `tokens` are none
    or do not fit, or llama.cpp fails.
    """
    llama_cpp = import_llama_cpp()
    if not tokens:
        raise UserError("The prompt is empty and this model starts no text by itself; give one with -p.")
    if len(tokens) >= context:
        raise UserError(f"The prompt has {len(tokens)} tokens, but the context holds {context}; shorten it.")
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    llama.set_seed(llama_cpp.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed)
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    limit = min(max_tokens, context - len(tokens))
    stop: Stop = "token limit" if max_tokens <= limit else "context full"
    bos = llama_cpp.llama_vocab_bos(vocab)
    count = 0
    written = llama.generate(tokens, temp=sampling.temperature)
    started = first = last = time.perf_counter()
    try:
        generated = written if control is None else control.over(written)
        with abort_on_ctrl_c(llama):
            begun = next(generated)
        for token in chain((begun,), generated):
            last = time.perf_counter()
            first = last if count == 0 else first
            count += 1
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                stop = "end of text"
                break
            emit(text.decode(piece(llama, token, starts_text=count == 1 and tokens[-1] == bos)))
            if count == limit:
                break
    except KeyboardInterrupt:
        stop = "interrupted"
        if not count:
            first = last = time.perf_counter()
    except RuntimeError as error:
        raise decode_error(str(error)) from None
    emit(text.decode(b"", final=True))
    return Statistics(len(tokens), first - started, count, last - first, stop)
