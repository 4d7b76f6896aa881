"""What was measured of each file: all that the report is made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from skipcat_edge.compare.front import pareto_front


class Kind(Enum):
    """How a file came about; the value is what a person reads."""

    REFERENCE = "reference"
    PLAIN = "plain quantisation"
    FEEDBACK = "dense, error feedback"
    LOW_RANK = "low rank"
    OTHER = "other dense file"
    """Given by the user, who knows how it was made."""


DENSE = (Kind.PLAIN, Kind.FEEDBACK, Kind.OTHER)


@dataclass(frozen=True)
class Measured:
    """The median of some repetitions, with the least and the greatest of them."""

    value: float
    low: float
    high: float

    def ties(self, other: Measured) -> bool:
        """Whether one of the medians lies within the other's repetitions."""
        return self.low <= other.value <= self.high or other.low <= self.value <= other.high


@dataclass(frozen=True)
class Figures:
    """One file's."""

    file: str
    """Its name, without the folder."""
    label: str
    """Short: what stands beside its point."""
    kind: Kind
    type: str
    ratio: float
    """Kept share of the linear layers' parameters that was asked for; of a given file, what it has."""
    nbytes: int
    loss: float
    """KL divergence from the reference, nats per token; of an embedding model 1 - mean cosine to it."""
    loss_se: float
    """Standard error of `loss`."""
    first_token: Measured
    """Seconds."""
    decode: Measured | None
    """Tokens per second; None for an embedding model."""
    peak_bytes: int | None = None
    ppl: float | None = None
    ppl_se: float | None = None
    top1: float | None = None
    cosine_min: float | None = None

    @property
    def name(self) -> str:
        """What sentences call it."""
        if self.kind is Kind.REFERENCE:
            return f"the {self.type} reference"
        words = {Kind.PLAIN: f"plain {self.label}", Kind.FEEDBACK: f"{self.label} with error feedback",
                 Kind.LOW_RANK: f"low-rank {self.label}", Kind.OTHER: self.label}
        return words[self.kind]

    def loss_ties(self, other: Figures) -> bool:
        """Whether the losses differ by no more than the standard error of their difference, the two taken
        for independent."""
        return abs(self.loss - other.loss) <= math.hypot(self.loss_se, other.loss_se)


@dataclass(frozen=True)
class Axis:
    """What a picture shows the loss against."""

    key: str
    """Of file names."""
    title: str
    words: str
    """In a sentence: the front by ..."""
    short: str
    """In a table."""
    value: Callable[[Figures], Measured | None]
    less_is_better: bool

    def cost(self, figures: Figures) -> float:
        """Less is better. The figure must be there."""
        found = self.value(figures)
        assert found is not None
        return found.value if self.less_is_better else -found.value

    def better(self, one: Figures, other: Figures) -> int:
        """1 where `one` is better beyond the noise, -1 where it is worse, 0 for a tie."""
        a, b = self.value(one), self.value(other)
        if a is None or b is None or a.ties(b):
            return 0
        return 1 if (a.value < b.value) == self.less_is_better else -1


def _size(figures: Figures) -> Measured:
    return Measured(figures.nbytes, figures.nbytes, figures.nbytes)


SIZE = Axis("size", "Size", "size", "size", _size, True)
FIRST_TOKEN = Axis("first-token", "Time to first token", "time to first token", "first token",
                   lambda figures: figures.first_token, True)
DECODE = Axis("decode", "Decode speed", "decode speed", "decode", lambda figures: figures.decode, False)


def better_loss(one: Figures, other: Figures) -> int:
    """As `Axis.better`."""
    if one.loss_ties(other):
        return 0
    return 1 if one.loss < other.loss else -1


@dataclass(frozen=True)
class Comparison:
    """All files, the reference first."""

    model: str
    files: tuple[Figures, ...]
    embedding: bool
    notes: tuple[str, ...] = ()
    """What could not be had, and what to keep in mind."""
    setting: Mapping[str, str] | None = None
    """Name -> value: how it was measured."""

    @property
    def reference(self) -> Figures:
        return self.files[0]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those that were measured; an embedding model decodes nothing."""
        return tuple(axis for axis in (SIZE, FIRST_TOKEN, DECODE)
                     if all(axis.value(each) is not None for each in self.files))

    @property
    def loss_name(self) -> str:
        return "1 - mean cosine" if self.embedding else "KL divergence"

    def of(self, *kinds: Kind) -> list[Figures]:
        return [each for each in self.files if each.kind in kinds]

    def front(self, axis: Axis) -> list[Figures]:
        """The files, the reference among them, that no other one beats by the medians; smallest or fastest
        first."""
        points = [(axis.cost(each), each.loss) for each in self.files]
        return [self.files[index] for index in pareto_front(points)]

    def on_fronts(self, figures: Figures) -> list[Axis]:
        return [axis for axis in self.axes if figures in self.front(axis)]


def ahead_by_noise(axis: Axis, figures: Figures, files: Sequence[Figures]) -> Figures | None:
    """A file that is no worse than `figures` on `axis` and in loss, ties being equal, and better in one of
    them beyond the noise; the one of least loss."""
    found = [other for other in files if other is not figures
             and (signs := (axis.better(other, figures), better_loss(other, figures)))
             and min(signs) >= 0 and max(signs) > 0]
    return min(found, key=lambda other: other.loss, default=None)


def beats(one: Figures, other: Figures) -> bool:
    """Whether `one` has no more bytes, takes no more time and loses no more than `other`, ties being
    equal, and is better in one of these beyond the noise."""
    signs = [*(axis.better(one, other) for axis in (SIZE, FIRST_TOKEN, DECODE)), better_loss(one, other)]
    return min(signs) >= 0 and max(signs) > 0


def figures_of(label: str, kind: Kind, stored: Mapping[str, Any], bench: Mapping[str, Any],
               quality: Mapping[str, Any]) -> Figures:
    """From what the steps kept: a file's description, its row of the bench and its evaluation."""
    def spread(name: str) -> Measured | None:
        if bench[name] is None:
            return None
        return Measured(bench[name], bench[f"{name}_min"], bench[f"{name}_max"])

    first_token = spread("first_token_s")
    assert first_token is not None
    return Figures(
        file=stored["file"], label=label, kind=kind, type=stored["type"], ratio=stored["ratio"],
        nbytes=bench["file_bytes"], loss=quality["loss"], loss_se=quality["loss_se"],
        first_token=first_token, decode=spread("decode_tps"), peak_bytes=bench["peak_rss_bytes"],
        ppl=quality.get("ppl"), ppl_se=quality.get("ppl_se"), top1=quality.get("top1"),
        cosine_min=quality.get("cosine_min"),
    )
