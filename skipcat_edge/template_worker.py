"""The process that renders a file's chat template: one line of JSON in, one out.

    {"template": ..., "bos": ..., "eos": ...}   once; the answer is {} or {"error": ...}
    {"messages": ..., ...}                      each time; the answer is {"text": ...} or {"error": ...}

A template may loop forever or ask for all memory there is, and jinja2's sandbox allows both. So the process
has little of either.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from skipcat_edge.chat_template import LARGEST, SECONDS


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the chat
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    _answer({})
    _limit_memory()
    formatter: Any = None

    def begin(asked: dict[str, Any]) -> dict[str, Any]:
        nonlocal formatter
        formatter = Jinja2ChatFormatter(
            template=asked["template"], bos_token=asked["bos"], eos_token=asked["eos"])
        return {}

    def render(asked: dict[str, Any]) -> dict[str, Any]:
        return {"text": str(formatter(**asked).prompt)}

    for line in sys.stdin:
        _answer(_tried(begin if formatter is None else render, json.loads(line)))


def _tried(work: Callable[[dict[str, Any]], dict[str, Any]], asked: dict[str, Any]) -> dict[str, Any]:
    _limit_time()
    try:
        return work(asked)
    except MemoryError:
        return {"error": f"it needs more than {LARGEST >> 20} MiB"}
    except RecursionError:
        return {"error": "it is nested too deep"}
    except Exception as error:  # a template is a program of its own
        return {"error": str(error) or type(error).__name__}


def _answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _limit_memory() -> None:
    """To LARGEST more than now, where the system counts it."""
    with suppress(ImportError, OSError, ValueError):
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + LARGEST,) * 2)


def _limit_time() -> None:
    """For when nobody is left to end this process."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        end = int(used.ru_utime + used.ru_stime) + SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
