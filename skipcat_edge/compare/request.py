"""What the user wants compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from skipcat_edge.compare.figures import Kind
from skipcat_edge.errors import UserError

_LABEL_LETTERS = 28


@dataclass(frozen=True)
class Request:
    """All options, checked."""

    source: Path
    """Hugging Face directory, or the dense GGUF that `files` are compared with."""
    source_name: str
    """As the user calls it: its path or hub id."""
    folder: Path
    text: Path
    calibration: Path | None
    """None where nothing is built."""
    ratios: tuple[float, ...] = ()
    """Below 1, falling."""
    types: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    method: str = "auto"
    calib_tokens: int = 0
    """The most to read."""
    max_tokens: int = 0
    window: int = 256
    prompt_tokens: int = 128
    gen_tokens: int = 64
    repetitions: int = 5
    threads: int = 1
    base: Path | None = None
    runtime_source: Path | None = None
    command: str = ""
    """What was typed."""

    @property
    def builds(self) -> bool:
        """Files are made, not only measured."""
        return not self.source.is_file()

    @property
    def reference(self) -> Path:
        """The dense file that all others are compared with."""
        return self.folder / f"dense-{self.reference_type}.gguf" if self.builds else self.source

    @property
    def reference_type(self) -> str:
        """F16, as convert makes it, unless a file is to be more exact."""
        return next((type_ for type_ in ("F32", "BF16") if type_ in self.types), "F16")

    @property
    def statistics(self) -> Path:
        return self.folder / "statistics"


@dataclass(frozen=True)
class Entry:
    """A file of the comparison besides the reference."""

    path: Path
    kind: Kind
    label: str
    type: str
    ratio: float = 1.0
    given: bool = field(default=False)
    shown: str = ""
    """A name for tables that no other given file has; by default the path's."""

    @property
    def name(self) -> str:
        return self.shown or self.path.name

    @property
    def calibrated(self) -> bool:
        return self.kind in (Kind.FEEDBACK, Kind.LOW_RANK)


def entries(request: Request) -> list[Entry]:
    """Files to build, by type and falling ratio, then those that were given.

    Raises UserError where a given file cannot be read, or is none to compare.
    """
    found: list[Entry] = []
    for type_ in request.types:
        def entry(kind: Kind, ratio: float, type_: str = type_) -> Entry:
            name, label = f"{kind.name.lower().replace('_', '-')}-{type_}", type_
            if kind is Kind.LOW_RANK:
                name, label = f"{name}-{ratio:g}", f"{label} {ratio:g}"
            return Entry(request.folder / f"{name}.gguf", kind, label, type_, ratio)

        if type_ != request.reference_type:
            found.append(entry(Kind.PLAIN, 1.0))
            if _rounds(type_):
                found.append(entry(Kind.FEEDBACK, 1.0))
        found += [entry(Kind.LOW_RANK, ratio) for ratio in request.ratios]
    return [*found, *_given(request)]


def _rounds(type_: str) -> bool:
    """Whether there is an error to pass on that matters: that of F16 and BF16 does not."""
    return type_ not in ("F32", "F16", "BF16")


def _given(request: Request) -> list[Entry]:
    from collections import Counter

    from skipcat_edge.inspection import inspect

    found = []
    names = distinct_names(request.files)
    for path, name, label in zip(request.files, names, short_labels([*map(_stem, names)]), strict=True):
        inspection = inspect(path)
        types = Counter(layer.type for layer in inspection.dense_layers)
        # what a level adds may be of a smaller type
        for owner in (owner for owner in inspection.owners if owner.used_at(0)):
            types.update(member.type.name for member in owner.members)
        found.append(Entry(
            path, Kind.LOW_RANK if inspection.owners else Kind.OTHER, label,
            types.most_common(1)[0][0] if types else "-", inspection.kept, given=True, shown=name))
    return found


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The files' names, after as many of their folders as tell those of one name apart."""
    alike: dict[str, list[Path]] = {}
    for path in paths:
        alike.setdefault(path.name, []).append(path.absolute())
    shared = {name: os.path.commonpath([path.parent for path in found]) for name, found in alike.items()}
    return [printable(os.path.relpath(path, shared[path.name]) if len(alike[path.name]) > 1 else path.name)
            for path in paths]


def _stem(name: str) -> str:
    return name.removesuffix(".gguf")


def short_labels(names: Sequence[str], letters: int = _LABEL_LETTERS) -> list[str]:
    """`names` shortened. Where different ones would read alike, the beginning that they share goes first."""
    labels = [shortened(name, letters) for name in names]
    for label in {label for label in labels if labels.count(label) > 1}:
        alike = [index for index, other in enumerate(labels) if other == label]
        whole = [names[index] for index in alike]
        same = takewhile(lambda each: len({*each}) == 1, zip(*whole, strict=False))
        shared = min(len([*same]), *(len(name) - 1 for name in whole))
        if shared > 0:
            rests = short_labels([name[shared:] for name in whole], letters - 1)
            for index, rest in zip(alike, rests, strict=True):
                labels[index] = f"…{rest}"
    return labels


def printable(text: str) -> str:
    """`text` with ? for what no page can show, such as bytes of a file name that are no UTF-8."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shortened(text: str, letters: int = _LABEL_LETTERS) -> str:
    """`text` as one printable line of at most `letters`, its middle left out where it is longer."""
    line = printable(text)
    if len(line) <= letters:
        return line
    return f"{line[: letters // 2]}…{line[len(line) - (letters - letters // 2 - 1):]}"


def parse_ratios(text: str) -> tuple[float, ...]:
    """`0.9,0.8` as falling numbers; 1 is dense, which is there in any case. Raises UserError."""
    from skipcat_edge import ranks

    return tuple(ratio for ratio in ranks.parse_ratios(text) if ratio != 1.0)


def parse_types(text: str) -> tuple[str, ...]:
    """`F16,Q4_0` as ggml's names. Raises UserError."""
    from skipcat_edge.weight_types import weight_type

    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError("--types names no type; give at least one, for example --types Q4_0.")
    return tuple(dict.fromkeys(weight_type(name, have_importance=True).name for name in names))
