"""The factoring stage: one owner or dense layer after another, to the bytes of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor

from skipcat_edge.errors import UserError

from .candidates import Problem, problem
from .factorize import DAMPING, Method, factorize
from .layers import Layer
from .plan import PlannedOwner
from .quantized import Rounding, quantize_factors, quantize_matrix
from .statistics import BlockStatistics
from .statistics_file import Statistics
from .writer import OutputTypes, Slot, factor_data, read_weight


@dataclass(frozen=True)
class OwnerReport:
    """How one owner came out."""

    owner: PlannedOwner
    error: float
    """Predicted share of the loss of leaving it out, before quantisation."""
    largest_t: float
    """Largest |T_ij|."""


@dataclass
class Weights:
    """The linear layers of a base file as W: [m, n], float32, one block in memory at a time."""

    tensors: Mapping[str, ReaderTensor]
    layers: Mapping[str, Layer]
    device: str = "cpu"
    _block: int = -1
    _cached: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, reader: GGUFReader, groups: list[tuple[Layer, ...]], device: str) -> Weights:
        layers = {layer.tensor: layer for group in groups for layer in group}
        return cls({tensor.name: tensor for tensor in reader.tensors}, layers, device)

    def block(self, index: int) -> dict[str, torch.Tensor]:
        """All of one block, by tensor name. Raises UserError where one is not finite."""
        if self._block != index:
            self._cached = {
                name: torch.from_numpy(np.require(read_weight(self.tensors[name]), requirements="W")).to(self.device)
                for name, layer in self.layers.items() if layer.index == index
            }
            self._block = index
        return self._cached


@dataclass
class Compressor:
    """Gives the writer the bytes of everything that statistics say something about."""

    weights: Weights
    statistics: Statistics | None
    method: Method
    types: OutputTypes
    rounding: Rounding
    reports: list[OwnerReport] = field(default_factory=list)
    damped: dict[str, float] = field(default_factory=dict)
    """Tensors whose H needed more damping than usual -> how much of its mean diagonal."""
    _block: int = -1
    _entries: BlockStatistics = field(default_factory=dict)

    def __call__(self, item: PlannedOwner | Slot) -> list[np.ndarray] | None:
        """Bytes of an owner's tensors or of one dense layer; None for what is rounded plainly."""
        if isinstance(item, PlannedOwner):
            return self._owner(item)
        layer = self.weights.layers.get(item.name)
        if layer is None or self.statistics is None or item.type == self.weights.tensors[item.name].tensor_type:
            return None
        H = self.entries(layer.index)[layer.tensor].input.H
        W = self.weights.block(layer.index)[layer.tensor]
        matrix = quantize_matrix(W, H.to(W.device), item.type, self.rounding.feedback)
        assert matrix.type == item.type, (item.name, matrix.type, item.type)
        return [matrix.data]

    def entries(self, block: int) -> BlockStatistics:
        """One block's statistics, kept until another block's are asked for."""
        if self.statistics is not None and self._block != block:
            self._entries = self.statistics.block(block)
            self._block = block
        return self._entries

    def _owner(self, owner: PlannedOwner) -> list[np.ndarray]:
        first = owner.members[0]
        own = problem(owner.members, self.weights.block(first.index), self.entries(first.index), self.method)
        self._note_damping(own, first)
        try:
            factors = factorize(own.W, own.decomposition(), owner.rank, owner.skip)
            # without whitening nothing of the statistics enters: the baseline of plain SVD
            H = own.H if self.method.whiten else None
            quantized = quantize_factors(factors, own.W, H, owner.outputs, self.types.linear, self.rounding)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{first.tensor} cannot be factored: {error}; "
                            "use more calibration tokens or a lower ratio.") from None
        self.reports.append(OwnerReport(owner, factors.error, float(factors.T.abs().max())))
        return factor_data(quantized)

    def _note_damping(self, own: Problem, first: Layer) -> None:
        if own.damping > DAMPING:
            self.damped[first.tensor] = own.damping

