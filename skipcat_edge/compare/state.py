"""What a comparison has done so far, kept in its folder: an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcat_edge.compare.progress import Step
from skipcat_edge.errors import UserError
from skipcat_edge.output import atomic_output

NAME = "compare.json"
_FORMAT = 1

Plain = dict[str, Any]
"""JSON."""


@dataclass(frozen=True)
class Job:
    """One step: it is done again only where its inputs, its output or a step it needs have changed."""

    key: str
    title: str
    weight: float
    """About how long it takes, beside the others."""
    needs: tuple[str, ...]
    """Keys of steps before it."""
    inputs: Callable[[], Plain]
    """What the result depends on. Asked once all that it needs is done."""
    run: Callable[[Step], Plain]
    """Does it and tells what it found; `impossible` instead is why there is no output."""
    output: Path | None = None
    """The file that it writes."""


class State:
    """The results in a folder's compare.json, by step."""

    def __init__(self, folder: Path) -> None:
        """Read what is there. Raises UserError where it cannot be read."""
        self._path = folder / NAME
        self._steps: dict[str, Plain] = {}
        self.source: str | None = None
        """What was compared; None in a new folder."""
        if not self._path.exists():
            return
        try:
            found = json.loads(self._path.read_text("utf-8"))
            if found["format"] != _FORMAT:
                raise ValueError
            self.source, self._steps = str(found["source"]), dict(found["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self._path} cannot be read; pass --force to start over.") from None

    def begin(self, source: str) -> None:
        """For `source` from now on. Raises UserError on a failed write."""
        self.source = source
        self._save()

    def result(self, key: str) -> Plain:
        """Of a step that is done."""
        found: Plain = self._steps[key]["result"]
        return found

    def keep(self, job: Job, inputs: Plain, result: Plain) -> None:
        """Write down what a step found of `inputs`, as they were before it. Raises UserError on a failed
        write."""
        self._steps[job.key] = {"inputs": _as_json(inputs), "output": _identity_or_none(job.output),
                                "result": result}
        self._save()

    def to_do(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of `jobs`, each after what it needs, that must be done."""
        stale: list[Job] = []
        for job in jobs:
            if any(other.key in job.needs for other in stale) or not self._fresh(job):
                stale.append(job)
        return stale

    def _fresh(self, job: Job) -> bool:
        known = self._steps.get(job.key)
        if known is None:
            return False
        impossible = "impossible" in known["result"]
        output = None if impossible else _identity_or_none(job.output)
        if job.output is not None and not impossible and output is None:
            return False
        return bool(known["inputs"] == _as_json(job.inputs()) and (impossible or known["output"] == output))

    def _save(self) -> None:
        told = {"format": _FORMAT, "source": self.source, "steps": self._steps}
        with atomic_output(self._path, force=True) as partial:
            partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def identity(path: Path) -> list[Any]:
    """The same for a file that nobody has touched: place, size and time."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _identity_or_none(path: Path | None) -> list[Any] | None:
    return identity(path) if path is not None and path.exists() else None


def source_identity(source: Path) -> list[Any]:
    """Of a GGUF file, or of the files in a Hugging Face directory."""
    if source.is_file():
        return identity(source)
    found = [*sorted(source.glob("*")), *sorted(source.glob("*/config.json"))]
    return [identity(file) for file in found if file.is_file()]


def _as_json(value: Plain) -> Plain:
    """As it will be read again: tuples are lists."""
    found: Plain = json.loads(json.dumps(value))
    return found
