"""Output files appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipcat_edge.errors import UserError


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
    check_output(out, force)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        # NumPy's tofile reports a full disk with neither a number nor a file name
        where = partial if error.filename is None else Path(os.fsdecode(error.filename))
        if out.absolute().parent not in where.absolute().parents:
            raise
        raise UserError(
            f"{out} could not be written ({error.strerror or error}); "
            "choose a folder that is writable and has room."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
