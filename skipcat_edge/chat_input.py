"""What a person types into a chat: messages of one line or more, and commands."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_QUOTES = '"""'
_HISTORY_LINES = 1000


@dataclass(frozen=True)
class Message:
    """What was typed."""

    text: str
    command: bool = False
    """It is one of the chat's own, such as `/exit`, and not for the model."""


def read_message(read: Callable[[str], str | None]) -> Message | None:
    """The next message; None at the end of the input.

    A line that ends in a backslash goes on in the next one, and between lines with three quotation marks all
    lines are one message. `read` is asked for a line with the prompt to show, and gives None at the end.
    """
    line = read("> ")
    if line is None:
        return None
    if line.strip().startswith(_QUOTES):
        return Message(_quoted(line.strip()[len(_QUOTES):], read))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        more = read("… ")
        if more is None:
            break
        lines.append(more)
    text = "\n".join(lines).strip()
    return Message(text, command=len(lines) == 1 and text.startswith("/"))


def _quoted(first: str, read: Callable[[str], str | None]) -> str:
    lines: list[str] = []
    line: str | None = first
    while line is not None:
        if line.rstrip().endswith(_QUOTES):
            lines.append(line.rstrip()[: -len(_QUOTES)])
            break
        lines.append(line)
        line = read("… ")
    return "\n".join(lines).strip("\n")


def line_reader() -> Callable[[str], str | None]:
    """Reads lines from the terminal, with editing keys and the lines of earlier chats, or from a pipe."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        return _read_pipe
    try:
        import readline
    except ImportError:  # a Python without it
        return _ask
    try:
        history = _history_file()
    except OSError:  # no folder to keep one in
        return _ask
    with suppress(OSError):  # there is none yet
        readline.read_history_file(history)
    readline.set_history_length(_HISTORY_LINES)

    def read(prompt: str) -> str | None:
        line = _ask(prompt)
        with suppress(OSError):
            readline.write_history_file(history)
        return line

    return read


def _read_pipe(_prompt: str) -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _ask(prompt: str) -> str | None:
    if not sys.stdout.isatty():  # input() would write the prompt among the replies
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        return None


def _history_file() -> Path:
    from platformdirs import user_state_path

    return user_state_path("skipcat-edge", ensure_exists=True) / "chat_history"
