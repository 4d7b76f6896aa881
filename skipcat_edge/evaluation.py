"""Everything `eval` says of a model that predicts tokens: figures on a text, and what the model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipcat_edge.divergence import Divergence, check_reference, compare
from skipcat_edge.errors import UserError
from skipcat_edge.levels import file_levels, require_level, set_level
from skipcat_edge.perplexity import Perplexity, open_for_perplexity, perplexity, start_token, text_chunks
from skipcat_edge.reference import LiveReference, Reference, stored_reference
from skipcat_edge.samples import PROMPT_TOKENS, Sample, continuations, prompts_of, text_of
from skipcat_edge.session import BATCH, model_info, open_generative, open_model

Begin = Callable[[str, int], Callable[[], None]]
"""Hears a title and a number of steps; what it returns is called after each of them."""


@dataclass(frozen=True)
class Evaluation:
    """Of one model."""

    perplexity: Perplexity
    divergence: Divergence | None
    """None without a reference."""
    samples: tuple[Sample, ...]
    rank_level: float | None = None
    """The level that was asked for."""

    def to_json(self) -> dict[str, Any]:
        """One flat object; `samples` and `rank_level` only where there are some."""
        values = asdict(self.perplexity) | (asdict(self.divergence) if self.divergence else {})
        values |= {} if self.rank_level is None else {"rank_level": self.rank_level}
        return values | ({"samples": [asdict(sample) for sample in self.samples]} if self.samples else {})


@dataclass(frozen=True)
class _Text:
    chunks: list[list[int]]
    windows: list[list[int]]
    """The chunks as they are computed: each after the start token, without its last token."""
    prompts: list[list[int]]
    beginnings: list[str]
    """The prompts' text."""
    vocabulary: int
    """Its number of tokens."""


def evaluate(file: str | Path, text: str, *, name: str = "The text", window: int = 256,
             max_tokens: int | None = None, reference: str | Path | None = None, cache: bool = True,
             samples: int = 0, sample_tokens: int = 48, threads: int | None = None,
             rank_level: float | None = None,
             begin: Begin = lambda title, total: lambda: None) -> Evaluation:
    """Perplexity of `file` on `text` (called `name` in errors) in windows of `window` tokens, divergence from
    `reference`, and the likeliest `sample_tokens` tokens after `samples` beginnings; at `rank_level`, None
    for the full one.

    With `cache`, the reference's logits are kept on disk and one model is in memory at a time. Raises
    UserError for what cannot be read, loaded or compared.
    """
    model, dense_file = Path(file), None if reference is None else Path(reference)
    if model_info(model).embedding:
        raise UserError(f"{model} is an embedding model and predicts no tokens; compare it with "
                        "embedding_eval.compare, or `skipcat-edge eval`.")
    if rank_level is not None:
        rank_level = require_level(model, file_levels(model), rank_level)
    if dense_file is not None:
        check_reference(model, dense_file)
    read = _tokenize(model, text, name, window, max_tokens, samples)
    theirs: list[str | None] = [None] * len(read.prompts)
    dense: Reference | None = None
    if dense_file is not None:
        if cache:
            dense = stored_reference(dense_file, read.windows, read.vocabulary,
                                     lambda: open_for_perplexity(dense_file, window, threads),
                                     lambda: begin(f"windows of {dense_file.name}", len(read.windows)))
        else:
            dense = LiveReference(open_for_perplexity(dense_file, window, threads))
        theirs = [*_samples(dense_file, read.prompts, sample_tokens, threads, None)]
    llama = open_for_perplexity(model, window, threads)
    try:
        if rank_level is not None:
            set_level(llama, rank_level)
        advance = begin(f"windows of {model.name}", len(read.chunks))
        if dense is None:
            found, divergence = perplexity(llama, read.chunks, advance), None
        else:
            found, divergence = compare(llama, dense, read.chunks, advance)
    finally:
        llama.close()
        if isinstance(dense, LiveReference):
            dense.close()
    ours = _samples(model, read.prompts, sample_tokens, threads, rank_level)
    return Evaluation(found, divergence, tuple(map(Sample, read.beginnings, ours, theirs)), rank_level)


def _tokenize(file: Path, text: str, name: str, window: int, max_tokens: int | None, samples: int) -> _Text:
    """Without weights: the reference is gone before the model is loaded."""
    vocabulary = open_model(file, context=BATCH, vocabulary_only=True)
    try:
        chunks = text_chunks(vocabulary, text, window, max_tokens, name=name)
        start = start_token(vocabulary)
        prompts = prompts_of(chunks, start, samples)
        return _Text(chunks, [[start, *chunk[:-1]] for chunk in chunks], prompts,
                     [text_of(vocabulary, prompt) for prompt in prompts], vocabulary.n_vocab())
    finally:
        vocabulary.close()


def _samples(file: Path, prompts: Sequence[Sequence[int]], max_tokens: int, threads: int | None,
             rank_level: float | None) -> list[str]:
    if not prompts:
        return []
    llama = open_generative(file, PROMPT_TOKENS + 1 + max_tokens, threads)
    try:
        if rank_level is not None:
            set_level(llama, rank_level)
        return continuations(llama, prompts, max_tokens)
    finally:
        llama.close()
