"""Ending llama.cpp's work early: a batch of a prompt may take a minute."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from skipcat_edge.llama_log import keep_log


class AbortedError(Exception):
    """A batch was not computed to its end; of it, nothing is left in the cache."""


@contextmanager
def abort_when(llama: Any, asked: Callable[[], bool]) -> Iterator[None]:
    """Within, a batch that `llama`, a llama_cpp.Llama, computes ends once `asked` says so: AbortedError.

    llama.cpp asks after each node of the graph, in the thread that computes the batch, which takes the GIL
    for it; ctypes drops what `asked` raises. The CPU's backend does this, and others never ask.
    """
    import llama_cpp

    aborted = False

    def ask(_data: Any) -> bool:
        nonlocal aborted
        aborted = aborted or asked()
        return aborted

    callback = llama_cpp.ggml_abort_callback(ask)  # llama.cpp keeps no reference of its own
    llama_cpp.llama_set_abort_callback(llama.ctx, callback, None)
    try:
        yield
    except RuntimeError:  # how llama_cpp says that llama_decode returned something
        if not aborted:
            raise
        _forget_batch(llama)
        raise AbortedError from None
    finally:
        llama_cpp.llama_set_abort_callback(llama.ctx, llama_cpp.ggml_abort_callback(), None)


def _forget_batch(llama: Any) -> None:
    """Back to the tokens before the batch, which `llama` did not count yet."""
    llama._requires_eval = True  # nothing vouches for the logits of the last of these tokens
    if not llama._ctx.kv_cache_seq_rm(-1, llama.n_tokens, -1):  # a recurrent state knows no way back
        llama.reset()
    keep_log().errors.clear()  # they are no reason of a later failure


@contextmanager
def ctrl_c_at_the_end() -> Iterator[Callable[[], bool]]:
    """Ctrl-C within the block raises KeyboardInterrupt at its end; what this yields tells whether it came.

    Python's own handler raises in whatever Python code is next. While llama.cpp runs, that is a callback, and
    what a callback raises is dropped. Nothing changes in other threads than the main one, and where SIGINT
    has another handler than Python's.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    pressed = False

    def press(_number: int, _frame: Any) -> None:
        nonlocal pressed
        pressed = True

    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    except AbortedError:
        if not pressed:
            raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def abort_on_ctrl_c(llama: Any) -> Iterator[None]:
    """Within, Ctrl-C ends a batch that `llama` computes; KeyboardInterrupt follows."""
    with ctrl_c_at_the_end() as pressed, abort_when(llama, pressed):
        yield
