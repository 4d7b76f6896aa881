"""One bar over a whole job whose steps have stages of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Of what a conversion has left to do when the stage begins; stages that are not named take no time.
_SHARES = {"Converting to GGUF": 0.5, "Calibrating": 0.97, "Measuring layers": 0.5, "Factoring": 0.97,
           "Writing": 0.97}


class Step:
    """A step of the job, from 0 to 1."""

    def __init__(self, show: Callable[[float], None]) -> None:
        self._show = show
        self._done = 0.0

    def to(self, share: float) -> None:
        """So much of the step is done; never less than before."""
        if share > self._done:
            self._done = min(share, 1.0)
            self._show(self._done)

    @contextmanager
    def phase(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """The `Phase` of the converter's stages: each takes its share of what is left."""
        start, length = self._done, _SHARES.get(title, 0.0) * (1 - self._done)
        done = 0.0

        def advance(amount: float) -> None:
            nonlocal done
            done += amount
            self.to(start + length * min(done / total, 1.0) if total else start)

        yield advance
        self.to(start + length)


class Bar:
    """The bar. Weights are seconds on some machine: only their proportions matter."""

    def __init__(self, progress: Progress, total: float, done: float) -> None:
        """`done`: the weight of what an earlier run did."""
        self._progress = progress
        self._completed = done
        self._task: TaskID = progress.add_task("", total=total, completed=done)  # type: ignore[arg-type]

    @contextmanager
    def step(self, title: str, weight: float) -> Iterator[Step]:
        """Show `title` until the step ends."""
        self._progress.update(self._task, description=title)

        def show(share: float) -> None:
            self._progress.update(self._task, completed=self._completed + weight * share)

        yield Step(show)
        self._completed += weight
        self._progress.update(self._task, completed=self._completed)


def new_bar() -> Progress:
    """The display, on stderr; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    # steps differ in length, so the speed is averaged over minutes
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=300,
    )
