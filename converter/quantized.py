"""Factors and dense weights to the bytes that go into the file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType

from skipcat_edge.format import factor_type
from skipcat_edge.runtime.library import quantize, requires_importance

from .factorize import Factors


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [rows, columns] as ggml stores it: uint8 [rows, row bytes]."""

    data: np.ndarray
    type: GGMLQuantizationType


@dataclass(frozen=True)
class QuantizedFactors:
    """T (or A), the skip mask as bool [n] (None without Skip), and B' of each member."""

    T: QuantizedMatrix
    skip: np.ndarray | None
    B: tuple[QuantizedMatrix, ...]


def quantize_matrix(
    W: np.ndarray, type_: GGMLQuantizationType, importance: np.ndarray | None = None
) -> QuantizedMatrix:
    """Quantise W: [rows, columns] to `type_`, or to F16 where its rows are not whole blocks."""
    stored = factor_type(type_, W.shape[1])
    return QuantizedMatrix(quantize(W, stored, importance), stored)


def quantize_factors(
    factors: Factors, H: torch.Tensor | None, outputs: tuple[int, ...], type_: GGMLQuantizationType
) -> QuantizedFactors:
    """Quantise T: [r, n - r] and B: [m, r], whose rows are stacked members of `outputs` rows each.

    H: [n, n] of their input, for types that need importances.
    """
    n = factors.T.shape[1] + (0 if factors.skip is None else factors.rank)
    T_importance = z_importance = None
    if H is not None and requires_importance(type_):
        A = factors.projection(n)
        z_importance = ((A @ H) * A).sum(1)
        T_importance = H.diagonal()
    skip = None
    if factors.skip is not None:
        skip = np.zeros(n, dtype=bool)
        skip[factors.skip.cpu().numpy()] = True
        if T_importance is not None:
            T_importance = T_importance[torch.from_numpy(~skip).to(T_importance.device)]
    return QuantizedFactors(
        quantize_matrix(_numpy(factors.T), type_, None if T_importance is None else _numpy(T_importance)),
        skip,
        tuple(
            quantize_matrix(_numpy(B), type_, None if z_importance is None else _numpy(z_importance))
            for B in torch.split(factors.B, list(outputs))
        ),
    )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
