"""What takes long to make, made by one of xdist's processes for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

Once = Callable[[str, Callable[[Path], None]], Path]


def make_once(base: Path, name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `name` below this run's, filled by whoever comes first; the others wait for it.

    `base` is the process's own folder for temporary files.
    """
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, filled = run / name, run / f"{name}.filled"
    with FileLock(run / f"{name}.lock"):
        if not filled.exists():
            folder.mkdir(exist_ok=True)
            fill(folder)
            filled.touch()
    return folder
