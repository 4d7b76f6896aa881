"""The process that has one file loaded and measures it, seen from outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from skipcat_edge.bench_worker import Job
from skipcat_edge.errors import UserError


class BenchProcess:
    """`bench_worker` with one file. Its answers are plain values, in seconds and bytes."""

    def __init__(self, job: Job) -> None:
        """Start loading. Raises UserError if the file cannot be loaded."""
        self._file = job.file
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (stop)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "skipcat_edge.bench_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8",
        )
        try:
            loaded = self._ask(json.dumps(asdict(job)))
        except BaseException:
            self.stop()
            raise
        self.load_s = float(loaded["load_s"])
        self.buffers: dict[str, int] = loaded["buffers"]
        self.context: int = loaded["context"]

    def measure(self, threads: int, level: float | None = None,
                schedule: str | None = None) -> dict[str, float | None]:
        """Seconds of one repetition: `prompt_s` and `decode_s`. Raises UserError if the process fails."""
        return self._ask(json.dumps({"threads": threads, "level": level, "schedule": schedule}))

    def finish(self) -> int:
        """End the process; the most bytes that it had resident. Raises UserError if it fails."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return int(self._answer()["peak_rss_bytes"])

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):  # a line the process did not live to read
                    stream.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer, or its absence, tells why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(self._how_it_died())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _how_it_died(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = "free some memory" if code == -signal.SIGKILL else "see `skipcat-edge runtime check`"
        last = f" ({lines[-1]})" if lines else ""
        return f"{self._file}: the process that measured it ended with {how}{last}; {hint}."
