"""Quantisation with error feedback: codes are chosen to keep W x, not W.

Minimises tr((W - Q) H (W - Q)^T) over what ggml can store. Columns are rounded one after another and
each one's error is passed on to those that follow (GPTQ, arXiv 2210.17323); then sweeps of coordinate
descent choose each code and each scale again, given all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType

from skipcat_edge.errors import UserError
from skipcat_edge.runtime.library import quantize

from .block_types import BLOCK_TYPES, BlockType
from .symmetric import cholesky_, inverse_of_cholesky_, with_diagonal

# Of H's mean diagonal: directions that the calibration text hardly shows are kept near W.
DAMPING = 1e-2
SWEEPS = 3

# Where in the range of a block's codes its largest element may fall, as a share of the range:
# above 1 it is clipped, which leaves finer steps for the others.
_STRETCHES = tuple(float(value) for value in np.linspace(0.72, 1.24, 14))


@dataclass
class _Rounded:
    """The codes and grids of W: [m, n], transposed so that one column of W is contiguous."""

    values: torch.Tensor
    """scale * code + offset: [n, m]."""
    codes: torch.Tensor
    """[n, m]."""
    scale: torch.Tensor
    """[n / sub, m]."""
    offset: torch.Tensor
    """[n / sub, m]."""


def supports_feedback(type_: GGMLQuantizationType) -> bool:
    """Whether `round_with_feedback` knows how ggml stores `type_`."""
    return type_ in BLOCK_TYPES


def round_with_feedback(
    W: torch.Tensor, H: torch.Tensor, type_: GGMLQuantizationType, sweeps: int = SWEEPS
) -> np.ndarray:
    """Quantise W: [m, n] for inputs of second moments H: [n, n] to ggml's bytes: uint8 [m, row bytes].

    n must be a multiple of the type's block. Raises KeyError for types without `supports_feedback`.
    """
    block_type = BLOCK_TYPES[type_]
    added = _damping(H)
    U, importance = _inverse_factor(H, added)
    Wt = W.float().T.contiguous()
    data = np.zeros((W.shape[0], W.shape[1] // block_type.block * block_type.block_bytes), dtype=np.uint8)
    rounded = _feed_back(Wt, U, importance, block_type, data)
    del U
    H32 = H.float()
    H32.diagonal().copy_(H.double().diagonal() + added)
    for _ in range(sweeps):
        _sweep(Wt, H32, block_type, rounded)
    codes = rounded.codes.T.cpu().numpy().astype(np.int16)
    if block_type.simple:
        scale, offset = (part.T.cpu().numpy() for part in (rounded.scale, rounded.offset))
        return block_type.from_grids(scale, offset, codes)
    return block_type.with_codes(data, codes)


def _damping(H: torch.Tensor) -> float:
    """What is added to H's diagonal to make it invertible."""
    if not bool(torch.isfinite(H).all()):
        raise UserError("The second moments of a layer's input are not finite numbers; calibrate again.")
    mean = float(H.double().diagonal().mean())
    return DAMPING * mean if mean > 0 else 1.0


def _inverse_factor(H: torch.Tensor, added: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper U with U^T U = (H + added I)^-1, and 1 / U_jj^2, in float32. Raises UserError where H, damped
    already, is no second moments."""
    L = cholesky_(with_diagonal(H.double(), added))
    U = None if L is None else cholesky_(inverse_of_cholesky_(L), upper=True)
    if U is None:
        raise UserError("The second moments of a layer's input are not those of any numbers; "
                        "calibrate again.")
    return U.float(), (1 / U.diagonal().square()).float()


def _feed_back(
    Wt: torch.Tensor, U: torch.Tensor, weight: torch.Tensor, block_type: BlockType, data: np.ndarray
) -> _Rounded:
    n, m = Wt.shape
    left = Wt.clone()
    parts = n // block_type.sub
    rounded = _Rounded(torch.empty_like(Wt), torch.empty_like(Wt),
                       torch.empty(parts, m, device=Wt.device), torch.zeros(parts, m, device=Wt.device))
    per_block = block_type.block // block_type.sub
    for start in range(0, n, block_type.block):
        end = start + block_type.block
        grids = slice(start // block_type.sub, start // block_type.sub + per_block)
        scale, offset = _choose_grids(left[start:end], weight[start:end], block_type, data, start)
        rounded.scale[grids], rounded.offset[grids] = scale, offset
        # in runs of `sub`: within one every column shares a grid, and the errors passed on stay small
        for first in range(start, end, block_type.sub):
            last = first + block_type.sub
            grid = first // block_type.sub
            inverse = _inverse(rounded.scale[grid])
            errors = torch.empty(block_type.sub, m, device=Wt.device)
            for column in range(first, last):
                w, scale, offset = left[column], rounded.scale[grid], rounded.offset[grid]
                code = torch.round((w - offset) * inverse).clamp_(block_type.low, block_type.high)
                value = code * scale + offset
                rounded.codes[column], rounded.values[column] = code, value
                error = (w - value) / U[column, column]
                errors[column - first] = error
                if column + 1 < last:
                    left[column + 1 : last].addr_(U[column, column + 1 : last], error, alpha=-1)
            left[last:].addmm_(U[first:last, last:].T, errors, alpha=-1)
    return rounded


def _choose_grids(
    block: torch.Tensor, weight: torch.Tensor, block_type: BlockType, data: np.ndarray, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets [block / sub, m] for block: [block, m], whose columns matter by `weight`.

    K-quants take ggml's own search, whose bytes are put into `data`.
    """
    if block_type.simple:
        search = _search_symmetric if block_type.low < 0 else _search_affine
        scale, offset = search(block, weight, block_type)
        return scale[None], offset[None]
    importance = (weight / weight.mean()).cpu().numpy()
    found = quantize(block.T.cpu().numpy(), block_type.type, importance)
    index = start // block_type.block
    data[:, index * block_type.block_bytes : (index + 1) * block_type.block_bytes] = found
    scale, offset = (torch.from_numpy(part.T.copy()).to(block.device) for part in block_type.grids(found))
    return scale, offset


def _search_symmetric(
    block: torch.Tensor, weight: torch.Tensor, block_type: BlockType
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of some scales for codes in [low, high] around zero: (scale, zero) [m]."""
    largest = block.gather(0, block.abs().argmax(0, keepdim=True))[0]
    if block_type.high == -block_type.low:
        largest = largest.abs()
        stretches: tuple[float, ...] = (1.0,)
    else:
        # the side with one more code goes to the larger side of the block
        stretches = _STRETCHES
    tried = [_half(largest / (block_type.low * stretch)) for stretch in stretches]
    best = _best_scale(block, weight, block_type, tried)
    return best, torch.zeros_like(best)


def _best_scale(
    block: torch.Tensor, weight: torch.Tensor, block_type: BlockType, scales: list[torch.Tensor]
) -> torch.Tensor:
    best, least = scales[0], torch.full_like(scales[0], float("inf"))
    for scale in scales:
        codes = torch.round(block * _inverse(scale)).clamp_(block_type.low, block_type.high)
        # the least-squares scale of these codes is often better than the one they came from
        fitted = _half((weight @ (codes * block)) / (weight @ codes.square()).clamp(min=1e-30))
        for each in (scale, fitted):
            error = weight @ (block - codes * each).square()
            better = error < least
            best, least = torch.where(better, each, best), torch.where(better, error, least)
    return best


def _search_affine(
    block: torch.Tensor, weight: torch.Tensor, block_type: BlockType
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of some (scale, offset) [m] for codes in [0, high]."""
    lowest, highest = block.min(0).values, block.max(0).values
    best = (torch.zeros_like(lowest), torch.zeros_like(lowest))
    least = torch.full_like(lowest, float("inf"))
    shares = (0.0, 0.04, 0.08, 0.13, 0.18)
    for below in shares:
        for above in shares:
            offset = _half(lowest + below * (highest - lowest))
            scale = _half((highest - above * (highest - lowest) - offset) / block_type.high)
            codes = torch.round((block - offset) * _inverse(scale)).clamp_(0, block_type.high)
            error = weight @ (block - offset - codes * scale).square()
            better = error < least
            best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
            least = torch.where(better, error, least)
    return best


def _sweep(Wt: torch.Tensor, H: torch.Tensor, block_type: BlockType, rounded: _Rounded) -> None:
    """Choose every scale (where it is stored by itself) and every code again, given all others."""
    n = len(Wt)
    values, codes = rounded.values, rounded.codes
    for first in range(0, n, block_type.sub):
        last = first + block_type.sub
        grid, part = first // block_type.sub, slice(first, last)
        inner = H[part, part]
        pull = H[part] @ (Wt - values)
        if block_type.simple:
            pull = _refit_grid(pull, inner, rounded, part, grid, block_type)
        scale, offset = rounded.scale[grid], rounded.offset[grid]
        inverse = _inverse(scale)
        for column in range(first, last):
            row = column - first
            wanted = values[column] + pull[row] / inner[row, row]
            code = torch.round((wanted - offset) * inverse).clamp_(block_type.low, block_type.high)
            value = code * scale + offset
            change = values[column] - value
            codes[column], values[column] = code, value
            pull.addr_(inner[row], change)


def _refit_grid(
    pull: torch.Tensor, inner: torch.Tensor, rounded: _Rounded, part: slice, grid: int, block_type: BlockType
) -> torch.Tensor:
    """One Newton step on a block's scale, and on its offset where it has one; returns the new pull."""
    codes = rounded.codes[part]
    directions = [(codes, rounded.scale)]
    if block_type.low == 0:
        directions.append((torch.ones_like(codes), rounded.offset))
    for direction, stored in directions:
        bent = inner @ direction
        gain, curvature = (direction * pull).sum(0), (direction * bent).sum(0)
        old = stored[grid]
        new = _half(old + gain / curvature.clamp(min=1e-30))
        step = new - old
        # rounding to float16 may spoil the step
        helps = (2 * gain * step - curvature * step.square() > 0) & torch.isfinite(new)
        step = torch.where(helps, step, torch.zeros_like(step))
        stored[grid] = old + step
        pull = pull - bent * step
    rounded.values[part] = codes * rounded.scale[grid] + rounded.offset[grid]
    return pull


def _half(values: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, as ggml stores scales."""
    return values.half().float()


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
