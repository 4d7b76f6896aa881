"""Run a long command with a progress bar, its output in a log."""

from __future__ import annotations

import re
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from skipcat_edge.errors import UserError

TAIL_LINES = 30
# Ninja counts steps, "[12/151] ..."; Make, where Ninja is missing, prints "[ 12%] ..."; pip
# counts bytes, "Progress 1024 of 4096".
_STEPS = re.compile(r"\s*(?:\[\s*(\d+)/(\d+)\]|Progress (\d+) of (\d+)|\[\s*(\d+)%\])")

console = Console(stderr=True)


def parse_step(line: str) -> tuple[int, int] | None:
    """(steps done, steps in all) of one line of Ninja's, Make's or pip's output, else None."""
    match = _STEPS.match(line)
    if match is None:
        return None
    done, total = [int(number) for number in match.groups() if number] + ([100] if match[5] else [])
    return (done, total) if total else None


def run_logged(
    command: Sequence[str],
    *,
    title: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    append: bool = False,
    hint: str = "",
) -> None:
    """Run `command` and show how far it is, with time left once it counts its steps.

    Raises UserError with the log's path if it fails, after printing the log's last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with (
        log.open("a" if append else "w", encoding="utf-8") as out,
        _Display(title) as display,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, encoding="utf-8", errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                out.write(line)
                tail.append(line)
                display.show(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        click.echo("".join(tail), err=True)
        advice = f"{hint}; " if hint else ""
        code = process.returncode
        raise UserError(f"{title}: failed with exit code {code}; {advice}the whole log is {log}.")


class _TimeLeft(TimeRemainingColumn):
    """Nothing until there is an estimate."""

    def render(self, task: Task) -> Text:
        return Text("") if task.time_remaining is None else super().render(task) + Text(" left")


class _Display:
    """A bar on a terminal; elsewhere one line per tenth, so that logs stay short."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = time.monotonic()
        self.tenth = 0
        # A build's steps differ in length by two orders of magnitude, so the speed is
        # averaged over minutes.
        self.bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            TimeElapsedColumn(), _TimeLeft(),
            console=console, speed_estimate_period=300, disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> _Display:
        self.bar.start()
        if not console.is_terminal:
            click.echo(f"{self.title} ...", err=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def show(self, line: str) -> None:
        step = parse_step(line)
        if step is None:
            return
        done, total = step
        self.bar.update(self.task, completed=done, total=total)
        if not console.is_terminal and done * 10 // total > self.tenth:
            self.tenth = done * 10 // total
            left = (time.monotonic() - self.start) * (total - done) / done
            click.echo(f"{self.title}: {self.tenth * 10} %, about {left:.0f} s left", err=True)
