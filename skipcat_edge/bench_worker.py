"""One file's measurements in a process of its own, so that its memory is nobody else's.

Run as `python -m skipcat_edge.bench_worker`; JSON objects, one on each line. The first line in
is a `Job`; each further line asks for one measurement, and the end of the input for the memory:

    -> {"file": ..., "prompt_tokens": ..., "gen_tokens": ..., "threads": ...}
    <- {"load_s": ..., "buffers": bytes by name, "context": tokens}
    -> {"threads": ..., "level": ratio or null, "schedule": as --progressive or null}
    <- {"prompt_s": ..., "decode_s": ... or null}
    -> end of input
    <- {"peak_rss_bytes": ...}

A UserError is answered with {"error": sentence}, and the worker ends.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from skipcat_edge.decoding import time_batches
from skipcat_edge.errors import UserError
from skipcat_edge.levels import parse_schedule, set_level
from skipcat_edge.llama_log import keep_log
from skipcat_edge.rpc import connect
from skipcat_edge.session import BATCH, import_llama_cpp, model_info, open_embedding, open_model


@dataclass(frozen=True)
class Job:
    """What to measure."""

    file: str
    prompt_tokens: int
    gen_tokens: int
    threads: int
    """Of the loading, and the most that a measurement asks for."""
    servers: Sequence[str] = ()
    """RPC servers that compute, as HOST:PORT."""


class Measurer:
    """A loaded model. `load_s`: seconds from nothing to ready, the page cache as it was."""

    def __init__(self, job: Job) -> None:
        """Raises UserError if the file cannot be loaded or its context is too short for the job."""
        info = model_info(Path(job.file))
        import_llama_cpp()
        context = job.prompt_tokens if info.embedding else max(job.prompt_tokens, job.gen_tokens)
        if 0 < info.context_length < context:
            raise UserError(
                f"{job.file}: its context holds {info.context_length} tokens, but {context} are asked for; "
                "use fewer --prompt-tokens or --gen-tokens."
            )
        connect(job.servers)
        started = time.perf_counter()
        self._llama: Any = (
            open_embedding(Path(job.file), context, job.threads, needs_vocabulary=False) if info.embedding
            else open_model(Path(job.file), context=context, batch=max(BATCH, context), threads=job.threads,
                            needs_vocabulary=False)
        )
        self.load_s = time.perf_counter() - started
        self.buffers = dict(keep_log().buffers)
        self.context = int(self._llama.n_ctx())
        draw = random.Random(0)
        vocabulary = self._llama.n_vocab()
        self._prompt = [draw.randrange(vocabulary) for _ in range(job.prompt_tokens)]
        self._decode: list[list[int]] | None = None
        if not info.embedding:
            self._decode = [[draw.randrange(vocabulary)] for _ in range(job.gen_tokens)]

    def measure(self, threads: int, level: float | None = None,
                schedule: str | None = None) -> dict[str, float | None]:
        """Seconds of one prompt in one batch, and of tokens one by one, each from an empty cache.

        All at `level`, None for the only one, but where `schedule` sets the level of each of the latter.
        """
        llama, turn = self._llama, None
        import_llama_cpp().llama_set_n_threads(llama.ctx, threads, threads)
        if level is not None:
            set_level(llama, level)
        if schedule is not None:
            steps = dict(parse_schedule(schedule).steps)

            def turn(index: int) -> None:
                if index in steps:
                    set_level(llama, steps[index])

        return {
            "prompt_s": time_batches(llama, [self._prompt]),
            "decode_s": None if self._decode is None else time_batches(llama, self._decode, turn=turn),
        }


def peak_rss_bytes() -> int:
    """The most memory that was resident in this process so far."""
    # getrusage alone would do, but on Linux a new program inherits its parent's maximum.
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer `requests` until they end."""

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        measurer = Measurer(Job(**json.loads(requests.readline())))
        answer({"load_s": measurer.load_s, "buffers": measurer.buffers, "context": measurer.context})
        for line in requests:
            answer(measurer.measure(**json.loads(line)))
    except UserError as error:
        answer({"error": error.message})
    else:
        answer({"peak_rss_bytes": peak_rss_bytes()})


if __name__ == "__main__":
    # The library may print: only answers may reach the pipe.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, pipe)
