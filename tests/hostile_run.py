"""Give files to the harness of tests/cpp/hostile, and go on after one that ends it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

RUNTIME_BYTES = 32 * 2**20
"""What a context of the harness's size holds by itself, about 25 MB, whatever the model."""
VOCABULARY_BYTES = 64 * 2**20
"""What a vocabulary may take beyond the size of its file: Llama 3's takes that in the smallest model, too."""


@dataclass(frozen=True)
class Verdict:
    """What became of one file."""

    loaded: bool
    message: str
    nbytes: int
    """The most that was allocated at one time; 0 where the harness does not count."""
    fault: str = ""
    """How the process ended, where it did."""


def run_harness(
    program: Path, paths: Iterable[Path], env: Mapping[str, str] | None = None
) -> dict[Path, Verdict]:
    """The verdict on each file."""
    options = {
        # a request for more than this is a fault by itself
        "ASAN_OPTIONS": "detect_leaks=0:max_allocation_size_mb=256",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "GGML_NO_BACKTRACE": "1",
    }
    waiting, verdicts = list(paths), {}
    while waiting:
        run = subprocess.run(
            [program],
            input="".join(f"{path}\n" for path in waiting),
            env=os.environ | options | (env or {}),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        lines = run.stdout.split("\n")
        started = [line for line in lines if line.startswith("start ")]
        done = [line.split(" ", 3) for line in lines if line.startswith("done ")]
        for path, (_, verdict, nbytes, message) in zip(waiting, done, strict=False):
            verdicts[path] = Verdict(verdict == "loaded", message, int(nbytes))
        if run.returncode:
            assert len(started) == len(done) + 1, run.stderr[-2000:]
            fault = f"exit code {run.returncode}: {run.stderr[-3000:]}"
            verdicts[waiting[len(done)]] = Verdict(False, "", 0, fault)
        else:
            assert len(done) == len(waiting), run.stdout[-2000:]
        waiting = waiting[len(started) :]
    return verdicts
