"""Output files appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from skipcat_edge.errors import DiskError, UserError


def check_output(out: Path, force: bool) -> None:
    """Raise UserError if `out` exists and may not be replaced, or its folder is missing."""
    if out.is_dir():
        raise UserError(f"{out} is a directory; name a file.")
    if out.exists() and not force:
        raise UserError(f"{out} exists already; choose another name, or pass --force to replace it.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: the folder {out.absolute().parent} does not exist; create it first.")


@contextmanager
def atomic_output(out: Path, force: bool) -> Iterator[Path]:
    """A temporary path beside `out` that becomes `out` at the end, or is removed on failure.

    Raises UserError if `out` exists and `force` is not given, or if writing fails (a full disk).
    """
    with atomic_outputs([out], force) as (partial,):
        yield partial


@contextmanager
def atomic_outputs(outs: Sequence[Path], force: bool) -> Iterator[list[Path]]:
    """As `atomic_output`, for files of which none appears unless all are written."""
    for out in outs:
        check_output(out, force)
    partials = [out.with_name(f".{out.name}.partial-{os.getpid()}") for out in outs]
    try:
        yield partials
        for partial in partials:
            sync_file(partial)
        place(partials, outs)
    except OSError as error:
        # NumPy's tofile reports a full disk with neither a number nor a file name
        where = partials[0] if error.filename is None else Path(os.fsdecode(error.filename))
        out = next((out for out, partial in zip(outs, partials, strict=True) if partial == where), outs[0])
        if out.absolute().parent not in where.absolute().parents:
            raise
        raise DiskError(
            f"{out} could not be written ({error.strerror or error}); "
            "choose a folder that is writable and has room."
        ) from None
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Return once what the file holds is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the names in it are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place(partials: Sequence[Path], outs: Sequence[Path]) -> None:
    """Rename finished files beside `outs` to them; where one cannot be, those that are new go again."""
    new: list[Path] = []
    try:
        for partial, out in zip(partials, outs, strict=True):
            existed = out.exists()
            partial.replace(out)
            if not existed:
                new.append(out)
    except OSError:
        for out in new:
            out.unlink()
        raise
    for folder in {out.absolute().parent for out in outs}:
        sync_folder(folder)
