"""Error compensation: later layers answer for what earlier ones lost.

A layer is fitted to the inputs y that it will have in the compressed model, and to outputs blended
between W x, x being its input in the dense model, and W y: its target is W M y with
M = (1 - blend) I + blend E[x y^T] E[y y^T]^-1 (the closed form of SAES-SVD and MPIFA). The blend is
the one that predicts x best on the half of the text that M was not fitted to, so that a short text
does no harm. Two copies of a block run side by side, one dense, the other with what was stored so far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from skipcat_edge.errors import UserError

from .block_chain import BlockChain, find_chain
from .calibration import Batch, CalibrationSet, half_of_rows
from .job import Job
from .layers import Layer, LayerMap, linear_weight, stored_transposed
from .second_moments import SecondMoment
from .source_model import SourceModel
from .states import open_states
from .sums import HalfSums, SpilledMatrix, slices
from .symmetric import divided_

# Of E[y y^T]'s mean diagonal: where little is known M stays near I.
_DAMPING = 1e-4

# Moments of a few numbers per token need no more than this; every group costs two runs of its block.
_TOKENS_PER_INPUT = 16
_LEAST_TOKENS = 16_384
# Layers with more inputs are judged by some of M's rows, in runs: all would take most of a conversion's time.
_JUDGED_WHOLE, _JUDGED, _APART = 4096, 64, 512
# Rows that are compared with all others at a time.
_ROWS = 512


@dataclass(frozen=True)
class CompressedInput:
    """What a group of layers reads in the compressed model."""

    H: torch.Tensor
    """E[y y^T]: [n, n], float64, shrunk as the statistics are."""
    target: torch.Tensor | SpilledMatrix
    blend: float
    """In [0, 1]."""

    @property
    def M(self) -> torch.Tensor:  # noqa: N802
        """[n, n]: the layers' target is W M. Read anew each time where it is on the disk."""
        return self.target if isinstance(self.target, torch.Tensor) else self.target.read()


class _SeenError(Exception):
    """What a block was run for has been seen."""


class Compensation:
    """The two flows, from the first block to the last. Blocks must be asked for in order."""

    def __init__(
        self, model: SourceModel, chain: BlockChain, batches: list[Batch], job: Job | None = None,
        name: str = "flow", start: int = 0, spilled_from: float = math.inf,
    ) -> None:
        """With a `job`, what enters a block is kept in it under names that begin with `name`, and the flows
        begin at block `start`, to which an earlier run's `go_to` brought them. Matrices of layers with
        `spilled_from` inputs or more lie in the job while they are not worked on."""
        self._job = job
        self._spilled_from = spilled_from
        self._module = model.module
        self._chain = chain
        self._batches = batches
        self._name = name
        self._states, self._recorded = open_states(chain, batches, job, self._dense(0))
        self._index = start
        self._copy = self._copied()

    def input_of(self, group: tuple[Layer, ...]) -> CompressedInput:
        """Second moments of what `group` reads, with everything installed so far.

        Raises UserError where they are not finite.
        """
        self.go_to(group[0].index)
        n = group[0].n
        device = self._chain.model.device
        moment, crossed = SecondMoment(n, device), HalfSums(n, device)

        def see_own(_: torch.Tensor, y: torch.Tensor, half: torch.Tensor) -> None:
            moment.add(y, half)

        def see_crossed(x: torch.Tensor, y: torch.Tensor, half: torch.Tensor) -> None:
            for index in range(2):
                crossed.add(index, x[half == index].T @ y[half == index])

        spilled = None if self._job is None or n < self._spilled_from else self._job.folder
        if spilled is None:
            self._see(group, [see_own, see_crossed])
        else:
            # one at a time: the four sums of a wide layer may not fit together
            for sums, see in ((moment.sums, see_own), (crossed, see_crossed)):
                self._see(group, [see])
                sums.spill(spilled, f"{self._name}-{see.__name__}")
        self._chain.model.release()
        H = moment.shrunk().matrix
        if not bool(torch.isfinite(H).all()) or not crossed.finite():
            raise UserError(f"What {group[0].module} reads in the compressed model is not a finite number; "
                            "raise the ratio, or pass --no-compensation.")
        if spilled is not None:
            stored_h = SpilledMatrix.of(H, spilled / f"{self._name}-h.f64")
            del H
        blend = best_blend(moment, crossed)
        M = _map(moment.mean(), crossed.both(max(1, moment.tokens)), [slice(0, n)])
        # I + blend (M - I)
        M.mul_(blend).diagonal().add_(1 - blend)
        if spilled is None:
            return CompressedInput(H, M, blend)
        target = SpilledMatrix.of(M, spilled / f"{self._name}-map.f64")
        del M
        return CompressedInput(stored_h.read(), target, blend)

    def _see(
        self, group: tuple[Layer, ...],
        takers: Sequence[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]],
    ) -> None:
        """Run both flows up to `group`; what it reads there, x and y: [tokens, n], goes to `takers`, with the
        half of the text of each token."""
        n = group[0].n
        sequences = 0
        with (
            _inputs(self._dense_block, group[0]) as x,
            _inputs(self._copy, group[0]) as y,
            torch.no_grad(),
        ):
            for number, batch in enumerate(self._batches):
                for block, states in ((self._dense_block, self._dense), (self._copy, self._compressed)):
                    with suppress(_SeenError):
                        self._run(number, block, states(self._index))
                rows_x, rows_y = (rows.pop().reshape(-1, n) for rows in (x, y))
                keep = batch.mask.bool().reshape(-1).to(rows_x.device)
                half = half_of_rows(batch, sequences).to(rows_x.device)
                sequences += len(batch.ids)
                for take in takers:
                    take(rows_x[keep].float(), rows_y[keep].float(), half)

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

    def go_to(self, index: int) -> None:
        """Bring both flows to block `index`, with everything installed so far."""
        while self._index < index:
            for block, states in ((self._dense_block, self._dense), (self._copy, self._compressed)):
                with torch.no_grad(), self._states.writing(states(self._index + 1)) as put:
                    for number in range(len(self._batches)):
                        put(self._run(number, block, states(self._index)))
            self._index += 1
            self._copy = self._copied()

    def _copied(self) -> torch.nn.Module:
        self._chain.model.bring(self._dense_block)
        return copy.deepcopy(self._dense_block)

    def drop_before(self, index: int) -> None:
        """What entered the blocks before `index` is not needed any more."""
        for earlier in range(index):
            self._states.drop(self._dense(earlier))
            self._states.drop(self._compressed(earlier))

    def _dense(self, index: int) -> str:
        """What enters block `index` in the dense flow."""
        return f"{self._name}-dense-{index}"

    def _compressed(self, index: int) -> str:
        # nothing is lost before the first block
        return f"{self._name}-compressed-{index}" if index else self._dense(0)

    def _run(self, number: int, block: torch.nn.Module, states: str) -> torch.Tensor:
        return self._chain.run(self._index, self._states.read(states, number), self._recorded[number], block)


def _map(H: torch.Tensor, crossed: torch.Tensor, parts: Sequence[slice]) -> torch.Tensor:
    """E[x y^T] E[y y^T]^-1 of H = E[y y^T] and crossed = E[x y^T], nearer I where H says little, in place of
    `crossed`: [k, n], which holds the rows `parts`; H: [n, n] is lost."""
    ridge = _DAMPING * float(H.diagonal().mean().clamp(min=1e-30))
    H.diagonal().add_(ridge)
    for part, rows in _by_part(crossed, parts):
        rows.diagonal(part.start).add_(ridge)
    return divided_(crossed, H)


def _by_part(rows: torch.Tensor, parts: Sequence[slice]) -> Iterator[tuple[slice, torch.Tensor]]:
    return zip(parts, torch.split(rows, [part.stop - part.start for part in parts]), strict=True)


def _judged(n: int) -> list[slice]:
    """The rows of M: [n, n] that say how far to trust it."""
    if n <= _JUDGED_WHOLE:
        return [*slices(n)]
    return [slice(start, min(start + _JUDGED, n)) for start in range(0, n, _APART)]


def best_blend(moment: SecondMoment, crossed: HalfSums) -> float:
    """The share of M - I, in [0, 1], with the least E|x - y - share (M - I) y|^2 where M was fitted to
    one half of the sample and the error is taken on the other.

    `moment`: of y; `crossed`: the halves' sums of x y^T.
    """
    gain = curvature = 0.0
    parts = _judged(crossed.n)
    if not moment.count(0) or not moment.count(1):
        return 0.0
    for index in range(2):
        D = torch.cat([crossed.rows(index, part) for part in parts]).div_(moment.count(index))
        D = _map(moment.half_mean(index), D, parts)
        other = moment.half_mean(1 - index)
        for part, rows in _by_part(D, parts):
            rows.diagonal(part.start).sub_(1)
            held_out = crossed.rows(1 - index, part) / moment.count(1 - index)
            gain += float((rows * (held_out - other[part])).sum())
            curvature += float(((rows @ other) * rows).sum())
        del D, other
    return min(1.0, max(0.0, gain / curvature)) if curvature > 0 else 0.0


def open_compensation(
    model: SourceModel, layers: LayerMap, calibration: CalibrationSet, weights: Mapping[str, torch.Tensor],
    job: Job | None = None, name: str = "flow", start: int = 0, spilled_from: float = math.inf,
) -> Compensation | str:
    """The flows at block `start`, or why there are none. `weights`: some block's W by tensor; `job` and what
    follows as Compensation takes it."""
    wanted = layers.members
    chain = find_chain(model, wanted, calibration.batches[0])
    if chain is None:
        return "the model's blocks are no plain chain"
    for layer in wanted:
        module = model.module.get_submodule(layer.module)
        if layer.tensor in weights:
            model.bring(module)
        own = linear_weight(module, layer)
        if own is None or (layer.tensor in weights and matching_rows(weights[layer.tensor], own) is None):
            return f"{layer.module} and {layer.tensor} of the base file do not hold the same rows"
    batches = _enough(calibration.batches, max(layer.n for layer in wanted))
    return Compensation(model, chain, batches, job, name, start, spilled_from)


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
    W, own = W.float().to(own.device), own.float()
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
