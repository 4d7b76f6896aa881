"""Everything `eval` says of a model: figures on a text, what it writes, and what it reaches in tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.divergence import Divergence, check_reference, compare
from skipcat_edge.embedding_eval import EmbeddingSimilarity, lines_of, open_pair
from skipcat_edge.embedding_eval import compare as compare_embeddings
from skipcat_edge.errors import UserError, require_at_least
from skipcat_edge.levels import Schedule, file_levels, parse_schedule, require_level, set_level
from skipcat_edge.perplexity import Perplexity, open_for_perplexity, perplexity, start_token, text_chunks
from skipcat_edge.reference import LiveReference, Reference, stored_reference
from skipcat_edge.samples import PROMPT_TOKENS, Sample, continuations, prompts_of, spread, text_of
from skipcat_edge.session import BATCH, model_info, open_generative, open_model

if TYPE_CHECKING:
    from skipcat_edge.progressive_eval import ProgressiveEvaluation
    from skipcat_edge.task_eval import TaskResult

Begin = Callable[[str, int], Callable[[], None]]
"""Hears a title and a number of steps; what it returns is called after each of them."""


@dataclass(frozen=True)
class Evaluation:
    """Of one model; what was not asked for is None or empty."""

    perplexity: Perplexity | None = None
    """Of a text; None for an embedding model."""
    divergence: Divergence | None = None
    """None without a reference."""
    similarity: EmbeddingSimilarity | None = None
    """Of an embedding model; None for others."""
    samples: tuple[Sample, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    rank_level: float | None = None
    """The level that was asked for."""
    progressive: ProgressiveEvaluation | None = None
    """By a schedule of levels, which is measured instead of the perplexity."""

    def to_json(self) -> dict[str, Any]:
        """One flat object; `rank_level`, `samples` and `tasks` only where there are some."""
        values: dict[str, Any] = {} if self.rank_level is None else {"rank_level": self.rank_level}
        for figures in (self.perplexity, self.divergence, self.similarity):
            values |= {} if figures is None else asdict(figures)
        values |= {} if self.progressive is None else self.progressive.to_json()
        if self.samples:
            values["samples"] = [asdict(sample) for sample in self.samples]
        if self.tasks:
            values["tasks"] = [task.to_json() for task in self.tasks]
        return values


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


def evaluate(file: str | Path, text: str | None = None, *, name: str = "The text", window: int = 256,
             max_tokens: int | None = None, reference: str | Path | None = None, cache: bool = True,
             samples: int = 0, sample_tokens: int = 48, tasks: str | Sequence[str] = (),
             task_path: str | Path | None = None, limit: int | None = None, context: int | None = None,
             threads: int | None = None, rank_level: float | None = None,
             progressive: Schedule | str | None = None, prompts: int = 200,
             begin: Begin = lambda title, total: lambda: None) -> Evaluation:
    """Measure `file` on `text`, on `tasks`, or on both; at `rank_level`, None for the full one.

    With `progressive`, a schedule of levels: by token after a prompt, as `progressive_eval.measure`.

    A model that predicts tokens: perplexity, with `reference` the divergence from it as well. An embedding
    model: the cosine between its embeddings of the text's lines and the `reference`'s, which it needs.

    Args:
        name: of the text, in errors.
        window: tokens of a window, BOS included.
        max_tokens: first tokens of the text that are read (None: all).
        reference: the dense GGUF that `file` was made from. With `cache` its logits are kept on disk, and one
            model is in memory at a time.
        samples: beginnings of the text that both models continue, by their likeliest `sample_tokens` tokens.
        tasks: lm-eval's names, or task files; these and `task_path`, `limit` and `context`, there `length`,
            as `task_eval.measure_tasks` takes them.
        threads: None takes one for each physical core.
        prompts: of `progressive`, each the beginning of a window; fewer where the text has no more windows.
        begin: hears a title and a number of steps; what it returns is called after each.

    Raises:
        UserError: for what cannot be read, loaded or compared, and numbers out of range.
    """
    require_at_least(2, window=window, context=context)
    require_at_least(1, max_tokens=max_tokens, sample_tokens=sample_tokens, limit=limit, threads=threads,
                     prompts=prompts)
    require_at_least(0, samples=samples)
    names = [tasks] if isinstance(tasks, str) else [*tasks]
    model, dense_file = Path(file), None if reference is None else Path(reference)
    if text is None and not names:
        raise UserError("There is nothing to measure on; give a text or tasks.")
    if rank_level is not None:
        rank_level = require_level(model, file_levels(model), rank_level)
    schedule = parse_schedule(progressive) if isinstance(progressive, str) else progressive
    if schedule is not None:
        schedule = schedule.checked(model, file_levels(model))
    if model_info(model).embedding:
        if schedule is not None:
            raise UserError(f"{model} is an embedding model and writes no text; leave out --progressive.")
        if names or text is None:
            raise UserError(f"{model} is an embedding model and answers no tasks; use --text and "
                            "--reference.")
        if samples:
            raise UserError(f"{model} is an embedding model and writes no text; leave out --samples.")
        if max_tokens is not None:
            raise UserError("--max-tokens is for perplexity; an embedding model is compared on every line.")
        if dense_file is None:
            raise UserError(f"{model} is an embedding model; give its dense GGUF with --reference.")
        similarity = _similarity(model, dense_file, lines_of(text, name), threads, rank_level, begin)
        return Evaluation(similarity=similarity, rank_level=rank_level)
    if schedule is not None:
        if text is None or names or samples or rank_level is not None:
            raise UserError("--progressive measures on a text alone; give --text, and leave out --tasks, "
                            "--samples and --rank-level.")
        if dense_file is None:
            raise UserError("--progressive compares with the dense GGUF that the file was made from; give "
                            "it with --reference.")
        return Evaluation(progressive=_progressive(model, dense_file, text, name, window, max_tokens, cache,
                                                   schedule, prompts, threads, begin))
    if dense_file is not None:
        check_reference(model, dense_file)
    read = None if text is None else _tokenize(model, text, name, window, max_tokens, samples)
    results: Sequence[TaskResult] = ()
    if names:  # first: a wrong name shows at once
        from skipcat_edge.task_eval import measure_tasks

        results = measure_tasks(
            model, names, task_path=None if task_path is None else Path(task_path), limit=limit,
            length=context, reference=dense_file, threads=threads, rank_level=rank_level, begin=begin)
    if read is None:
        return Evaluation(tasks=tuple(results))
    theirs: list[str | None] = [None] * len(read.prompts)
    dense: Reference | None = None
    if dense_file is not None:
        dense = _reference(dense_file, read.windows, read.vocabulary, window, cache, threads, begin)
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
    return Evaluation(found, divergence, samples=tuple(map(Sample, read.beginnings, ours, theirs)),
                      tasks=tuple(results), rank_level=rank_level)


def _reference(file: Path, windows: Sequence[Sequence[int]], vocabulary: int, window: int, cache: bool,
               threads: int | None, begin: Begin) -> Reference:
    def open_() -> Any:
        return open_for_perplexity(file, window, threads)

    if not cache:
        return LiveReference(open_())
    return stored_reference(file, windows, vocabulary, open_,
                            lambda: begin(f"windows of {file.name}", len(windows)))


def _progressive(file: Path, dense_file: Path, text: str, name: str, window: int, max_tokens: int | None,
                 cache: bool, schedule: Schedule, prompts: int, threads: int | None,
                 begin: Begin) -> ProgressiveEvaluation:
    from skipcat_edge.progressive_eval import check_window, measure, require_rouge

    require_rouge()
    check_window(window if max_tokens is None else min(window, max_tokens + 1), schedule)
    check_reference(file, dense_file)
    read = _tokenize(file, text, name, window, max_tokens, 0)
    chunks, windows = spread(read.chunks, prompts), spread(read.windows, prompts)
    dense = _reference(dense_file, windows, read.vocabulary, window, cache, threads, begin)
    try:
        return measure(file, dense_file, dense, windows[0][0], chunks, schedule, threads=threads, begin=begin)
    finally:
        if isinstance(dense, LiveReference):
            dense.close()


def _similarity(file: Path, reference: Path, lines: Sequence[str], threads: int | None,
                rank_level: float | None, begin: Begin) -> EmbeddingSimilarity:
    models = open_pair(file, reference, threads)
    step = begin("lines", len(lines))

    def advance(count: int) -> None:
        for _ in range(count):
            step()

    try:
        if rank_level is not None:
            set_level(models[0], rank_level)
        return compare_embeddings(*models, lines, advance)
    finally:
        for model in models:
            model.close()


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
