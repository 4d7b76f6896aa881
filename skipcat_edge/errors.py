"""Errors that a person reads: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import click

from skipcat_edge.control_characters import visible


class UserError(click.ClickException):
    """Bad input: what is wrong, where, and what to do, in one sentence, which is `str` of it.

    The only exception that the package's functions raise on purpose, or a subclass of it. The command line
    prints it and exits with 2.
    """

    exit_code = 2

    def format_message(self) -> str:
        """What the command line prints: names in it may come from a file of anybody's."""
        return visible(self.message)


class NotFiniteError(UserError):
    """A model whose numbers overflow: none of its figures means anything."""


class RetryError(UserError):
    """What may succeed another time: an unfinished job is kept."""


class DiskError(RetryError):
    """A file that could not be written."""


class UnreachableError(UserError):
    """A size that the model cannot have: its type's grid of ranks does not reach it."""


def require_at_least(least: float, **numbers: float | None) -> None:
    """Raise UserError for the first of `numbers` that is below `least`; None passes."""
    for name, number in numbers.items():
        if number is not None and not number >= least:
            raise UserError(f"{name} is {number}, but it must be {least} or more.")


def first_line(error: Exception) -> str:
    """What `error` says, as a part of a sentence: its first line, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


class FormatError(UserError):
    """A GGUF file that does not follow the low-rank format; names the tensor or key."""
