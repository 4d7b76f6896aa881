"""Texts that a user names."""

from __future__ import annotations

from pathlib import Path

from skipcat_edge.errors import UserError


def read_text(path: Path) -> str:
    """Raises UserError where `path` cannot be read, or is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first.") from None
