"""Error compensation: later layers answer for what earlier ones lost.

A layer is fitted to the inputs y that it will have in the compressed model, and to outputs blended
between W x, x being its input in the dense model, and W y: its target is W M y with
M = (1 - blend) I + blend E[x y^T] E[y y^T]^-1 (the closed form of SAES-SVD and MPIFA). The blend is
the one that predicts x best on the half of the text that M was not fitted to, so that a short text
does no harm. Two copies of a block run side by side, one dense, the other with what was stored so far.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from skipcat_edge.errors import UserError

from .block_chain import BlockChain, find_chain
from .calibration import Batch, CalibrationSet, half_of_rows
from .layers import Layer, LayerMap, linear_weight, stored_transposed
from .second_moments import SecondMoment
from .source_model import SourceModel

# Of E[y y^T]'s mean diagonal: where little is known M stays near I.
_DAMPING = 1e-4

# Moments of a few numbers per token need no more than this; every group costs two runs of its block.
_TOKENS_PER_INPUT = 16
_LEAST_TOKENS = 16_384
# Rows that are compared with all others at a time.
_ROWS = 512


@dataclass(frozen=True)
class CompressedInput:
    """What a group of layers reads in the compressed model."""

    H: torch.Tensor
    """E[y y^T]: [n, n], float64, shrunk as the statistics are."""
    M: torch.Tensor
    """[n, n]: the layers' target is W M."""
    blend: float
    """In [0, 1]."""


class _SeenError(Exception):
    """What a block was run for has been seen."""


class Compensation:
    """The two flows, from the first block to the last. Blocks must be asked for in order."""

    def __init__(self, model: SourceModel, chain: BlockChain, batches: list[Batch]) -> None:
        self._module = model.module
        self._chain = chain
        self._batches = batches
        self._recorded = [chain.record(batch) for batch in batches]
        self._dense = [recorded.hidden for recorded in self._recorded]
        self._compressed = list(self._dense)
        self._index = 0
        self._copy = copy.deepcopy(chain.blocks[0])

    def input_of(self, group: tuple[Layer, ...]) -> CompressedInput:
        """Second moments of what `group` reads, with everything installed so far.

        Raises UserError where they are not finite.
        """
        self._go_to(group[0].index)
        n = group[0].n
        device = self._dense[0].device
        moment = SecondMoment(n, device)
        crossed = torch.zeros(2, n, n, dtype=torch.float64, device=device)
        sequences = 0
        with (
            _inputs(self._dense_block, group[0]) as x,
            _inputs(self._copy, group[0]) as y,
            torch.no_grad(),
        ):
            for number, batch in enumerate(self._batches):
                for block, states in ((self._dense_block, self._dense), (self._copy, self._compressed)):
                    with suppress(_SeenError):
                        self._run(number, block, states)
                keep = batch.mask.bool().reshape(-1).to(device)
                rows_x, rows_y = (rows.pop().reshape(-1, n)[keep].float() for rows in (x, y))
                half = half_of_rows(batch, sequences).to(device)
                sequences += len(batch.ids)
                moment.add(rows_y, half)
                for index in range(2):
                    crossed[index] += rows_x[half == index].T @ rows_y[half == index]
        H = moment.shrunk().matrix
        if not bool(torch.isfinite(H).all() and torch.isfinite(crossed).all()):
            raise UserError(f"What {group[0].module} reads in the compressed model is not a finite number; "
                            "raise the ratio, or pass --no-compensation.")
        eye = torch.eye(n, dtype=H.dtype, device=device)
        full = _map(moment.mean(), crossed.sum(0) / max(1, moment.tokens))
        blend = best_blend(moment, crossed)
        return CompressedInput(H, eye + blend * (full - eye), blend)

    def install(self, layer: Layer, W: torch.Tensor, stored: torch.Tensor) -> None:
        """Let the compressed flow compute with `stored`: [m, n], in the order of outputs of W, the
        layer in the base file."""
        module = self._copy.get_submodule(_within(layer))
        own = linear_weight(module, layer)
        rows = None if own is None else matching_rows(W, own)
        if own is None or rows is None:
            raise UserError(f"{layer.module} and {layer.tensor} of the base file do not hold the same rows; "
                            "pass --no-compensation.")
        fitted = torch.empty_like(own)
        fitted[rows] = stored.to(own)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        weight.data.copy_(fitted.T if stored_transposed(module, layer) else fitted)

    @property
    def _dense_block(self) -> torch.nn.Module:
        return self._chain.blocks[self._index]

    def _go_to(self, index: int) -> None:
        while self._index < index:
            with torch.no_grad():
                for number in range(len(self._batches)):
                    self._dense[number] = self._run(number, self._dense_block, self._dense)
                    self._compressed[number] = self._run(number, self._copy, self._compressed)
            self._index += 1
            self._copy = copy.deepcopy(self._dense_block)

    def _run(self, number: int, block: torch.nn.Module, states: list[torch.Tensor]) -> torch.Tensor:
        return self._chain.run(self._index, states[number], self._recorded[number], block)


def _map(H: torch.Tensor, crossed: torch.Tensor) -> torch.Tensor:
    """E[x y^T] E[y y^T]^-1 of H = E[y y^T] and crossed = E[x y^T]: [n, n], nearer I where H says little."""
    n = len(H)
    ridge = _DAMPING * H.diagonal().mean().clamp(min=1e-30) * torch.eye(n, dtype=H.dtype, device=H.device)
    M: torch.Tensor = torch.linalg.solve(H + ridge, (crossed + ridge).T).T
    return M


def best_blend(moment: SecondMoment, crossed: torch.Tensor) -> float:
    """The share of M - I, in [0, 1], with the least E|x - y - share (M - I) y|^2 where M was fitted to
    one half of the sample and the error is taken on the other.

    `moment`: of y; `crossed`: the halves' sums of x y^T, [2, n, n].
    """
    gain = curvature = 0.0
    for index in range(2):
        if not moment.count(0) or not moment.count(1):
            return 0.0
        H, other = moment.half_mean(index), moment.half_mean(1 - index)
        means = [crossed[each] / moment.count(each) for each in (index, 1 - index)]
        D = _map(H, means[0]) - torch.eye(len(H), dtype=H.dtype, device=H.device)
        gain += float((D * (means[1] - other)).sum())
        curvature += float(((D @ other) * D).sum())
    return min(1.0, max(0.0, gain / curvature)) if curvature > 0 else 0.0


def open_compensation(
    model: SourceModel, layers: LayerMap, calibration: CalibrationSet, weights: dict[str, torch.Tensor]
) -> Compensation | str:
    """The flows at the first block, or why there are none. `weights`: some block's W by tensor."""
    wanted = [layer for group in layers.groups for layer in group]
    chain = find_chain(model, wanted, calibration.batches[0])
    if chain is None:
        return "the model's blocks are no plain chain"
    for layer in wanted:
        own = linear_weight(model.module.get_submodule(layer.module), layer)
        if own is None or (layer.tensor in weights and matching_rows(weights[layer.tensor], own) is None):
            return f"{layer.module} and {layer.tensor} of the base file do not hold the same rows"
    return Compensation(model, chain, _enough(calibration.batches, max(layer.n for layer in wanted)))


def _enough(batches: list[Batch], n: int) -> list[Batch]:
    """As many of `batches`, spread evenly, as layers of up to `n` inputs need."""
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    wanted = max(_LEAST_TOKENS, _TOKENS_PER_INPUT * n)
    step = max(1, tokens // wanted)
    return batches[::step]


def matching_rows(W: torch.Tensor, own: torch.Tensor) -> torch.Tensor | None:
    """rows with own[rows] = W up to rounding, for two orders of the same rows: int64 [m], or None.

    llama.cpp's converter permutes the outputs of some layers.
    """
    W, own = W.float(), own.float()
    if torch.allclose(W, own, rtol=0.02, atol=0.02 * float(own.abs().mean())):
        return torch.arange(len(W), device=W.device)
    probe = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(0)).to(W.device)
    rows = torch.empty(len(W), dtype=torch.int64, device=W.device)
    rows[(W @ probe).argsort()] = (own @ probe).argsort()
    # rounding in the file may have swapped rows of nearly the same projection
    tolerance = 1e-3 * W.square().sum(1).mean()
    wrong = ((own[rows] - W).square().sum(1) > tolerance).nonzero()[:, 0]
    left = rows[wrong].clone()
    for start in range(0, len(wrong), _ROWS):
        part = wrong[start : start + _ROWS]
        rows[part] = left[torch.cdist(W[part], own[left]).argmin(1)]
    same = bool(((own[rows] - W).square().sum(1) <= tolerance).all())
    return rows if same and len(set(rows.tolist())) == len(rows) else None


def _within(layer: Layer) -> str:
    """The layer's module below its block."""
    return layer.module.partition(f".{layer.index}.")[2]


@contextmanager
def _inputs(block: torch.nn.Module, layer: Layer) -> Iterator[list[torch.Tensor]]:
    """What the layer's module reads, appended as it runs; the block's run ends there."""
    seen: list[torch.Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _SeenError

    handle = block.get_submodule(_within(layer)).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
