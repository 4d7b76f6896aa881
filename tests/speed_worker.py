"""A loaded model that is timed when told to: the subject of bench_speed.

Run as `python speed_worker.py FILE THREADS CONTEXT`, with LLAMA_CPP_LIB_PATH naming the library;
JSON objects, one on each line. It first says {"buffers": bytes by name}, then for each line in

    -> {"prompt": tokens}                      <- {"seconds": ...}
    -> {"generated": tokens, "depth": tokens}  <- {"seconds": ...}
    -> end of input                            <- {"peak_rss": bytes}

As in llama-bench: random tokens, logits of the last token of a batch, 512 tokens in a micro-batch.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import llama_cpp

from skipcat_edge.bench_worker import peak_rss_bytes
from skipcat_edge.llama_log import keep_log

WARM_UP = 2
"""Tokens decoded before the clock starts, since another model was in the caches."""


class Model:
    """A model and a context of it. `buffers`: bytes by purpose and place."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        log = keep_log()
        llama_cpp.llama_backend_init()
        defaults = llama_cpp.llama_model_default_params()
        self._model: Any = llama_cpp.llama_model_load_from_file(path.encode(), defaults)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = context, threads, threads
        self._context: Any = self._model and llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise SystemExit(f"{path} cannot be loaded")
        self.buffers = dict(log.buffers)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._draw = random.Random(0)
        self._filled = 0

    def _decode(self, n_tokens: int) -> None:
        drawn = (self._draw.randrange(self._vocabulary) for _ in range(n_tokens))
        tokens = (llama_cpp.llama_token * n_tokens)(*drawn)
        if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, n_tokens)):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self._context)

    def _cut(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` of the cache."""
        llama_cpp.llama_memory_seq_rm(self._memory, -1, n_tokens, -1)
        self._filled = n_tokens

    def time_prompt(self, n_tokens: int) -> float:
        self._cut(0)
        self._decode(WARM_UP)
        self._cut(0)
        started = time.perf_counter()
        self._decode(n_tokens)
        seconds = time.perf_counter() - started
        self._cut(0)
        return seconds

    def time_decode(self, n_tokens: int, depth: int) -> float:
        """The cache keeps its first `depth` tokens for the next call."""
        if self._filled != depth:
            self._cut(0)
            for begin in range(0, depth, 512):
                self._decode(min(512, depth - begin))
            self._filled = depth
        for _ in range(WARM_UP):
            self._decode(1)
        self._cut(depth)
        started = time.perf_counter()
        for _ in range(n_tokens):
            self._decode(1)
        seconds = time.perf_counter() - started
        self._cut(depth)
        return seconds


def main() -> None:
    path, threads, context = sys.argv[1:]
    model = Model(path, int(threads), int(context))
    print(json.dumps({"buffers": model.buffers}), flush=True)
    for line in sys.stdin:
        test = json.loads(line)
        seconds = (model.time_prompt(test["prompt"]) if test.get("prompt")
                   else model.time_decode(test["generated"], test["depth"]))
        print(json.dumps({"seconds": seconds}), flush=True)
    print(json.dumps({"peak_rss": peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    main()
