"""llama.cpp's C API for whole batches, without the cost of Python per token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from skipcat_edge.session import decode_error, import_llama_cpp

if TYPE_CHECKING:
    import numpy as np


def clear(llama: Any) -> None:
    """Forget all tokens. A model without a cache, an encoder, has nothing to forget."""
    llama_cpp = import_llama_cpp()
    memory = llama_cpp.llama_get_memory(llama.ctx)
    if memory:
        llama_cpp.llama_memory_clear(memory, True)


def time_batches(llama: Any, batches: Sequence[Sequence[int]], before: Sequence[Sequence[int]] = (),
                 turn: Callable[[int], None] | None = None) -> float:
    """Seconds to decode `batches` of tokens one after the other; those of `before` go first, uncounted.

    `turn` is told the number of each of `batches` before it is decoded, and its time counts. The cache is
    empty at first. Raises UserError if llama.cpp fails.
    """
    llama_cpp = import_llama_cpp()
    clear(llama)
    arrays = [(llama_cpp.llama_token * len(tokens))(*tokens) for tokens in (*before, *batches)]
    seconds = 0.0
    for index, array in enumerate(arrays):
        batch = llama_cpp.llama_batch_get_one(array, len(array))
        started = time.perf_counter()
        if turn is not None and index >= len(before):
            turn(index - len(before))
        code = llama_cpp.llama_decode(llama.ctx, batch)
        llama_cpp.llama_synchronize(llama.ctx)
        if index >= len(before):
            seconds += time.perf_counter() - started
        if code:
            raise decode_error(f"llama_decode returned {code}")
    return seconds


def all_logits(llama: Any, tokens: Sequence[int]) -> np.ndarray:
    """Logits after each of `tokens`, from an empty cache: float32 [tokens, vocabulary].

    A view of llama.cpp's own memory, valid until the next call. Raises UserError if llama.cpp fails.
    """
    clear(llama)
    return last_logits(llama, tokens, 0, len(tokens))


def last_logits(llama: Any, tokens: Sequence[int], position: int, wanted: int) -> np.ndarray:
    """Logits after each of the last `wanted` of `tokens`, whose first one stands at `position` of the cache:
    float32 [wanted, vocabulary].

    A view of llama.cpp's own memory, valid until the next call. Raises UserError if llama.cpp fails.
    """
    import numpy as np

    llama_cpp = import_llama_cpp()
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index >= len(tokens) - wanted
        code = llama_cpp.llama_decode(llama.ctx, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if code:
        raise decode_error(f"llama_decode returned {code}")
    if not wanted:
        return np.empty((0, llama.n_vocab()), np.float32)
    pointer = llama_cpp.llama_get_logits(llama.ctx)
    return np.ctypeslib.as_array(pointer, shape=(wanted, llama.n_vocab()))
