"""How fast this machine's cores read memory together: what bounds the decoding of a model."""

from __future__ import annotations

import threading
import time

import numpy as np

# Far more than any cache holds.
_BYTES_PER_THREAD = 256 * 2**20
_PASSES = 5


def read_bandwidth(threads: int, bytes_per_thread: int = _BYTES_PER_THREAD, passes: int = _PASSES) -> float:
    """Bytes per second that `threads` threads read, the best of `passes`.

    Each finds the largest number in memory of its own: NumPy does so with vector loads and without
    holding Python's lock, so that only memory is waited for.
    """
    # written to, or all pages would be the same zeros
    arrays = [np.full(bytes_per_thread // 4, index, np.float32) for index in range(threads)]
    best = 0.0
    for _ in range(passes):
        barrier = threading.Barrier(threads + 1)

        def read(array: np.ndarray, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            array.max()
            barrier.wait()

        workers = [threading.Thread(target=read, args=(array,)) for array in arrays]
        for worker in workers:
            worker.start()
        barrier.wait()
        start = time.perf_counter()
        barrier.wait()
        best = max(best, threads * bytes_per_thread / (time.perf_counter() - start))
        for worker in workers:
            worker.join()
    return best


def affordable_bandwidth(threads: int) -> float:
    """`read_bandwidth` with no more than a quarter of the memory that is free."""
    import psutil

    share = psutil.virtual_memory().available // 4 // threads
    return read_bandwidth(threads, min(_BYTES_PER_THREAD, share))
