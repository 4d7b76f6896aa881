"""Rank levels: the speeds of one file, and which of them a loaded model runs at."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from skipcat_edge import format as fmt
from skipcat_edge.errors import FormatError, UserError
from skipcat_edge.gguf_file import open_gguf
from skipcat_edge.runtime.check import BUILD_COMMAND


def levels(llama: Any) -> tuple[float, ...]:
    """Ratios of the levels of `llama`, a llama_cpp.Llama, ascending; one for a file without levels.

    Raises UserError where the runtime knows no levels.
    """
    library = _library()
    return tuple(_shortest(library.skipcat_level_ratio(llama.model, place))
                 for place in range(library.skipcat_n_levels(llama.model)))


def get_level(llama: Any) -> float:
    """The level that `llama` runs at. Raises UserError as `levels`."""
    place: int = _library().skipcat_get_level(llama.ctx)
    return levels(llama)[place]


def set_level(llama: Any, level: float) -> None:
    """Run `llama` at `level`, a ratio of its file, from the next token on.

    What the cache holds stays, whatever level computed it; `llama.reset()` forgets it. Raises UserError where
    the file has no such level, and as `levels`.
    """
    known = levels(llama)
    place = _library().skipcat_get_level(llama.ctx)
    wanted = known.index(require_level(llama.model_path, known, level))
    if wanted == place:
        return
    if _library().skipcat_set_level(llama.ctx, wanted):
        raise UserError(f"{llama.model_path}: llama.cpp refuses the level {level:g}.")
    # else Llama.generate would sample a prompt that it has just seen from the other level's logits
    llama._requires_eval = True


def file_levels(path: Path) -> tuple[float, ...]:
    """As `levels`, of a file. Raises UserError as `open_gguf`, and FormatError."""
    reader = open_gguf(path)
    try:
        return fmt.read_levels(reader)
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}") from None


def require_level(file: Any, known: Sequence[float], level: float) -> float:
    """The one of the levels `known` of `file` that `level` names. Raises UserError where there is none."""
    for each in known:
        if _shortest(each) == _shortest(level):
            return each
    raise UserError(f"{file} has no level {level:g}; {_told(known)}.")


def _told(known: Sequence[float]) -> str:
    if len(known) == 1:
        return f"its only level is {known[0]:g}"
    return f"its levels are {', '.join(f'{each:g}' for each in known[:-1])} and {known[-1]:g}"


@dataclass(frozen=True)
class Schedule:
    """Which level computes which generated token. They count from 0; the first one comes out of the prompt,
    which is always computed at the full level."""

    steps: tuple[tuple[int, float], ...]
    """(first token, level), the first one from token 0 on."""

    def at(self, index: int) -> float:
        """The level that computes generated token `index`."""
        return next(level for first, level in reversed(self.steps) if first <= index)

    def checked(self, file: Any, known: Sequence[float]) -> Schedule:
        """This one in the levels `known` of `file`. Raises UserError where one is missing."""
        return Schedule(tuple((first, require_level(file, known, level)) for first, level in self.steps))

    def __str__(self) -> str:
        return ",".join(f"{first}:{level:g}" for first, level in self.steps)


def parse_schedule(text: str) -> Schedule:
    """`0:0.8,32:0.7,128:0.6` as a Schedule. Raises UserError for anything else."""
    parts = [re.fullmatch(r"\s*(\d{1,9})\s*:\s*([\d.]+)\s*", part, re.ASCII) for part in text.split(",")]
    steps = tuple((int(part[1]), parse_level(part[2])) for part in parts if part)
    if len(steps) < len(parts):
        raise UserError(f"{text[:60]!r} is not a schedule of levels; write it like 0:0.8,32:0.7,128:0.6.")
    if steps[0][0] != 0:
        raise UserError(f"The schedule {text[:60]} has no level for the first tokens; begin it with 0:LEVEL.")
    for (before, _), (after, _) in pairwise(steps):
        if after <= before:
            raise UserError(f"The schedule {text[:60]} has {after} after {before}; let the tokens rise.")
    return Schedule(steps)


def parse_level(text: str) -> float:
    """`0.8` as a number. Raises UserError unless it is above 0 and at most 1."""
    if not re.fullmatch(r"\d*\.?\d+|\d+\.", text, re.ASCII) or not 0 < float(text) <= 1:
        raise UserError(f"{text[:40]!r} is not a level; give one of the file's ratios, for example 0.6.")
    return float(text)


def _shortest(ratio: float) -> float:
    """0.8 for the float32 nearest to it: files hold no more."""
    return float(f"{ctypes.c_float(ratio).value:.7g}")


@cache
def _library() -> Any:
    """llama_cpp's library with the C functions of cpp_patches' skipcat.h."""
    from skipcat_edge.session import import_llama_cpp

    library = import_llama_cpp().llama_cpp._lib
    signatures = {
        "skipcat_n_levels": (ctypes.c_int32, [ctypes.c_void_p]),
        "skipcat_level_ratio": (ctypes.c_float, [ctypes.c_void_p, ctypes.c_int32]),
        "skipcat_get_level": (ctypes.c_int32, [ctypes.c_void_p]),
        "skipcat_set_level": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise UserError(f"The installed llama_cpp has no levels; run `{BUILD_COMMAND}`.") from None
        function.restype, function.argtypes = result, arguments
    return library
