"""Speed, load time and memory of several files, measured in turns."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipcat_edge.bench_worker import Job
from skipcat_edge.errors import UserError
from skipcat_edge.gguf_file import require_gguf


@dataclass(frozen=True)
class Spread:
    """Repetitions of one measurement."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of `values`."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class PhoneConditions:
    """What a measurement on a phone depends on besides the file. Temperatures are those of the hottest CPU
    zone in °C, around the repetitions of all files, None where the phone does not tell."""

    cpus: tuple[int, ...]
    """The CPUs that the threads were pinned to; empty for all."""
    celsius_before: float | None
    celsius_after: float | None
    prompt_last_to_first: float
    """Speed of the last repetition over that of the first: below 1 where the phone throttles."""
    decode_last_to_first: float | None


@dataclass(frozen=True)
class Result:
    """One file's measurements; speeds in tokens per second."""

    file: str
    prompt_tps: Spread
    decode_tps: Spread | None
    """None for a model without a decoder."""
    load_s: float | None
    """None for a phone, whose llama-bench does not tell; so is the memory."""
    peak_rss_bytes: int | None
    """Resident memory at its highest, of a fresh process that measured only this file; Python and
    the library are about 60 MB of it."""
    threads: int
    phone: PhoneConditions | None = None
    """None for this machine."""

    def to_json(self) -> dict[str, Any]:
        """The fields above as plain values; `phone` only where there is one."""
        values = asdict(self)
        if self.phone is None:
            del values["phone"]
        return values


class Worker:
    """A process that has one file loaded and measures when told to."""

    def __init__(self, job: Job) -> None:
        """Start loading. Raises UserError if the file cannot be loaded."""
        self._job = job
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (stop)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "skipcat_edge.bench_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8",
        )
        try:
            self.load_s = float(self._ask(json.dumps(asdict(job)))["load_s"])
        except BaseException:
            self.stop()
            raise
        self._seconds: list[dict[str, float | None]] = []

    def measure(self, keep: bool = True) -> None:
        """Measure once; a warm-up is not kept. Raises UserError if the process fails."""
        seconds = self._ask('"measure"')
        if keep:
            self._seconds.append(seconds)

    def finish(self) -> Result:
        """End the process and sum up. Raises UserError if the process fails."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = int(self._answer()["peak_rss_bytes"])
        job = self._job
        prompts = [job.prompt_tokens / s for row in self._seconds if (s := row["prompt_s"])]
        decodes = [job.gen_tokens / s for row in self._seconds if (s := row["decode_s"])]
        decode = Spread.of(decodes) if decodes else None
        return Result(job.file, Spread.of(prompts), decode, self.load_s, peak, job.threads)

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
        return f"{self._job.file}: the process that measured it ended with {how}{last}; {hint}."


def bench(files: Sequence[str], *, prompt_tokens: int, gen_tokens: int, threads: int, repetitions: int,
          advance: Callable[[str], None] = lambda _: None) -> list[Result]:
    """Measure `files`, one process each, one repetition of each in turn, after a warm-up of each.

    Turns spread the machine's moods evenly, so that files can be compared. `advance` hears the
    file before each of the (repetitions + 1) * len(files) steps. Prompt: `prompt_tokens` random
    tokens in one batch; decode: `gen_tokens` tokens one by one; both from an empty cache.

    Raises UserError if a file cannot be loaded or a process fails.
    """
    for file in files:
        require_gguf(Path(file))
    with ExitStack() as stack:
        workers: list[Worker] = []
        for file in files:
            worker = Worker(Job(file, prompt_tokens, gen_tokens, threads))
            stack.callback(worker.stop)
            workers.append(worker)
        for repetition in range(repetitions + 1):
            for file, worker in zip(files, workers, strict=True):
                advance(file)
                worker.measure(keep=repetition > 0)
        return [worker.finish() for worker in workers]
