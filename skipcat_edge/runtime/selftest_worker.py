"""Logits of golden models, in a process of its own: a kernel that crashes takes nobody else along.

Run as `python -m skipcat_edge.runtime.selftest_worker`; JSON objects, one on each line. One line in, a
`Job`; out comes {"ready": true} once the patched llama_cpp is imported, and then for each model in turn

    <- {"model": path, "stage": "loaded"}
    <- {"model": path, "stage": "prompt", "logits": [[...], ...]}    all tokens in one batch
    <- {"model": path, "stage": "decode", "logits": [[...], ...]}    the first of them one by one

What llama.cpp refuses is answered with {"model": path, "error": sentence}, and a runtime that is missing
with {"error": sentence} at once. A line is written before what follows it is tried, so that the last
one tells where the process died.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from skipcat_edge.errors import UserError


@dataclass(frozen=True)
class Job:
    """What to compute."""

    models: list[str]
    tokens: list[int]
    decoded: int
    """How many of the tokens are decoded one by one, too."""
    threads: int


def one_by_one(llama: Any, tokens: Sequence[int]) -> list[list[float]]:
    """Logits after each of `tokens`, decoded one by one from an empty cache: [tokens, vocabulary].

    Raises UserError if llama.cpp fails.
    """
    from skipcat_edge.decoding import clear
    from skipcat_edge.session import decode_error, import_llama_cpp

    llama_cpp = import_llama_cpp()
    clear(llama)
    rows = []
    for token in tokens:
        array = (llama_cpp.llama_token * 1)(token)
        code = llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(array, 1))
        if code:
            raise decode_error(f"llama_decode returned {code}")
        rows.append(llama_cpp.llama_get_logits(llama.ctx)[: llama.n_vocab()])
    return rows


def serve(job: Job, answers: TextIO) -> None:
    """Answer `job`."""

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    from skipcat_edge.decoding import all_logits
    from skipcat_edge.runtime.check import require_patched
    from skipcat_edge.session import open_model

    try:
        require_patched()
    except UserError as error:
        answer(error=error.message)
        return
    answer(ready=True)
    for model in job.models:
        try:
            llama = open_model(Path(model), context=len(job.tokens), threads=job.threads,
                               needs_vocabulary=False)
            answer(model=model, stage="loaded")
            answer(model=model, stage="prompt", logits=all_logits(llama, job.tokens).tolist())
            answer(model=model, stage="decode", logits=one_by_one(llama, job.tokens[: job.decoded]))
            llama.close()
        except UserError as error:
            answer(model=model, error=error.message)


if __name__ == "__main__":
    # The library may print: only answers may reach the pipe.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Job(**json.loads(sys.stdin.readline())), pipe)
