"""Which files are worth having, and where a dense file is the better choice, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from skipcat_edge.compare.figures import (
    DECODE,
    DENSE,
    FIRST_TOKEN,
    SIZE,
    Axis,
    Comparison,
    Figures,
    Kind,
    ahead_by_noise,
    beats,
    better_loss,
)


def worth_having(comparison: Comparison) -> str:
    """One sentence: all files that are on a front by more than noise, each with its fronts."""
    fronts: dict[str, list[str]] = {}
    for axis in comparison.axes:
        for figures in _clearly_on(comparison, axis):
            fronts.setdefault(figures.name, []).append(axis.words)
    if not fronts:
        return "Worth having: the reference alone; no other file is smaller or faster by more than noise."
    by_fronts: dict[tuple[str, ...], list[str]] = {}
    for name, words in fronts.items():
        by_fronts.setdefault(tuple(words), []).append(name)
    parts = [f"by {listed(words)} {listed(names)}" for words, names in sorted(
        by_fronts.items(), key=lambda part: -len(part[0]))]
    return f"Worth having beside the reference: {'; '.join(parts)}."


def front_sentence(comparison: Comparison, axis: Axis) -> str:
    """Which files are on one front, and which of them only by noise."""
    on_front = [each for each in comparison.front(axis) if each.kind is not Kind.REFERENCE]
    if not on_front:
        return f"By {axis.words}: no file is worth its loss; none is better than the reference."
    clear = _clearly_on(comparison, axis)
    noisy = [each for each in on_front if each not in clear]
    parts = []
    if clear:
        shown = (f"{each.name} ({number(each.loss)})" for each in clear)
        parts.append(f"By {axis.words}, from the {_first_word(axis)} on: {listed([*shown])}.")
    else:
        parts.append(f"By {axis.words}: no file but the reference is on the front by more than noise.")
    if noisy:
        shown = (f"{each.name} (no better than {rival.name})" for each in noisy
                 if (rival := _ahead(comparison, axis, each)))
        parts.append(f"On the front by noise alone: {listed([*shown])}.")
    return " ".join(parts)


def _first_word(axis: Axis) -> str:
    return "smallest" if axis is SIZE else "fastest"


def _clearly_on(comparison: Comparison, axis: Axis) -> list[Figures]:
    return [each for each in comparison.front(axis)
            if each.kind is not Kind.REFERENCE and _ahead(comparison, axis, each) is None]


def _ahead(comparison: Comparison, axis: Axis, each: Figures) -> Figures | None:
    """What makes `each` not worth having by `axis`: the reference, which loses nothing, where it is no worse
    there, or `ahead_by_noise`."""
    if axis.better(each, comparison.reference) <= 0:
        return comparison.reference
    return ahead_by_noise(axis, each, comparison.files)


def findings(comparison: Comparison) -> Iterator[str]:
    """Where plain quantisation, error feedback or low rank is the better choice; only what was measured."""
    low = comparison.of(Kind.LOW_RANK)
    if low:
        yield from _dense_beats_low_rank(comparison, low)
    yield from _plain_or_feedback(comparison)
    if low:
        yield from _size_alone(comparison, low)
        yield from _low_rank_wins(comparison, low)
    yield from _no_speed_differs(comparison)


_SUBJECTS = {
    Kind.PLAIN: "Plain quantisation",
    Kind.FEEDBACK: "A dense file with error feedback",
    Kind.OTHER: "Another dense file",
}


def _dense_beats_low_rank(comparison: Comparison, low: Sequence[Figures]) -> Iterator[str]:
    for kind in DENSE:
        rivals = comparison.of(kind)
        beaten: dict[str, list[str]] = {}
        for each in low:
            better = min((rival for rival in rivals if beats(rival, each)), key=lambda rival: rival.loss,
                         default=None)
            if better:
                beaten.setdefault(better.name, []).append(each.label)
        count = sum(map(len, beaten.values()))
        if count:
            pairs = "; ".join(f"{rival} beats {listed(labels)}" for rival, labels in beaten.items())
            yield (f"{_SUBJECTS[kind]} is the better choice than {_of(count, len(low), 'low-rank file')}, "
                   f"with no more bytes, no more time and no more loss: {pairs}.")
        elif rivals:
            yield f"{_SUBJECTS[kind]} beats no low-rank file in bytes, time and loss together."


def _plain_or_feedback(comparison: Comparison) -> Iterator[str]:
    """Files of one type have the same size and the same speed: only the loss differs."""
    feedback = {each.type: each for each in comparison.of(Kind.FEEDBACK)}
    for plain in comparison.of(Kind.PLAIN):
        other = feedback.get(plain.type)
        if other is None:
            continue
        losses = f"({number(plain.loss)} and {number(other.loss)})"
        match better_loss(plain, other):
            case 1:
                yield (f"{plain.type}: plain quantisation is the better choice; it loses less than error "
                       f"feedback does {losses}, at the same size and without calibration.")
            case 0:
                yield (f"{plain.type}: plain quantisation is the better choice; error feedback loses no less "
                       f"beyond the noise {losses} and needs a calibration.")
            case _:
                yield (f"{plain.type}: error feedback is the better choice; it lowers the loss from "
                       f"{number(plain.loss)} to {number(other.loss)} at the same size.")


def _size_alone(comparison: Comparison, low: Sequence[Figures]) -> Iterator[str]:
    dense = comparison.of(*DENSE)
    beaten = [each for each in low
              if any(rival.nbytes <= each.nbytes and better_loss(rival, each) > 0 for rival in dense)]
    if dense and beaten:
        yield (f"For size alone, {_of(len(beaten), len(low), 'low-rank file')} {_verb(beaten)} beaten by a "
               f"dense file of no more bytes: {listed([each.label for each in beaten])}.")


def _low_rank_wins(comparison: Comparison, low: Sequence[Figures]) -> Iterator[str]:
    dense = comparison.of(*DENSE)
    wins: dict[str, list[str]] = {}
    for each in low:
        for rival in (rival for rival in dense if beats(each, rival)):
            wins.setdefault(each.label, []).append(rival.name)
    if wins:
        pairs = "; ".join(f"{label} beats {listed(names)}" for label, names in wins.items())
        yield f"Low rank is the better choice in bytes, time and loss together: {pairs}."
    alone = [each for each in low if dense and not any(
        _as_small_and_fast(rival, each) for rival in (comparison.reference, *dense))]
    if alone:
        shown = [f"{each.label} (loss {number(each.loss)})" for each in alone]
        yield f"No dense file is both as small and as fast as {listed(shown)}."


def _as_small_and_fast(rival: Figures, low: Figures) -> bool:
    return rival.nbytes <= low.nbytes and all(axis.better(low, rival) <= 0 for axis in (FIRST_TOKEN, DECODE))


def _no_speed_differs(comparison: Comparison) -> Iterator[str]:
    reference, others = comparison.reference, comparison.files[1:]
    for axis in comparison.axes:
        if axis is not SIZE and others and all(axis.better(each, reference) == 0 for each in others):
            yield (f"No file's {axis.words} differs from the reference's by more than its repetitions do: "
                   "the model is small, or the machine was busy.")


def _verb(files: Sequence[Figures]) -> str:
    return "is" if len(files) == 1 else "are"


def _of(count: int, total: int, what: str) -> str:
    if count == total:
        return f"the only {what}" if total == 1 else f"all {total} {what}s"
    return f"{count} of {total} {what}s"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def number(loss: float, digits: int = 3) -> str:
    """So many digits that count: 0.0246, 0.000110, 12.5, 0."""
    if loss == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(loss))
    return f"{loss:.{min(max(places, 0), 12)}f}"
