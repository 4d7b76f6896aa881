"""How far a model's next-token distributions are from those of a reference, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.errors import UserError
from skipcat_edge.perplexity import (
    Perplexity,
    log_softmax,
    mean_and_error,
    open_for_perplexity,
    picked,
    row_blocks,
    start_token,
)
from skipcat_edge.reference import LiveReference, Reference, finite_logits
from skipcat_edge.session import BATCH, import_llama_cpp, model_info, open_model

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Divergence:
    """Means over the predicted tokens, each with its standard error."""

    kl: float
    """KL(reference || model) in nats per token."""
    kl_se: float
    top1: float
    """Share of tokens, 0 to 1, for which both models hold the same next token most likely."""
    top1_se: float


@dataclass(frozen=True)
class RowComparison:
    """What both models say about each of n tokens; all fields are arrays [n]."""

    losses: np.ndarray
    """The model's negative log-likelihood of the text's token, in nats."""
    kl: np.ndarray
    """KL(reference || model), in nats."""
    same_top: np.ndarray
    """Whether both models' most likely token is the same one."""


def open_pair(path: Path, reference: Path, window: int,
              threads: int | None = None) -> tuple[Any, LiveReference]:
    """Load both models, each with a context of one window.

    Raises UserError as `open_for_perplexity` and `check_reference`.
    """
    check_reference(path, reference)
    model = open_for_perplexity(path, window, threads)
    return model, LiveReference(open_for_perplexity(reference, window, threads))


def check_reference(path: Path, reference: Path) -> None:
    """Raises UserError if `reference` is an embedding model, or has another vocabulary than `path`."""
    if model_info(reference).embedding:
        raise UserError(f"{reference} is an embedding model, but {path} predicts tokens; "
                        "give the dense file it was made from.")
    ours, theirs = (open_model(file, context=BATCH, vocabulary_only=True) for file in (path, reference))
    try:
        _check_vocabularies(ours, theirs, path, reference)
    finally:
        ours.close()
        theirs.close()


def compare(llama: Any, reference: Reference, chunks: Sequence[Sequence[int]],
            advance: Callable[[], None] = lambda: None) -> tuple[Perplexity, Divergence]:
    """The perplexity of `llama` over `chunks`, as `perplexity` computes it, and its divergence.

    Both models read the same tokens, the start token of `llama` included. `advance` is called after
    each chunk. Raises UserError if llama.cpp fails, or if logits are not finite.
    """
    import numpy as np

    start = start_token(llama)
    parts: list[RowComparison] = []
    for chunk in chunks:
        tokens = [start, *chunk[:-1]]
        # Views of two contexts' memory: neither call overwrites the other's logits.
        ours, theirs = finite_logits(llama, "model", tokens), reference(tokens)
        parts.append(compare_rows(ours, theirs, np.asarray(chunk)))
        advance()
    losses = np.concatenate([part.losses for part in parts])
    kl = mean_and_error(np.concatenate([part.kl for part in parts]))
    top1 = mean_and_error(np.concatenate([part.same_top for part in parts]))
    return Perplexity.of(losses), Divergence(*kl, *top1)


def compare_rows(logits: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> RowComparison:
    """Compare finite logits [n, vocabulary] of both models; the text's tokens are `targets` [n]."""
    import numpy as np

    count = len(targets)
    found = RowComparison(np.empty(count), np.empty(count), np.empty(count, bool))
    for rows in row_blocks(count):
        ours, theirs = log_softmax(logits[rows]), log_softmax(reference[rows])
        found.losses[rows] = -picked(ours, targets[rows])
        # Of the logits as they are: in log-probabilities tokens may tie that did not before.
        found.same_top[rows] = logits[rows].argmax(axis=1) == reference[rows].argmax(axis=1)
        # A divergence is never negative, but the sum's rounding errors can make it -1e-17.
        found.kl[rows] = np.maximum((np.exp(theirs) * (theirs - ours)).sum(axis=1), 0.0)
    return found


def _check_vocabularies(llama: Any, reference: Any, path: Path, reference_path: Path) -> None:
    sizes = llama.n_vocab(), reference.n_vocab()
    if sizes[0] != sizes[1]:
        raise UserError(f"{path} has a vocabulary of {sizes[0]:,} tokens, but {reference_path} one of "
                        f"{sizes[1]:,}; give the dense file it was made from.")
    for token, (ours, theirs) in enumerate(zip(_pieces(llama), _pieces(reference), strict=True)):
        if ours != theirs:
            raise UserError(f"Token {token} is {_shown(ours)} in {path}, but {_shown(theirs)} in "
                            f"{reference_path}; give the dense file it was made from.")


def _pieces(llama: Any) -> list[bytes]:
    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    return [llama_cpp.llama_vocab_get_text(vocab, token) for token in range(llama.n_vocab())]


def _shown(piece: bytes) -> str:
    return repr(piece.decode("utf-8", "replace"))
