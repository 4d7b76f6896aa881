"""What a job keeps of each block: the candidates as they were measured, and the factors as they are stored.

NumPy's archives, read without pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from .candidates import Candidate, Form
from .job import Job
from .layers import Layer

_FORMS: dict[str, Form] = {"skip": True, "plain": False, "dense": None}
_TOLD = "told"

BlockCandidates = list[list[list[Candidate]]]
"""Of each group of a block the alternatives, each a list of candidates."""


def has_measured(job: Job | None, block: int) -> bool:
    """Whether the block's candidates are kept."""
    return job is not None and job.has(_measured(block))


def measured(job: Job | None, block: int, measure: Callable[[], BlockCandidates]) -> BlockCandidates:
    """What `measure` gives, or gave in an earlier run of the job."""
    if job is None:
        return measure()
    name = _measured(block)
    if job.has(name):
        with job.reading(name):
            arrays, told = _read(job.path(name))
            places = count()
            return [[[_candidate(arrays, next(places), members) for members in alternative]
                     for alternative in group] for group in told]
    groups = measure()
    candidates = [candidate for group in groups for alternative in group for candidate in alternative]
    kept: dict[str, np.ndarray] = {}
    for number, candidate in enumerate(candidates):
        kept[f"{number}.spectrum"] = candidate.spectrum
        for word, form in _FORMS.items():
            if form in candidate.rounding:
                ranks, losses = candidate.rounding[form]
                kept |= {f"{number}.{word}.ranks": ranks, f"{number}.{word}.losses": losses}
    _write(job, name, kept, [[[[asdict(layer) for layer in candidate.members] for candidate in alternative]
                              for alternative in group] for group in groups])
    return groups


def _candidate(arrays: Mapping[str, np.ndarray], number: int, members: list[dict[str, Any]]) -> Candidate:
    rounding = {
        form: (arrays[f"{number}.{word}.ranks"], arrays[f"{number}.{word}.losses"])
        for word, form in _FORMS.items() if f"{number}.{word}.ranks" in arrays
    }
    return Candidate(tuple(map(_layer, members)), arrays[f"{number}.spectrum"], rounding)


def _layer(told: dict[str, Any]) -> Layer:
    """Raises TypeError where it is none."""
    layer = Layer(**told)
    for each in fields(Layer):
        # the annotations are strings
        if type(getattr(layer, each.name)).__name__ != each.type:
            raise TypeError(each.name)
    return layer


@dataclass
class StoredBlock:
    """Everything that the factoring stage found for one block."""

    data: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """The file's bytes, by the item's key."""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each owner, by its key: the predicted error and the largest |T|."""
    damped: dict[str, float] = field(default_factory=dict)


def has_stored(job: Job | None, block: int) -> bool:
    """Whether the block's factors are kept."""
    return job is not None and job.has(_stored(block))


def read_stored(job: Job, block: int) -> StoredBlock:
    """The block's factors from an earlier run."""
    with job.reading(_stored(block)):
        arrays, told = _read(job.path(_stored(block)))
        data = {key: [arrays[f"{number}.{place}"] for place in range(parts)]
                for number, (key, parts) in enumerate(told["parts"])}
        errors = {key: (float(error), float(largest)) for key, (error, largest) in told["errors"].items()}
        return StoredBlock(data, errors, {key: float(amount) for key, amount in told["damped"].items()})


def keep_stored(job: Job, block: int, stored: StoredBlock) -> None:
    """Keep the block's factors."""
    arrays = {f"{number}.{place}": array for number, parts in enumerate(stored.data.values())
              for place, array in enumerate(parts)}
    _write(job, _stored(block), arrays, {
        "parts": [(key, len(parts)) for key, parts in stored.data.items()],
        "errors": stored.errors, "damped": stored.damped,
    })


def _measured(block: int) -> str:
    return f"measured-{block:04d}.npz"


def _stored(block: int) -> str:
    return f"factors-{block:04d}.npz"


def _write(job: Job, name: str, arrays: Mapping[str, np.ndarray], told: Any) -> None:
    named: dict[str, Any] = {_TOLD: np.frombuffer(json.dumps(told).encode(), np.uint8), **arrays}
    with job.artifact(name) as path, path.open("wb") as file:
        np.savez(file, **named)


def _read(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name != _TOLD}
        return arrays, json.loads(file[_TOLD].tobytes())
