"""The example below each command's help."""

from __future__ import annotations


def example(arguments: str, *more: str) -> str:
    """An epilog: one command line, after `more` paragraphs."""
    return "\n\n".join([*more, f"\b\nExample:\n  skipcat-edge {arguments}"])
