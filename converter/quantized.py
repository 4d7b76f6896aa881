"""Factors and dense weights to the bytes that go into the file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from skipcat_edge.errors import UserError
from skipcat_edge.format import block_size, factor_type
from skipcat_edge.runtime.library import quantize

from .factorize import Factors, multiplied_out, refit, whiten
from .rounding import SWEEPS, round_with_feedback, supports_feedback

# Scales and offsets are float16; a weight of this size or less has both in every type.
_LARGEST = 6e4


@dataclass(frozen=True)
class Rounding:
    """How quantised numbers are chosen; what each part adds stands in docs/quality.md."""

    feedback: bool = True
    """Errors are passed on (GPTQ) instead of rounding every number by itself."""
    sweeps: int = SWEEPS
    """Of coordinate descent, after the errors were passed on."""
    refit: bool = True
    """B is fitted again to the projection as it was stored."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [rows, columns] as ggml stores it: uint8 [rows, row bytes]."""

    data: np.ndarray
    type: GGMLQuantizationType

    def dequantized(self) -> torch.Tensor:
        """What the runtime computes with: float32 [rows, columns]."""
        return torch.from_numpy(quants.dequantize(self.data, self.type).astype(np.float32, copy=False))


@dataclass(frozen=True)
class QuantizedFactors:
    """T (or A), the skip mask as bool [n] (None without Skip), and B' of each member."""

    T: QuantizedMatrix
    skip: np.ndarray | None
    B: tuple[QuantizedMatrix, ...]

    def projection(self) -> torch.Tensor:
        """A as the runtime computes with it: float32 [r, n]."""
        T = self.T.dequantized()
        if self.skip is None:
            return T
        return multiplied_out(T, torch.from_numpy(np.flatnonzero(self.skip)), len(self.skip))

    def multiplied_out(self) -> tuple[torch.Tensor, ...]:
        """What the runtime computes with in place of each member's W: float32 [m, n]."""
        A = self.projection()
        return tuple(part.dequantized() @ A for part in self.B)


def quantize_matrix(
    W: torch.Tensor, H: torch.Tensor | None, type_: GGMLQuantizationType, rounding: Rounding
) -> QuantizedMatrix:
    """Quantise W: [rows, n] to `type_`, or to F16 where its rows are not whole blocks.

    H: [n, n] of the input. Without it every number is rounded by itself; types whose layout
    `rounding` does not know get H's diagonal as ggml's importances. Raises UserError where a number
    is not finite, or too large for the type's scales.
    """
    stored = factor_type(type_, W.shape[1])
    if H is not None and rounding.feedback and supports_feedback(stored):
        if not bool(torch.isfinite(W).all()):
            raise UserError("A weight is not a finite number; check the model.")
        if float(W.abs().max()) > _LARGEST:
            raise UserError(f"A weight is too large for the scales of {stored.name}; use --quant F32.")
        try:
            return QuantizedMatrix(round_with_feedback(W, H, stored, rounding.sweeps), stored)
        except ValueError as error:  # passed-on errors may grow past what a scale can hold
            raise UserError(
                f"A weight cannot be stored as {stored.name}: {error}; use --quant F32.") from None
    importances = H is not None and not supports_feedback(stored) and block_size(stored) > 1
    importance = _numpy(H.diagonal()) if importances and H is not None else None
    return QuantizedMatrix(quantize(_numpy(W), stored, importance), stored)


def quantize_factors(
    factors: Factors,
    W: torch.Tensor,
    H: torch.Tensor | None,
    outputs: tuple[int, ...],
    type_: GGMLQuantizationType,
    rounding: Rounding,
    L: torch.Tensor | None = None,
) -> QuantizedFactors:
    """Quantise T: [r, n - r] and B: [m, r], whose rows are stacked members of `outputs` rows each.

    In this order: T with feedback against H_RR, B fitted again to what was stored, B with feedback
    against A H A^T. W: [m, n] is what the factors stand for, H: [n, n] its input's second moments
    (None: no calibration, plain rounding), L: its whitening, if it is known.
    """
    n = W.shape[1]
    skip = rest = None
    if factors.skip is not None:
        skip = np.zeros(n, dtype=bool)
        skip[factors.skip.cpu().numpy()] = True
        rest = torch.from_numpy(np.flatnonzero(~skip)).to(factors.T.device)
    H_T = H if H is None or rest is None else H[rest][:, rest]
    T = quantize_matrix(factors.T, H_T, type_, rounding)
    del H_T
    H_z = None
    if H is not None:
        A = multiplied_out(T.dequantized().to(H), factors.skip, n)
        H_z = A @ H @ A.T
    B = factors.B if H is None or not rounding.refit else refit(W.to(H), A, whiten(H).L if L is None else L)
    parts = torch.split(B, list(outputs))
    return QuantizedFactors(
        T, skip, tuple(quantize_matrix(part, H_z, type_, rounding) for part in parts))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
