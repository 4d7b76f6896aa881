"""A layer's factors one after another: what each is fitted to where levels use some of them only.

Factors that a higher level adds are fitted to what the stored ones leave, rounding included (in exact numbers
the same as cutting one decomposition twice: Eckart-Young). All are fitted to the inputs of the levels that
use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from gguf import GGMLQuantizationType

from .candidates import Problem
from .compensation import CompressedInput
from .factorize import factorize, refit
from .plan import PlannedOwner
from .quantized import QuantizedFactors, Rounding, quantize_factors

# Of the mean of H's diagonal: where the inputs say nothing the target stays W.
_DAMPING = 1e-4
# What a level counts beside one that does not correct the factors; for each correction.
_CORRECTED = 0.1


@dataclass(frozen=True)
class FittedStage:
    """Factors as they are stored, and what they take of the problem."""

    quantized: QuantizedFactors
    error: float
    """What is left of the loss of leaving the layers out, before rounding, in [0, 1]."""
    largest_t: float
    taken_w: torch.Tensor
    """Of W: [m, n], what the runtime computes with."""
    taken_c: torch.Tensor | None
    """Of C: [k, n]; None where no stage comes after."""


def fit_stage(
    owner: PlannedOwner, whole: Problem, below: Sequence[FittedStage], type_: GGMLQuantizationType,
    rounding: Rounding, last: bool,
) -> FittedStage:
    """The factors of `owner`, to be added to those of `below`, for the layers that `whole` describes.
    `last`: nothing will be added to these.

    Raises ValueError or RuntimeError where there are none.
    """
    left = whole
    for stage in below:
        assert stage.taken_c is not None
        left = replace(left, W=left.W - stage.taken_w.to(left.W), C=left.C - stage.taken_c)
    factors = factorize(left.W, left.decomposition(), owner.rank, owner.skip)
    quantized = quantize_factors(factors, left.W, left.H, owner.outputs, type_, rounding, left.L)
    taken_w = torch.cat(quantized.multiplied_out())
    taken_c = None
    if not last:
        A = quantized.projection().to(left.C)
        # rows of C and W are fitted alike, so that C's share needs no square root of G
        taken_c = taken_w.to(left.C) if left.C is left.W else refit(left.C, A, left.L) @ A
    error = factors.error
    if below:
        total = whole.total()
        error = factors.error * left.total() / total if total > 0 else 0.0
    return FittedStage(quantized, error, float(factors.T.abs().max()), taken_w, taken_c)


def stages_below(owner: PlannedOwner, owners: Sequence[PlannedOwner]) -> list[PlannedOwner]:
    """Those of the same layers that `owner`'s first level uses already."""
    if owner.levels is None:
        return []
    first = owner.levels[0]
    return [other for other in owners if other.used_at(first) and other.used_at(first - 1)]


def corrections(owner: PlannedOwner, owners: Sequence[PlannedOwner], levels: range) -> dict[int, int]:
    """How many of `owners`, all of the same layers, each of the `levels` that use `owner` adds to it."""
    first = owner.levels[0] if owner.levels else 0
    return {level: sum(other.levels is not None and first < other.levels[0] and other.used_at(level)
                       for other in owners) for level in levels}


def mixed_input(inputs: Mapping[int, CompressedInput], weights: Mapping[int, float]) -> CompressedInput:
    """What factors of several levels are fitted to: the least sum of their losses, by weight of level.

    `inputs`: of each level. Sum_k w_k |W M_k y_k - V y_k|^2 is least where V fits W M under H, with
    H = sum_k w_k H_k and M H = sum_k w_k M_k H_k.
    """
    if len(inputs) == 1:
        return next(iter(inputs.values()))
    total = sum(weights[level] for level in inputs)
    H = sum((weights[level] / total * each.H for level, each in inputs.items()), torch.tensor(0.0))
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    crossed = sum((weights[level] / total * (each.M.to(H) - eye) @ each.H for level, each in inputs.items()),
                  torch.tensor(0.0))
    ridge = _DAMPING * H.diagonal().mean().clamp(min=1e-30) * eye
    M = eye + torch.linalg.solve(H + ridge, crossed.T).T
    return CompressedInput(H, M, max(each.blend for each in inputs.values()))


@dataclass(frozen=True)
class LevelWeights:
    """What the loss of each level counts where factors serve several."""

    shared: tuple[float, ...] = (1.0,)
    """For factors that all of them use as they are."""
    corrected: float = 1.0
    """For those that are added to: for each correction that a level has, beside a level without."""

    @property
    def levels(self) -> int:
        """How many there are; one in a file without levels."""
        return len(self.shared)

    def of(self, corrections: Mapping[int, int]) -> dict[int, float]:
        """By level. `corrections`: how many each level that uses the factors adds to them."""
        if not any(corrections.values()):
            return {level: self.shared[level] for level in corrections}
        return {level: self.corrected**number for level, number in corrections.items()}


def level_weights(losses: Sequence[float], small_corrections: bool) -> LevelWeights:
    """By the predicted loss of each level. `small_corrections`: what a level adds is of a smaller type than
    what it adds to, so that a higher level has ranks to spare.

    Measured with the levels 0.6 and 0.8 of the demo model and MiniLM (docs/levels-quality.md).
    """
    least = max(1e-3 * max(losses), 1e-30)
    if small_corrections:
        # the lowest level has the least to give away: what corrects its factors answers for the others
        return LevelWeights(tuple(1 / max(loss, least) for loss in losses), _CORRECTED)
    # By what it loses alone a level would count as much as any other, and the last one came out worst. What
    # is added answers for the higher level: these factors lean no more to one than to the other.
    return LevelWeights(tuple(1 / max(loss, least) ** 2 for loss in losses))
