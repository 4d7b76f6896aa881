"""Log-likelihoods of continuations, with what their contexts share computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipcat_edge.decoding import clear, last_logits
from skipcat_edge.errors import UserError
from skipcat_edge.perplexity import negative_log_likelihoods
from skipcat_edge.session import BATCH, import_llama_cpp

if TYPE_CHECKING:
    import numpy as np

Request = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context and of its continuation, at least one of each."""


@dataclass(frozen=True)
class Score:
    """Of a continuation after its context."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Each of its tokens is the likeliest one at its place."""


class Reader:
    """A model that remembers what it has read: a sequence that begins alike is read from there on."""

    def __init__(self, llama: Any, reuse: bool = True) -> None:
        self._llama = llama
        self._reuse = reuse
        self._read: list[int] = []
        clear(llama)

    def logits(self, tokens: Sequence[int], count: int) -> Iterator[np.ndarray]:
        """Logits after each of the last `count` of `tokens`, in parts: float32 [n, vocabulary].

        Each part is a view of llama.cpp's own memory, valid until the next. Raises UserError if
        llama.cpp fails.
        """
        kept = self._keep(tokens, len(tokens) - count)
        for first in range(kept, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            wanted = min(len(part), first + len(part) - (len(tokens) - count))
            rows = last_logits(self._llama, part, first, max(wanted, 0))
            self._read += part
            if len(rows):
                yield rows

    def _keep(self, tokens: Sequence[int], most: int) -> int:
        """Forget what does not begin `tokens`, or comes after its first `most`; return what is left."""
        kept = 0
        if self._reuse:
            for ours, theirs in zip(self._read, tokens[:most], strict=False):
                if ours != theirs:
                    break
                kept += 1
        llama_cpp = import_llama_cpp()
        memory = llama_cpp.llama_get_memory(self._llama.ctx)
        # a recurrent model cannot go back
        if kept == 0 or not llama_cpp.llama_memory_seq_rm(memory, 0, kept, -1):
            clear(self._llama)
            kept = 0
        del self._read[kept:]
        return kept


def score(llama: Any, requests: Sequence[Request], advance: Callable[[], None] = lambda: None,
          reuse: bool = True) -> list[Score]:
    """The score of each of `requests`, all of which fit into the model's context.

    They are taken in the order of their tokens: the choices of a question follow each other, and so do
    prompts with the same examples. Without `reuse` each is read from its first token on. `advance` is
    called after each. Raises UserError if llama.cpp fails, or if logits are not finite.
    """
    reader = Reader(llama, reuse)
    scores: dict[int, Score] = {}
    context: Sequence[int] | None = None
    after_context: np.ndarray | None = None
    for index in sorted(range(len(requests)), key=lambda index: tuple(map(list, requests[index]))):
        ours, continuation = requests[index]
        if after_context is None or ours != context or not reuse:
            context, after_context = ours, next(reader.logits(ours, 1)).copy()
        scores[index] = _score(reader, ours, continuation, after_context)
        advance()
    return [scores[index] for index in range(len(requests))]


def _score(reader: Reader, context: Sequence[int], continuation: Sequence[int],
           after_context: np.ndarray) -> Score:
    import numpy as np

    def parts() -> Iterator[np.ndarray]:
        yield after_context
        if len(continuation) > 1:
            yield from reader.logits([*context, *continuation[:-1]], len(continuation) - 1)

    total, greedy, done = 0.0, True, 0
    for logits in parts():
        targets = np.asarray(continuation[done : done + len(logits)])
        total -= float(negative_log_likelihoods(logits, targets).sum())
        greedy = greedy and bool((logits.argmax(axis=1) == targets).all())
        done += len(logits)
    if not np.isfinite(total):
        raise UserError("The model's logits are not finite; convert it again from sound weights.")
    return Score(total, greedy)
