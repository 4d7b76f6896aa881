"""Things that leave a file behind where they are executed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


class Trap:
    """A file that appears once something that was to be read is run instead."""

    def __init__(self, folder: Path) -> None:
        self._sign = folder / "sprung"

    def was_sprung(self) -> bool:
        """Whether it has been since the last time."""
        sprung = self._sign.exists()
        self._sign.unlink(missing_ok=True)
        return sprung

    @property
    def python(self) -> str:
        """A line of Python."""
        return f"import pathlib; pathlib.Path({str(self._sign)!r}).touch()"

    def pickled(self) -> Any:
        """An object; whoever unpickles it runs the line of Python."""
        return _Pickled(self.python)


class _Pickled:
    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (self.line,)


def copy_of(model: Path, folder: Path, *without: str) -> Path:
    """The files of a model in a new folder, those that match `without` left out."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(*without))
    return folder
