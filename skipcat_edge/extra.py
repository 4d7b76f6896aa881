"""Extras: whether they are there, and how the stages of `convert` show their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec

from skipcat_edge.errors import UserError

Phase = Callable[[str, float], AbstractContextManager[Callable[[float], None]]]
"""Hears a title and a total, and gives what is told how much of it is done."""


def require_packages(what_needs: str, extra: str, *packages: str) -> None:
    """Raise UserError for the first of `packages`, all of `extra`, that is missing; it begins with
    `what_needs`, such as `Converting needs`."""
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{what_needs} {package}; install it with `pip install 'skipcat-edge[{extra}]'`.")


def require_converter() -> None:
    """Raise UserError, before any work, if a package of the extra or ggml's library is missing."""
    require_packages("Converting needs", "convert", "accelerate", "torch", "transformers", "safetensors",
                     "scipy", "sentencepiece", "huggingface_hub", "threadpoolctl")
    from skipcat_edge.runtime.library import load_library

    load_library("ggml-base")


@contextmanager
def phases() -> Iterator[Phase]:
    """Gives the stages one bar with time left per phase."""
    from skipcat_edge.terminal import new_progress

    with new_progress() as progress:

        @contextmanager
        def phase(title: str, total: float) -> Iterator[Callable[[float], None]]:
            task = progress.add_task(title, total=total)
            yield lambda amount: progress.advance(task, amount)

        yield phase
