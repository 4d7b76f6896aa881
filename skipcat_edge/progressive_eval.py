"""How close a model stays to its dense reference while a schedule changes its level, token by token."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.decoding import clear
from skipcat_edge.divergence import Divergence, compare_rows
from skipcat_edge.errors import UserError
from skipcat_edge.extra import require_packages
from skipcat_edge.generation import detokenize
from skipcat_edge.levels import Schedule, file_levels, set_level
from skipcat_edge.perplexity import mean_and_error, require_window
from skipcat_edge.reference import Reference, require_finite
from skipcat_edge.samples import PROMPT_TOKENS
from skipcat_edge.sequences import Sequences
from skipcat_edge.session import CONTEXT_STEP, import_llama_cpp, open_model
from skipcat_edge.traffic import weight_bytes_per_token

if TYPE_CHECKING:
    import numpy as np

    from skipcat_edge.evaluation import Begin

_AT_ONCE = 16
"""Prompts that are computed together: few enough for their keys and values."""
_REFERENCE_BYTES = 2**28
"""Of the reference's logits that are in memory at a time."""

_Visit = Callable[[int, Sequence[int], "np.ndarray"], Sequence[int | None]]
"""(number of a token, prompts, logits that it is chosen by) -> that token after each prompt; None ends it."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens after the prompts, all computed at one level."""

    first: int
    last: int
    level: float
    kl: float
    """KL(reference || model) in nats per token; each figure's standard error is over the prompts."""
    kl_se: float
    top1: float
    """Share of tokens, 0 to 1, for which both models hold the same next token most likely."""
    top1_se: float


@dataclass(frozen=True)
class ProgressiveEvaluation:
    """Of a model whose level follows a schedule. The text's tokens follow each prompt, whatever the model
    says; what it would write itself is `rouge_l`'s."""

    schedule: str
    prompts: int
    prompt_tokens: int
    """Of each prompt, without the start token."""
    tokens: int
    """After each prompt."""
    bytes_per_token: float
    """Of weights that decoding a token reads; the first one comes out of the prompt and is not counted."""
    divergence: Divergence
    """Over all tokens, as the spans'."""
    rouge_l: float
    """F-measure between greedy continuations of the prompts, the model's by the schedule and the
    reference's; 0 to 1."""
    rouge_l_se: float
    spans: tuple[Span, ...]
    """The schedule's levels in turn; 1, 2, 4, 8, ... tokens where it has but one."""
    positions: tuple[Span, ...]
    """Each token by itself."""

    def to_json(self) -> dict[str, Any]:
        """One object; `positions` by `token`."""
        values = asdict(self)
        values |= values.pop("divergence")
        for each in values["positions"]:
            each["token"] = each.pop("first")
            del each["last"]
        return {"progressive": values.pop("schedule"), **values}


def require_rouge() -> None:
    """Raises UserError where rouge-score is missing."""
    require_packages("ROUGE-L needs", "eval", "rouge_score")


def check_window(window: int, schedule: Schedule) -> None:
    """Raises UserError where a window has no token after its prompt, or too few for the `schedule`."""
    count = window - 1 - PROMPT_TOKENS
    last, level = schedule.steps[-1]
    if count < 1:
        raise UserError(f"A window of {window} has no token after a prompt of {PROMPT_TOKENS}; use --window "
                        f"{PROMPT_TOKENS + 2} or more.")
    if last >= count:
        raise UserError(f"The schedule comes to level {level:g} at token {last}, but a window of {window} "
                        f"ends after {count}; use --window {last + PROMPT_TOKENS + 2} or more.")


def measure(file: Path, dense: Path, reference: Reference, start: int, chunks: Sequence[Sequence[int]],
            schedule: Schedule, *, threads: int | None = None, at_once: int = _AT_ONCE,
            begin: Begin = lambda title, total: lambda: None) -> ProgressiveEvaluation:
    """Measure `file` by a `schedule` of its levels against `dense`, of whose logits `reference` knows those
    of [start, *chunk[:-1]] of each of `chunks`, all of one length.

    A prompt is the `start` token and a chunk's first ones. `at_once` prompts are computed together. Raises
    UserError if a model does not load, llama.cpp fails, or logits are not finite.
    """
    require_rouge()
    count = len(chunks[0]) - PROMPT_TOKENS
    known, theirs = file_levels(file), file_levels(dense)[-1:] * count
    levels = [known[-1], *(schedule.at(index) for index in range(1, count))]
    prompts = [[start, *chunk[:PROMPT_TOKENS]] for chunk in chunks]
    said = _with(dense, at_once, count, threads, lambda model: _continuations(
        model, prompts, theirs, at_once, begin(f"continuations by {dense.name}", len(prompts))))

    def ours(model: Sequences) -> tuple[np.ndarray, np.ndarray, list[str]]:
        kl, same = _teacher_forced(model, reference, start, chunks, levels, at_once,
                                   begin(f"prompts of {file.name}", len(chunks)))
        return kl, same, _continuations(model, prompts, levels, at_once,
                                        begin(f"continuations by {file.name}", len(prompts)))

    kl, same, written = _with(file, at_once, count, threads, ours)
    import numpy as np

    rouge = mean_and_error(np.array([rouge_l(*pair) for pair in zip(said, written, strict=True)]))
    weights = {level: weight_bytes_per_token(file, place) for place, level in enumerate(known)}
    ends = [0, *_ends(levels, schedule)]
    return ProgressiveEvaluation(
        schedule=str(schedule), prompts=len(chunks), prompt_tokens=PROMPT_TOKENS, tokens=count,
        bytes_per_token=statistics.fmean(weights[level] for level in levels[1:] or levels),
        divergence=Divergence(*_figures(kl, same)), rouge_l=rouge[0], rouge_l_se=rouge[1],
        spans=tuple(Span(first, end - 1, levels[first], *_figures(kl[:, first:end], same[:, first:end]))
                    for first, end in pairwise(ends)),
        positions=tuple(Span(i, i, levels[i], *_figures(kl[:, i : i + 1], same[:, i : i + 1]))
                        for i in range(count)),
    )


def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L's F-measure of `text`: of the longest common subsequence of both texts' words."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    if reference == text:  # also where the scorer sees no words: it knows Latin letters and digits only
        return 1.0
    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer())
    return float(scorer.score(reference, text)["rougeL"].fmeasure)


def _with(file: Path, at_once: int, count: int, threads: int | None, use: Callable[[Sequences], Any]) -> Any:
    length = 1 + PROMPT_TOKENS + count
    require_window(file, length)
    llama = open_model(file, context=CONTEXT_STEP, batch=1, ubatch=1, threads=threads)
    model = Sequences(llama, at_once, length, at_once * (1 + PROMPT_TOKENS))
    try:
        return use(model)
    finally:
        model.close()


def _decode(model: Sequences, prompts: Sequence[Sequence[int]], levels: Sequence[float],
            visit: _Visit) -> None:
    """Compute each token after `prompts`, of one length, at its level; `visit` says what it is."""
    clear(model)
    tokens, position = {number: [*prompt] for number, prompt in enumerate(prompts)}, 0
    for index, level in enumerate(levels):
        set_level(model, level)
        logits = require_finite(model.last_logits(tokens, position), "model")
        position = len(prompts[0]) + index
        chosen = visit(index, [*tokens], logits)
        tokens = {number: [token] for number, token in zip(tokens, chosen, strict=True) if token is not None}
        if not tokens:
            break


def _teacher_forced(model: Sequences, reference: Reference, start: int, chunks: Sequence[Sequence[int]],
                    levels: Sequence[float], at_once: int,
                    advance: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
    """KL and whether the likeliest token is the same one: [prompts, tokens] each."""
    import numpy as np

    kl, same = np.empty((len(chunks), len(levels))), np.empty((len(chunks), len(levels)), bool)
    size = max(1, min(at_once, _REFERENCE_BYTES // (4 * model.n_vocab * len(levels))))
    theirs = np.empty((size, len(levels), model.n_vocab), np.float32)
    for rows in (slice(first, first + size) for first in range(0, len(chunks), size)):
        for logits, chunk in zip(theirs, chunks[rows], strict=False):  # copied: the next call overwrites it
            logits[:] = reference([start, *chunk[:-1]])[PROMPT_TOKENS:]
        _compare(model, start, chunks[rows], levels, theirs, kl[rows], same[rows])
        for _ in chunks[rows]:
            advance()
    return kl, same


def _compare(model: Sequences, start: int, chunks: Sequence[Sequence[int]], levels: Sequence[float],
             theirs: np.ndarray, kl: np.ndarray, same: np.ndarray) -> None:
    """Fill `kl` and `same`, from the reference's logits [prompts, tokens, vocabulary]."""
    import numpy as np

    targets = np.array([chunk[PROMPT_TOKENS:] for chunk in chunks])

    def visit(index: int, numbers: Sequence[int], logits: np.ndarray) -> Sequence[int]:
        found = compare_rows(logits, theirs[: len(numbers), index], targets[:, index])
        kl[:, index], same[:, index] = found.kl, found.same_top
        return [int(token) for token in targets[:, index]]

    _decode(model, [[start, *chunk[:PROMPT_TOKENS]] for chunk in chunks], levels, visit)


def _continuations(model: Sequences, prompts: Sequence[Sequence[int]], levels: Sequence[float], at_once: int,
                   advance: Callable[[], None]) -> list[str]:
    """The likeliest tokens after each prompt, until the text ends."""
    texts = []
    for first in range(0, len(prompts), at_once):
        for tokens in _continued(model, prompts[first : first + at_once], levels):
            texts.append(detokenize(model, tokens))
            advance()
    return texts


def _continued(model: Sequences, prompts: Sequence[Sequence[int]],
               levels: Sequence[float]) -> list[list[int]]:
    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    written: list[list[int]] = [[] for _ in prompts]

    def visit(_: int, numbers: Sequence[int], logits: np.ndarray) -> Sequence[int | None]:
        chosen: list[int | None] = []
        for number, token in zip(numbers, map(int, logits.argmax(axis=1)), strict=True):
            ended = llama_cpp.llama_vocab_is_eog(vocab, token)
            chosen.append(None if ended else token)
            written[number] += [] if ended else [token]
        return chosen

    _decode(model, prompts, levels, visit)
    return written


def _ends(levels: Sequence[float], schedule: Schedule) -> list[int]:
    """Where each span ends."""
    if len(schedule.steps) == 1:
        return [*(2**power for power in range((len(levels) - 1).bit_length())), len(levels)]
    changes = [index for index, (before, after) in enumerate(pairwise(levels), 1) if before != after]
    return [*changes, len(levels)]


def _figures(kl: np.ndarray, same: np.ndarray) -> tuple[float, float, float, float]:
    """Mean and standard error of both; the tokens of one prompt are no independent samples."""
    return *mean_and_error(kl.mean(axis=1)), *mean_and_error(same.mean(axis=1))
