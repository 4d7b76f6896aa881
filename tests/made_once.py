"""What takes long to make, made by one of xdist's processes for all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

Once = Callable[[str, Callable[[Path], None]], Path]


def make_once(run: Path, name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `name` below `run`, filled by whoever comes first; the others wait, or skip as it did."""
    folder, filled, skipped = (run / f"{name}{suffix}" for suffix in ("", ".filled", ".skipped"))
    with FileLock(run / f"{name}.lock"):
        if skipped.exists():
            pytest.skip(skipped.read_text("utf-8"))
        if not filled.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                fill(folder)
            except pytest.skip.Exception as reason:
                skipped.write_text(str(reason), "utf-8")
                raise
            filled.touch()
    return folder
