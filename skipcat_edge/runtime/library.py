"""ggml's own quantisers, through ctypes on the installed llama_cpp library."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from skipcat_edge.errors import UserError
from skipcat_edge.format import block_size, tensor_bytes
from skipcat_edge.runtime.check import BUILD_COMMAND

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType


def library_dir() -> Path:
    """Directory of the installed llama_cpp's shared libraries; raises UserError if there is none."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise UserError(f"llama_cpp is not installed; run `{BUILD_COMMAND}`.")
    return Path(spec.origin).parent / "lib"


@cache
def load_library(name: str) -> ctypes.CDLL:
    """Load a library that llama_cpp brings, for example `ggml-base`."""
    for suffix in (".so", ".dylib", ".dll"):
        path = library_dir() / f"lib{name}{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    raise UserError(f"{library_dir()} has no lib{name}; run `{BUILD_COMMAND}`.")


@cache
def _ggml_base() -> ctypes.CDLL:
    library = load_library("ggml-base")
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return library


def requires_importance(type_: GGMLQuantizationType) -> bool:
    """Whether ggml quantises to `type_` only with importances."""
    return bool(_ggml_base().ggml_quantize_requires_imatrix(int(type_)))


def quantize(
    data: np.ndarray, type_: GGMLQuantizationType, importance: np.ndarray | None = None
) -> np.ndarray:
    """Quantise `data`: float32 [rows, columns] with ggml_quantize_chunk: uint8 [rows, row bytes].

    `importance`: float32 [columns], E[x_j^2] of the input, for ggml's search of scales. Raises
    UserError if a type that needs them gets none, or if a number in `data` is not finite; ValueError
    if `columns` is not a multiple of the block.
    """
    rows, columns = data.shape
    if columns % block_size(type_):
        raise ValueError(f"expected columns in whole blocks of {block_size(type_)}, got {columns}")
    if not np.isfinite(data).all():
        raise UserError("A weight is not a finite number; check the model.")
    library = _ggml_base()
    values = np.ascontiguousarray(data, dtype=np.float32)
    if importance is None and requires_importance(type_):
        raise UserError(f"{type_.name} needs calibration statistics for every layer it is used for; "
                        "choose another type, or pass --calibration.")
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    out = np.empty((rows, tensor_bytes(type_, 1, columns)), dtype=np.uint8)
    written = library.ggml_quantize_chunk(
        int(type_), values.ctypes.data, out.ctypes.data, 0, rows, columns,
        None if weights is None else weights.ctypes.data,
    )
    assert written == out.nbytes, (written, out.nbytes)
    return out
