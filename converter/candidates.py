"""What allocation chooses from: for every group, who may share a projection, and what that costs in loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from gguf import GGMLQuantizationType

from skipcat_edge import format as fmt

from .collector import BlockStatistics
from .compensation import CompressedInput
from .factorize import (
    Decomposition,
    Method,
    decompose,
    factorize,
    refit,
    squared_singular_values,
    whiten,
)
from .layers import Layer
from .quantized import Rounding, quantize_factors, quantize_matrix

# From this many bits on, rounding with feedback costs too little to choose by.
_EXACT_BITS = 8.0
# Ranks at which rounding is tried, as shares of the largest rank that saves anything.
_TRIED = (0.5, 1.0)

Form = bool | None
"""How a candidate is stored: True with Skip, False without, None dense."""


@dataclass(frozen=True)
class Candidate:
    """Layers that may share one projection, and what it loses."""

    members: tuple[Layer, ...]
    spectrum: np.ndarray
    """Squared singular values, descending: dropping one costs its value in loss."""
    rounding: Mapping[Form, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Measured loss by rounding: (ranks, losses); forms that are not there lose nothing."""

    @property
    def m(self) -> int:
        return sum(layer.m for layer in self.members)

    @property
    def n(self) -> int:
        return self.members[0].n

    def weighed(self, ranks: np.ndarray, form: Form, caution: float) -> np.ndarray:
        """The same for choosing between candidates: a loss counts more, the more of the candidate it takes.

        The prediction is of second order and from the sample that the factors were fitted to: large losses
        come out larger than predicted.
        """
        losses = self.losses(ranks, form)
        weighed: np.ndarray = losses * (1 + caution * losses / max(float(self.spectrum.sum()), 1e-300))
        return weighed

    def losses(self, ranks: np.ndarray, form: Form) -> np.ndarray:
        """Predicted loss at each of `ranks` (dense: whatever the rank)."""
        tail = np.concatenate([np.cumsum(self.spectrum[::-1])[::-1], [0.0]])
        cut = np.zeros(len(ranks)) if form is None else tail[np.minimum(ranks, len(tail) - 1)]
        if form not in self.rounding:
            return cut
        tried, losses = self.rounding[form]
        rounded: np.ndarray = cut + np.interp(ranks, tried, losses)
        return rounded


@dataclass(frozen=True)
class Problem:
    """The layers of one owner to be, stacked along their outputs, with their statistics."""

    W: torch.Tensor
    """[m, n]"""
    C: torch.Tensor
    """[k, n], with C^T C = W^T G W; W itself where no gradient counts."""
    H: torch.Tensor | None
    """[n, n]; None: the inputs do not count."""
    L: torch.Tensor | None
    """[n, n], H's whitening."""
    damping: float
    weights: torch.Tensor
    """[m], the mean of each layer's diagonal of G; ones where no gradient counts."""

    def decomposition(self) -> Decomposition:
        """Of the loss that `C` and `L` describe."""
        return decompose(self.C, self.L)

    def total(self) -> float:
        """The loss of leaving the layers out."""
        return _squares(self.C, self.L)


def problem(
    members: Sequence[Layer],
    weights: Mapping[str, torch.Tensor],
    statistics: BlockStatistics,
    method: Method,
    compressed: CompressedInput | None = None,
) -> Problem:
    """Stack `members`, whose W are in `weights` by tensor name, for `method`.

    `compressed`: what they read in the compressed model, in place of the dense model's H.
    """
    W = torch.cat([weights[layer.tensor] for layer in members]).double()
    ones = torch.ones(len(W), dtype=torch.float64, device=W.device)
    if not statistics or not method.whiten:
        return Problem(W, W, None, None, 0.0, ones)
    M = None if compressed is None else compressed.M.to(W)
    W = W if M is None else W @ M
    C, means = W, ones
    known = [entry.output.mean_weight for entry in statistics.values() if entry.output is not None]
    if method.two_sided and known:
        C, means = _weighed(members, W, statistics, float(np.mean(known)), M)
    # before the whitening, which is as large
    del M
    own = statistics[members[0].tensor].input
    H = (own.H if compressed is None else compressed.H).to(W)
    whitening = whiten(H)
    return Problem(W, C, H, whitening.L, whitening.damping, means)


def _weighed(
    members: Sequence[Layer], W: torch.Tensor, statistics: BlockStatistics, mean: float,
    M: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """C: [k, n] of the stacked W: [m, n], which has been multiplied by M already, and the weight of each row
    of W. A layer that is only a part of its module has no C of its own; it gets its block's `mean` weight."""
    C, weights = [], []
    for layer, part in zip(members, torch.split(W, [layer.m for layer in members]), strict=True):
        output = statistics[layer.tensor].output
        weight = mean if output is None else output.mean_weight
        if output is None:
            C.append(mean**0.5 * part)
        else:
            C.append(output.C.to(W) if M is None else output.C.to(W) @ M)
        weights.append(torch.full((layer.m,), weight, dtype=torch.float64, device=W.device))
    return torch.cat(C), torch.cat(weights)


def alternatives(group: tuple[Layer, ...], share: bool | None) -> Iterator[list[tuple[Layer, ...]]]:
    """Ways to give the layers of a group projections: all together (Cat), each its own, or both."""
    if share is not False and len(group) > 1:
        yield [group]
    if not share or len(group) == 1:
        yield [(layer,) for layer in group]


def measure(
    owner: Problem,
    members: tuple[Layer, ...],
    type_: GGMLQuantizationType,
    method: Method,
    rounding: Rounding,
    unit: float = 1.0,
) -> Candidate:
    """The candidate of `members`: its spectrum, and what rounding to `type_` costs in each form, all
    in units of `unit`."""
    # its forms and ranks compare alike without the sweeps, which take most of the time
    rounding = replace(rounding, sweeps=0)
    losses: dict[Form, tuple[np.ndarray, np.ndarray]] = {}
    if bits(type_) >= _EXACT_BITS or owner.H is None:
        values = squared_singular_values(owner.C, owner.L)
    else:
        decomposition = owner.decomposition()
        values = decomposition.values
        losses[None] = np.zeros(1), np.array([_dense_loss(owner, type_, rounding) * unit])
        for skip in (False, True) if method.skip is None else (method.skip,):
            ranks = _tried_ranks(owner, fmt.rank_grid(type_, owner.W.shape[1]), skip)
            if ranks:
                tried = [_rounding_loss(owner, decomposition, rank, skip, type_, rounding) for rank in ranks]
                losses[skip] = np.array([0, *ranks], float), np.array([0.0, *tried]) * unit
    return Candidate(members, values.cpu().numpy() * unit, losses)


def bits(type_: GGMLQuantizationType) -> float:
    """Bits per element of `type_`."""
    return 8 * fmt.tensor_bytes(type_, 1, 256 * 32) / (256 * 32)


def _tried_ranks(owner: Problem, grid: int, skip: bool) -> list[int]:
    m, n = owner.W.shape
    saving = [
        rank for rank in range(grid, min(m, n - 1 if skip else n) + 1, grid)
        if fmt.factor_parameters(m, n, rank, skip) < m * n
    ]
    return sorted({saving[round(share * (len(saving) - 1))] for share in _TRIED}) if saving else []


def _rounding_loss(
    owner: Problem, decomposition: Decomposition, rank: int, skip: bool, type_: GGMLQuantizationType,
    rounding: Rounding,
) -> float:
    """Loss of the stored factors beyond that of exact ones.

    Rounding A is seen in full, as B is fitted to it: W - B A = W (I - X A), so that C stands in for
    G. Rounding B leaves noise that G's mean weighs.
    """
    H = owner.H
    assert H is not None
    factors = factorize(owner.W, decomposition, rank, skip)
    stored = quantize_factors(factors, owner.W, H, (len(owner.W),), type_, rounding)
    A = stored.projection().to(H)
    cut = _squares(owner.C - refit(owner.C, A, owner.L) @ A, owner.L)
    exact = float(decomposition.values[rank:].sum())
    noise = refit(owner.W, A, owner.L) - stored.B[0].dequantized().to(H)
    rounded = float(((noise @ (A @ H @ A.T) * noise).sum(1) * owner.weights).sum())
    return max(0.0, cut - exact) + rounded


def _dense_loss(owner: Problem, type_: GGMLQuantizationType, rounding: Rounding) -> float:
    H = owner.H
    assert H is not None
    noise = owner.W - quantize_matrix(owner.W, H, type_, rounding).dequantized().to(H)
    return float(((noise @ H * noise).sum(1) * owner.weights).sum())


def _squares(E: torch.Tensor, L: torch.Tensor | None) -> float:
    """|E L|^2"""
    return float((E if L is None else E @ L).square().sum())
