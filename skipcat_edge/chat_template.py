"""A file's chat template, rendered by a process of its own, which ends where it takes too long.

jinja2's sandbox keeps a template from everything but the messages; it does not keep it from looping, or from
taking memory.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

SECONDS = 5
"""The most that a template may take, to be read and for each rendering."""
LARGEST = 2**28
"""Bytes that it may need."""
_SECONDS_TO_START = 60
_CHUNK = 2**16


class TemplateError(Exception):
    """What a template raises, or why it was ended."""


class ChatTemplate:
    """A template that is ready to be rendered."""

    def __init__(self, template: str, *, bos: str, eos: str) -> None:
        """`bos`, `eos`: the model's tokens as text. Raises TemplateError where it is broken."""
        self._begin = {"template": template, "bos": bos, "eos": eos}
        self._start()

    def render(self, messages: Sequence[Any], **options: Any) -> str:
        """The prompt of `messages`; `options`: what else llama_cpp's formatter takes, such as tools.

        Raises TemplateError where the template does, and where it takes more than it may.
        """
        if self._process.poll() is not None:
            self._start()
        return str(self._ask({"messages": list(messages), **options})["text"])

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "skipcat_edge.template_worker"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, self._process)
        self._answer(_SECONDS_TO_START)
        self._ask(self._begin)

    def _ask(self, value: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer, or its absence, tells why
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(SECONDS)

    def _answer(self, seconds: float) -> dict[str, Any]:
        line = self._line(time.monotonic() + seconds)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer

    def _line(self, deadline: float) -> bytes:
        """The next line of the process, which is ended where it does not come in time."""
        assert self._process.stdout is not None
        out = self._process.stdout.fileno()
        parts: list[bytes] = []
        try:
            while not parts or not parts[-1].endswith(b"\n"):
                if not select.select([out], [], [], max(0, deadline - time.monotonic()))[0]:
                    raise TemplateError(f"it takes more than {SECONDS} s")
                parts.append(os.read(out, _CHUNK))
                if not parts[-1]:
                    raise TemplateError(f"its process ended with code {self._process.wait()}")
        except BaseException:  # Ctrl-C too: what it still says would be taken for the next answer
            _end(self._process)
            raise
        return b"".join(parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
