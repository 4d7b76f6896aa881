"""Peak memory and time of a conversion, phase by phase."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

# Seconds between two looks at what is resident; peaks that are shorter are seen by the kernel's own count.
_EVERY = 0.02
# Seconds after which the figures are kept, so that a run which is killed loses no more of them.
_KEPT = 10.0
BETWEEN = "between phases"


@dataclass
class Peaks:
    """What a conversion took."""

    peak: int = 0
    """Bytes that it and its children had resident at most."""
    phases: dict[str, int] = field(default_factory=dict)
    """The same by phase."""
    private: dict[str, int] = field(default_factory=dict)
    """Bytes by phase without the pages of files, which the kernel keeps or drops as it likes (Linux)."""
    seconds: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    error: str | None = None
    finished: bool = False


def convert_watched(
    source: Path, output: Path, threads: int = 1, before: Peaks | None = None,
    keep: Callable[[Peaks], Any] = lambda peaks: None, **options: Any,
) -> Peaks:
    """Convert in a process of its own; `options` as skipcat_edge.convert takes them.

    `before`: what an earlier run, which was interrupted, took; it is added to. `keep` gets the figures
    every ten seconds.
    """
    told = {"source": str(source), "output": str(output), **options}
    script = Path(__file__).with_name("convert_worker.py")
    env = {**os.environ, "OMP_NUM_THREADS": str(threads),
           "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found, now = before or Peaks(), [BETWEEN]
    with subprocess.Popen([sys.executable, str(script), json.dumps(told, default=str)],
                          stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, found, now, over, keep))
        watcher.start()
        for line in process.stdout:
            event = json.loads(line)
            if "said" in event:
                found.said.append(event["said"])
            elif "error" in event:
                found.error = event["error"]
            elif "peak" in event:
                found.peak = max(found.peak, event["peak"])
            else:
                now[0] = event.get("begin", BETWEEN)
        over.set()
        watcher.join()
    assert process.returncode == (0 if found.error is None else 2), told
    found.finished = found.error is None
    return found


def _watch(
    pid: int, found: Peaks, now: list[str], over: threading.Event, keep: Callable[[Peaks], Any]
) -> None:
    root = psutil.Process(pid)
    since = kept = time.perf_counter()
    while not over.wait(_EVERY):
        phase, moment = now[0], time.perf_counter()
        found.seconds[phase] = found.seconds.get(phase, 0.0) + moment - since
        since = moment
        if moment - kept > _KEPT:
            keep(found)
            kept = moment
        resident = private = 0
        try:
            for process in [root, *root.children(recursive=True)]:
                memory = process.memory_info()
                resident += memory.rss
                private += memory.rss - getattr(memory, "shared", 0)
        except psutil.Error:  # one has just ended
            continue
        found.peak = max(found.peak, resident)
        found.phases[phase] = max(found.phases.get(phase, 0), resident)
        found.private[phase] = max(found.private.get(phase, 0), private)
