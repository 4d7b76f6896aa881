"""What models write: a low perplexity with broken text is a known failure, and only reading shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skipcat_edge.generation import generate, piece

PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Sample:
    """A beginning from a text, and its likeliest continuation by one or two models."""

    prompt: str
    model: str
    reference: str | None = None
    """None where there is none to compare with."""


def prompts_of(chunks: Sequence[Sequence[int]], start: int, count: int) -> list[list[int]]:
    """Up to `count` beginnings, each the `start` token and some of a chunk's, evenly spread over the text."""
    return [[start, *chunk[:PROMPT_TOKENS]] for chunk in spread(chunks, count)]


def spread(chunks: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Up to `count` of `chunks`, evenly spread over them."""
    count = min(count, len(chunks))
    return [chunks[index * len(chunks) // count] for index in range(count)]


def text_of(llama: Any, prompt: Sequence[int]) -> str:
    """The text of a prompt's tokens, without the start token."""
    pieces = [piece(llama, token, starts_text=index == 0) for index, token in enumerate(prompt[1:])]
    return b"".join(pieces).decode("utf-8", "replace")


def continuations(llama: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
    """The likeliest `max_tokens` tokens after each prompt; fewer where the text ends or the context is full.

    Raises UserError if llama.cpp fails.
    """
    found = []
    for prompt in prompts:
        parts: list[str] = []
        statistics = generate(llama, prompt, max_tokens=max_tokens, context=llama.n_ctx(), emit=parts.append)
        if statistics.stop == "interrupted":  # no sample
            raise KeyboardInterrupt
        found.append("".join(parts))
    return found
