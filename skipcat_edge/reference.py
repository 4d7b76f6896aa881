"""The logits that a model is compared with: computed by a model that is loaded, or kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    """Logits of some windows in a file: float32, window after window, and at its end a CRC-32 of each."""

    def __init__(self, path: Path, windows: Sequence[Sequence[int]], vocabulary: int) -> None:
        import numpy as np

        self._logits = np.memmap(path, np.float32, "r", shape=(sum(map(len, windows)), vocabulary))
        self._sums = np.fromfile(path, np.uint32, offset=self._logits.nbytes)
        self._first: dict[tuple[int, ...], int] = {}
        row = 0
        for window in windows:
            self._first[tuple(window)] = row
            row += len(window)

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        import numpy as np

        first = self._first[tuple(tokens)]
        return np.asarray(self._logits[first : first + len(tokens)])


    def sound(self) -> bool:
        """Whether they are as they were written: a disk may lose some when the power fails."""
        return all(zlib.crc32(self(window).data) == found
                   for window, found in zip(self._first, self._sums, strict=True))


def finite_logits(llama: Any, which: str, tokens: Sequence[int]) -> np.ndarray:
    """As `all_logits`. Raises NotFiniteError, naming `which` model, where a logit is not finite."""
    return require_finite(all_logits(llama, tokens), which)


def require_finite(logits: np.ndarray, which: str) -> np.ndarray:
    """`logits`. Raises NotFiniteError, naming `which` model, where one is not finite."""
    import numpy as np

    if not np.isfinite(logits).all():
        raise NotFiniteError(f"The {which}'s logits are not finite; convert it again from sound weights.")
    return logits


def stored_reference(file: Path, windows: Sequence[Sequence[int]], vocabulary: int, open_: Callable[[], Any],
                     begin: Callable[[], Callable[[], None]] = lambda: lambda: None) -> StoredReference:
    """The logits of `file` for `windows` of tokens, whole, from the disk where an earlier call left them.

    Otherwise `open_` loads the model, which computes them, window by window, and is closed: no more than one
    window's logits are in memory. `begin` is called where they are computed, and what it returns after each
    window. Raises UserError where the disk cannot take them, and as `finite_logits`.
    """
    windows = [*dict.fromkeys(map(tuple, windows))]
    folder = cache_dir() / "logits"
    path = folder / f"{_key(file, windows)}.f32"
    size = 4 * vocabulary * sum(map(len, windows)) + 4 * len(windows)
    try:
        if path.exists() and path.stat().st_size == size:
            found = StoredReference(path, windows, vocabulary)
            if found.sound():
                with suppress(OSError):  # a cache that others filled
                    os.utime(path)  # it was asked for
                return found
        folder.mkdir(parents=True, exist_ok=True)
        _delete_old(folder)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise UserError(f"The logits of {file} take {decimal_bytes(size)}, but {folder} has "
                            f"{decimal_bytes(free)} left; use fewer --max-tokens or --no-cache.")
        _compute(path, windows, open_, begin)
        return StoredReference(path, windows, vocabulary)
    except OSError as error:
        raise UserError(f"The logits of {file} cannot be kept in {folder} ({error.strerror or error}); "
                        "use --no-cache.") from None


def _compute(path: Path, windows: Sequence[Sequence[int]], open_: Callable[[], Any],
             begin: Callable[[], Callable[[], None]]) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as out:
            llama = open_()
            try:
                advance = begin()
                sums = b""
                for window in windows:
                    logits = finite_logits(llama, "reference", window)
                    out.write(logits.data)
                    sums += zlib.crc32(logits.data).to_bytes(4, sys.byteorder)
                    advance()
                out.write(sums)
            finally:
                llama.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
