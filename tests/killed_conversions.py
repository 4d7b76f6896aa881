"""Converts in processes of its own, which are killed: the worker of test_job.py.

    killed_conversions.py SOURCE TEXT [BASE]

Reads one JSON line after another from stdin, each an attempt: {"out": path, "options": {...}, and at most one
of "event": kill before the so-manieth time that a name in the output's folder is opened, renamed or removed,
"delay": kill after so many seconds, "file_size": no file may become larger}. Answers with a line each:
{"killed", "events", "said", "error"}. An attempt is a fork, so that PyTorch is imported once.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from skipcat_edge.conversion import convert
from skipcat_edge.errors import UserError

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def _watch(folder: str, at: int | None, count: list[int]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if folder in os.fsdecode(arguments[0]):
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _child(source: str, text: str, base: str | None, attempt: dict[str, Any], pipe: int) -> None:
    os.setsid()
    out = Path(attempt["out"])
    if "file_size" in attempt:
        limit = attempt["file_size"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    count, said = [0], []
    _watch(str(out.parent), attempt.get("event"), count)
    error = None
    try:
        options = {"calibration": text, "base": base, "quant": "F16", **attempt.get("options", {})}
        convert(source, out, warn=said.append, **options)
    except UserError as found:
        error = found.message
    os.write(pipe, json.dumps({"events": count[0], "said": said, "error": error}).encode())


def run(source: str, text: str, base: str | None, attempt: dict[str, Any]) -> dict[str, Any]:
    """One attempt and what came of it."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            _child(source, text, base, attempt, write)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    os.close(write)
    if "delay" in attempt:
        time.sleep(attempt["delay"])
        os.killpg(pid, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0, f"an attempt crashed: {attempt}"
    return {"killed": killed, **(json.loads(answer) if not killed and answer else {})}


def main() -> None:
    torch.set_num_threads(1)  # a fork would not have the others
    import skipcat_converter.pipeline  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    source, text, *base = sys.argv[1:]
    for line in sys.stdin:
        print(json.dumps(run(source, text, base[0] if base else None, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
