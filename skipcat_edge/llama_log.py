"""llama.cpp's log, kept instead of printed: the reasons of its failures, and the buffers it allocates."""

from __future__ import annotations

import ctypes
import re
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

_LEVEL_ERROR, _LEVEL_CONTINUED = 4, 5  # ggml.h; llama_cpp does not name them
_FUNCTION = re.compile(r"^(\w+: )+")
_UNINFORMATIVE = re.compile(r"(failed to load model|^failed to initialize the context$)")
_BUFFER = re.compile(r"(\S+) +(model|KV|RS|compute|output) +buffer +size += +([\d.]+) MiB")

_CALLBACKS: list[Any] = []  # llama.cpp keeps no reference of its own


@dataclass
class Log:
    """What llama.cpp said since `clear`."""

    errors: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    """The last lines."""
    buffers: dict[str, int] = field(default_factory=dict)
    """Bytes by purpose and place, such as `KV CPU` or `model CPU_REPACK`. The file itself, where it is mapped
    into memory, is among them."""

    def clear(self) -> None:
        self.errors.clear()
        self.buffers.clear()

    def reason(self) -> str:
        """The error lines as part of a sentence, without llama.cpp's function names."""
        reasons: list[str] = []
        for line in self.errors:
            text = _FUNCTION.sub("", _FUNCTION.sub("", line.strip()).removeprefix("error loading model: "))
            text = " ".join(text.rstrip(".").split())
            if text and text not in reasons:
                reasons.append(text)
        return "; ".join([text for text in reasons if not _UNINFORMATIVE.search(text)] or reasons[:1])

    def note_buffer(self, line: str) -> None:
        """Keep the size of a buffer if `line` tells one."""
        if found := _BUFFER.search(line):
            place, purpose, mebibytes = found.groups()
            name = f"{purpose} {place}"
            self.buffers[name] = self.buffers.get(name, 0) + round(float(mebibytes) * 2**20)


@lru_cache(maxsize=1)
def keep_log() -> Log:
    """Send llama.cpp's log to us, from the first call on."""
    import llama_cpp

    kept = Log()
    last_level = 0

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        nonlocal last_level
        line = text.decode("utf-8", errors="replace")
        if level == _LEVEL_ERROR:
            kept.errors.append(line)
        elif level == _LEVEL_CONTINUED and last_level == _LEVEL_ERROR and kept.errors:
            kept.errors[-1] += line
        else:
            kept.note_buffer(line)
        last_level = last_level if level == _LEVEL_CONTINUED else level

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    _CALLBACKS.append(log)
    return kept
