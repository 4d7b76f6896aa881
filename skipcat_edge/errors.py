"""Errors that a person reads: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import click


class UserError(click.ClickException):
    """Bad input: what is wrong, where, and what to do. The command line exits with 2."""

    exit_code = 2


class FormatError(UserError):
    """A GGUF file that does not follow the low-rank format; names the tensor or key."""
