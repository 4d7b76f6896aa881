"""How close a model's sentence embeddings stay to those of a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.errors import NotFiniteError, UserError
from skipcat_edge.perplexity import mean_and_error
from skipcat_edge.session import BATCH, ModelInfo, model_info, open_embedding

if TYPE_CHECKING:
    import numpy as np

_LINES_AT_ONCE = 16


@dataclass(frozen=True)
class EmbeddingSimilarity:
    """Cosines between two models' embeddings of the same lines."""

    cosine_mean: float
    cosine_min: float
    lines: int
    cosine_se: float = 0.0
    """Standard error of `cosine_mean`."""


def lines_of(text: str, name: str = "The text") -> list[str]:
    """The lines of `text` that are not empty. Raises UserError, which begins with `name`, if none is."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{name} is empty; give a text with a sentence on each line.")
    return lines


def open_pair(path: Path, reference: Path, threads: int | None = None) -> tuple[Any, Any]:
    """Load both models with one context, that of the shorter one or 512 tokens.

    Raises UserError as `session.open_model`, if one is not an embedding model, or if the
    embeddings differ in size.
    """
    infos: dict[Path, ModelInfo] = {each: model_info(each) for each in (path, reference)}
    for each, info in infos.items():
        if not info.embedding:
            raise UserError(f"{each} is not an embedding model; it has no sentence embedding to compare.")
    context = min([BATCH, *(info.context_length for info in infos.values() if info.context_length)])
    models = open_embedding(path, context, threads), open_embedding(reference, context, threads)
    sizes = [model.n_embd() for model in models]
    if sizes[0] != sizes[1]:
        raise UserError(f"{path} embeds in {sizes[0]} numbers, but {reference} in {sizes[1]}; "
                        "give the dense file it was made from.")
    return models


def compare(llama: Any, reference: Any, lines: Sequence[str],
            advance: Callable[[int], None] = lambda _: None) -> EmbeddingSimilarity:
    """Cosines between the embeddings of `lines`, longer ones cut to the context.

    `advance` hears how many lines were done. Raises NotFiniteError if an embedding is not finite.
    """
    import numpy as np

    cosines: list[np.ndarray] = []
    for first in range(0, len(lines), _LINES_AT_ONCE):
        some = lines[first : first + _LINES_AT_ONCE]
        cosines.append((embed(llama, some) * embed(reference, some)).sum(axis=1))
        advance(len(some))
    values = np.concatenate(cosines)
    if not np.isfinite(values).all():
        raise NotFiniteError("An embedding is not finite; convert the model again from sound weights.")
    mean, error = mean_and_error(values)
    return EmbeddingSimilarity(mean, float(values.min()), len(values), error)


def embed(llama: Any, lines: Sequence[str]) -> np.ndarray:
    """Embeddings of length 1: float64 [lines, embedding]."""
    import numpy as np

    rows = np.asarray(llama.embed([line.encode("utf-8", "replace").decode() for line in lines]), np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
