"""Perplexity of a text, in windows that each start with BOS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.decoding import all_logits
from skipcat_edge.errors import UserError
from skipcat_edge.session import import_llama_cpp, model_info, open_model

if TYPE_CHECKING:
    import numpy as np

_ROWS = 32  # float64 copies of logits are made for this many tokens at a time


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` tokens."""

    ppl: float
    ppl_se: float
    """Standard error of `ppl` by the delta method: ppl * std(nll) / sqrt(tokens)."""
    tokens: int
    """Tokens predicted: all of the windows but each one's BOS."""

    @staticmethod
    def of(losses: np.ndarray) -> Perplexity:
        """That of `losses` [tokens], each token's negative log-likelihood in nats."""
        mean, error = mean_and_error(losses)
        ppl = math.exp(mean)
        return Perplexity(ppl, ppl * error, len(losses))


def open_for_perplexity(path: Path, window: int, threads: int | None = None) -> Any:
    """Load `path` with a context of one window. Raises UserError as `session.open_model`, and
    `require_window`."""
    require_window(path, window)
    return open_model(path, context=window, batch=window, ubatch=window, threads=threads)


def require_window(path: Path, window: int) -> None:
    """Raises UserError if the model in `path` was trained for less than `window` tokens."""
    limit = model_info(path).context_length
    if 0 < limit < window:
        raise UserError(f"{path}: its context holds {limit} tokens; use --window {limit} or less.")


def start_token(llama: Any) -> int:
    """The token every window starts with: BOS, or EOS where the vocabulary has none (GPT-2, Qwen).

    Raises UserError if it has neither.
    """
    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    for token in (llama_cpp.llama_vocab_bos(vocab), llama_cpp.llama_vocab_eos(vocab)):
        if token >= 0:
            return int(token)
    raise UserError("The model's vocabulary has neither BOS nor EOS, so no window can start.")


def text_chunks(llama: Any, text: str, window: int, max_tokens: int | None = None,
                name: str = "The text") -> list[list[int]]:
    """Consecutive chunks of window - 1 tokens of `text`, of its first `max_tokens`.

    The text is tokenised once, without BOS and without special tokens. What is left at the end
    is dropped; only where `max_tokens` is less than one chunk, that shorter chunk is kept.
    Raises UserError, which begins with `name`, if the text has no tokens or fewer than one chunk.
    """
    tokens = list(llama.tokenize(text.encode("utf-8", errors="replace"), add_bos=False, special=False))
    if not tokens:
        raise UserError(f"{name} is empty; give a text of at least one window.")
    size = window - 1
    if len(tokens) < size and (max_tokens is None or len(tokens) < max_tokens):
        raise UserError(
            f"{name} has {len(tokens)} tokens, but a window of {window} needs {size}; "
            f"give a longer text or --window {len(tokens) + 1}."
        )
    tokens = tokens[:max_tokens]
    return [tokens[i : i + size] for i in range(0, max(len(tokens) - size, 0) + 1, size)]


def perplexity(llama: Any, chunks: Sequence[Sequence[int]],
               advance: Callable[[], None] = lambda: None) -> Perplexity:
    """Predict every token of every chunk, the first from BOS (see `start_token`).

    `advance` is called after each chunk. Raises UserError if llama.cpp fails, or if logits are
    not finite.
    """
    import numpy as np

    start = start_token(llama)
    losses: list[np.ndarray] = []
    for chunk in chunks:
        logits = all_logits(llama, [start, *chunk[:-1]])
        losses.append(negative_log_likelihoods(logits, np.asarray(chunk)))
        advance()
    nll = np.concatenate(losses)
    if not np.isfinite(nll).all():
        raise UserError("The model's logits are not finite; convert it again from sound weights.")
    return Perplexity.of(nll)


def negative_log_likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[targets]: float64 [n], of logits [n, vocabulary] and targets [n]."""
    import numpy as np

    result = np.empty(len(targets))
    for rows in row_blocks(len(targets)):
        result[rows] = -picked(log_softmax(logits[rows]), targets[rows])
    return result


def row_blocks(count: int) -> Iterator[slice]:
    """Slices of `count` rows that are small enough for float64 copies of their logits."""
    return (slice(first, first + _ROWS) for first in range(0, count, _ROWS))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats: float64 [n, vocabulary], of logits [n, vocabulary]."""
    import numpy as np

    rows: np.ndarray = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def picked(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """rows[i, columns[i]] for every i: [n], of rows [n, vocabulary] and columns [n]."""
    import numpy as np

    return np.take_along_axis(rows, columns[:, None], axis=1)[:, 0]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of `values` [n] and its standard error, 0 for a single value."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return float(values.mean()), spread / math.sqrt(len(values))
