"""What `eval` measured, as rows of a model card."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from skipcat_edge.card import Figure, add_figures, card_path, new_card, read_card
from skipcat_edge.card_source import require_hub, source_of_gguf
from skipcat_edge.digest import sha256
from skipcat_edge.divergence import Divergence
from skipcat_edge.embedding_eval import EmbeddingSimilarity
from skipcat_edge.evaluation import Evaluation
from skipcat_edge.format import KEY_CALIBRATION_SHA256
from skipcat_edge.inspection import inspect
from skipcat_edge.output import atomic_output, check_output
from skipcat_edge.perplexity import Perplexity
from skipcat_edge.task_eval import TaskResult, with_error


def require_card(file: Path) -> None:
    """Raise UserError, before anything is measured, where the card of `file` could not be written."""
    require_hub()
    path = card_path(file)
    check_output(path, force=True)
    if path.exists():
        read_card(path)


def write_figures(file: Path, figures: Sequence[Figure]) -> Path:
    """Put `figures` into the card of `file`, which is made from the file's metadata where there is none.

    Returns the card's path. Raises UserError where it cannot be read or written.
    """
    path = card_path(file)
    card = read_card(path) if path.exists() else new_card(file, source_of_gguf(file))
    with atomic_output(path, force=True) as partial:
        partial.write_text(add_figures(card, file, figures), "utf-8")
    return path


def figures_of(found: Evaluation, file: Path, text: Path | None, window: int, reference: Path | None,
               context: int | None) -> Iterator[Figure]:
    """All that was found: on `text` in windows of `window` tokens, and in tasks with `context`."""
    at = "" if found.rank_level is None else f" at level {found.rank_level:g}"
    if text is not None and found.perplexity is not None:
        yield from _text_figures(found.perplexity, found.divergence, file, text, window, reference, at)
    if text is not None and reference is not None and found.similarity is not None:
        yield from similarity_figures(found.similarity, file, text, reference, at)
    if found.tasks:
        yield from task_figures(found.tasks, reference, context, at)


def _text_figures(perplexity: Perplexity, divergence: Divergence | None, file: Path, text: Path, window: int,
                  reference: Path | None, at: str) -> Iterator[Figure]:
    on = f"{_named(text, file)}, {perplexity.tokens:,} tokens, windows of {window}"
    yield _figure(f"perplexity{at}", f"{perplexity.ppl:.4f} ± {perplexity.ppl_se:.4f}", on)
    if divergence is not None and reference is not None:
        dense = f"`{reference.name}`"
        yield _figure(f"KL divergence from {dense}{at}, nats per token",
                      f"{divergence.kl:.6f} ± {divergence.kl_se:.6f}", on)
        yield _figure(f"top-1 agreement with {dense}{at}",
                      f"{100 * divergence.top1:.2f} ± {100 * divergence.top1_se:.2f} %", on)


def similarity_figures(found: EmbeddingSimilarity, file: Path, text: Path,
                       reference: Path, at: str = "") -> Iterator[Figure]:
    """The mean and the lowest cosine."""
    on, dense = f"{_named(text, file)}, {found.lines:,} lines", f"`{reference.name}`"
    yield _figure(f"mean cosine to {dense}{at}", f"{found.cosine_mean:.4f} ± {found.cosine_se:.4f}", on)
    yield _figure(f"lowest cosine to {dense}{at}", f"{found.cosine_min:.4f}", on)


def task_figures(results: Sequence[TaskResult], reference: Path | None, context: int | None,
                 at: str = "") -> Iterator[Figure]:
    """A row for each metric, the reference's value in it."""
    for result in results:
        value = with_error(result.value, result.value_se)
        if reference is not None and result.reference is not None:
            value += f" (`{reference.name}`: {with_error(result.reference, result.reference_se)})"
        metric = result.metric if result.filter == "none" else f"{result.metric} ({result.filter})"
        on = f"{result.samples:,} samples, lm-eval {version('lm_eval')}"
        on += "" if context is None else f", context of {context} tokens"
        yield _figure(f"{result.task}, {metric}{at}", value, on)


def _named(text: Path, file: Path) -> str:
    digest = sha256(text)
    seen = inspect(file).keys.get(KEY_CALIBRATION_SHA256) == digest
    return f"`{text.name}`{', the calibration text' if seen else ''} (SHA-256 `{digest}`)"


def _figure(name: str, value: str, on: str) -> Figure:
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return Figure(name, value, on, today.isoformat())
