"""The logits that a model is compared with: computed by a model that is loaded, or kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skipcat_edge.decoding import all_logits
from skipcat_edge.errors import NotFiniteError, UserError
from skipcat_edge.runtime.source import cache_dir
from skipcat_edge.session import import_llama_cpp
from skipcat_edge.terminal import decimal_bytes

if TYPE_CHECKING:
    import numpy as np

_KEPT_S = 30 * 24 * 3600
"""Seconds after which logits that nothing asked for are deleted."""


class Reference(Protocol):
    """Logits after each of `tokens`, from an empty cache: float32 [tokens, vocabulary], finite."""

    def __call__(self, tokens: Sequence[int]) -> np.ndarray: ...


class LiveReference:
    """A loaded model. What it returns is its own memory, valid until the next call."""

    def __init__(self, llama: Any) -> None:
        self._llama = llama

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        return finite_logits(self._llama, "reference", tokens)

    def close(self) -> None:
        self._llama.close()


class StoredReference:
    """Logits of some windows in a file: float32, window after window."""

    def __init__(self, path: Path, windows: Sequence[Sequence[int]], vocabulary: int) -> None:
        import numpy as np

        self._logits = np.memmap(path, np.float32, "r", shape=(sum(map(len, windows)), vocabulary))
        self._first: dict[tuple[int, ...], int] = {}
        row = 0
        for window in windows:
            self._first[tuple(window)] = row
            row += len(window)

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        import numpy as np

        first = self._first[tuple(tokens)]
        return np.asarray(self._logits[first : first + len(tokens)])


def finite_logits(llama: Any, which: str, tokens: Sequence[int]) -> np.ndarray:
    """As `all_logits`. Raises NotFiniteError, naming `which` model, where a logit is not finite."""
    import numpy as np

    logits: np.ndarray = all_logits(llama, tokens)
    if not np.isfinite(logits).all():
        raise NotFiniteError(f"The {which}'s logits are not finite; convert it again from sound weights.")
    return logits


def stored_reference(file: Path, windows: Sequence[Sequence[int]], vocabulary: int, open_: Callable[[], Any],
                     begin: Callable[[], Callable[[], None]] = lambda: lambda: None) -> StoredReference:
    """The logits of `file` for `windows` of tokens, from the disk where an earlier call left them there.

    Otherwise `open_` loads the model, which computes them, window by window, and is closed: no more than one
    window's logits are in memory. `begin` is called where they are computed, and what it returns after each
    window. Raises UserError where the disk has no space for them, and as `finite_logits`.
    """
    folder = cache_dir() / "logits"
    path = folder / f"{_key(file, windows)}.f32"
    size = 4 * vocabulary * sum(map(len, windows))
    if not (path.exists() and path.stat().st_size == size):
        folder.mkdir(parents=True, exist_ok=True)
        _delete_old(folder)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise UserError(f"The logits of {file} take {decimal_bytes(size)}, but {folder} has "
                            f"{decimal_bytes(free)} left; use fewer --max-tokens or --no-cache.")
        part = path.with_suffix(f".{os.getpid()}.part")
        llama = open_()
        try:
            advance = begin()
            with part.open("wb") as out:
                for window in windows:
                    out.write(finite_logits(llama, "reference", window).data)
                    advance()
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
            llama.close()
    os.utime(path)  # it was asked for
    return StoredReference(path, windows, vocabulary)


def _key(file: Path, windows: Sequence[Sequence[int]]) -> str:
    """The same for the same file, by place, size and time, the same tokens and the same runtime, as another
    one may round otherwise."""
    stat, runtime = file.stat(), str(import_llama_cpp().__version__)
    tokens = [list(window) for window in windows]
    told = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, runtime, tokens]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _delete_old(folder: Path) -> None:
    for file in folder.iterdir():
        if time.time() - file.stat().st_mtime > _KEPT_S:
            file.unlink(missing_ok=True)
