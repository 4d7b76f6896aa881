"""The factoring stage: one owner or dense layer after another, to the bytes of the file."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor

from skipcat_edge.errors import UserError

from .candidates import problem
from .compensation import Compensation, CompressedInput
from .factorize import DAMPING, Method, factorize
from .layers import Layer
from .plan import PlannedOwner
from .quantized import Rounding, quantize_factors, quantize_matrix
from .statistics import BlockStatistics
from .statistics_file import Statistics
from .writer import Layout, OutputTypes, Slot, factor_data, read_weight


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
            names = [name for name, layer in self.layers.items() if layer.index == index]
            arrays = {name: np.require(read_weight(self.tensors[name]), requirements="W") for name in names}
            self._cached = {name: torch.from_numpy(W).to(self.device) for name, W in arrays.items()}
            self._block = index
        return self._cached


@dataclass
class Compressor:
    """Gives the writer the bytes of everything that statistics say something about.

    A block is done at once, group after group as its forward pass goes, because a group's input
    depends on what the ones before it lost.
    """

    weights: Weights
    statistics: Statistics | None
    method: Method
    types: OutputTypes
    rounding: Rounding
    groups: list[tuple[Layer, ...]] = field(default_factory=list)
    compensation: Compensation | None = None
    reports: list[OwnerReport] = field(default_factory=list)
    damped: dict[str, float] = field(default_factory=dict)
    """Tensors whose H needed more damping than usual -> how much of its mean diagonal."""
    _entries: tuple[int, BlockStatistics] = field(default_factory=lambda: (-1, {}))
    _done: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _block: int = -1

    def entries(self, block: int) -> BlockStatistics:
        """One block's statistics, kept until another block's are asked for."""
        if self.statistics is not None and self._entries[0] != block:
            self._entries = block, self.statistics.block(block)
        return self._entries[1]

    @property
    def calibrated(self) -> Container[str]:
        """The tensors whose inputs have statistics."""
        return () if self.statistics is None else self.weights.layers

    def compress(self, layout: Layout) -> Callable[[PlannedOwner | Slot], list[np.ndarray] | None]:
        """What `write_file` asks for an item's bytes; None: it is rounded plainly."""
        owners = [item for item in layout.order if isinstance(item, PlannedOwner)]
        owner_of = {layer.tensor: owner for owner in owners for layer in owner.members}
        slots = {item.name: item for item in layout.order if isinstance(item, Slot)}

        def ask(item: PlannedOwner | Slot) -> list[np.ndarray] | None:
            name = item.members[0].tensor if isinstance(item, PlannedOwner) else item.name
            layer = self.weights.layers.get(name)
            if layer is None:
                return None
            if layer.index != self._block:
                self._block, self._done = layer.index, {}
                for group in (group for group in self.groups if group[0].index == layer.index):
                    self._compress_group(group, owner_of, slots)
            return self._done.pop(name, None)

        return ask

    def _compress_group(
        self, group: tuple[Layer, ...], owner_of: Mapping[str, PlannedOwner], slots: Mapping[str, Slot]
    ) -> None:
        compressed = None if self.compensation is None else self.compensation.input_of(group)
        for layer in group:
            owner = owner_of.get(layer.tensor)
            if owner is None:
                self._dense(layer, slots[layer.tensor], compressed)
            elif owner.members[0] == layer:
                self._owner(owner, compressed)

    def _owner(self, owner: PlannedOwner, compressed: CompressedInput | None) -> None:
        first = owner.members[0]
        W = self.weights.block(first.index)
        own = problem(owner.members, W, self.entries(first.index), self.method, compressed)
        if own.damping > DAMPING:
            self.damped[first.tensor] = own.damping
        try:
            factors = factorize(own.W, own.decomposition(), owner.rank, owner.skip)
            quantized = quantize_factors(factors, own.W, own.H, owner.outputs, self.types.linear,
                                         self.rounding)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{first.tensor} cannot be factored: {error}; "
                            "use more calibration tokens or a lower ratio.") from None
        self.reports.append(OwnerReport(owner, factors.error, float(factors.T.abs().max())))
        self._done[first.tensor] = factor_data(quantized)
        if self.compensation is not None:
            for layer, stored in zip(owner.members, quantized.multiplied_out(), strict=True):
                self.compensation.install(layer, W[layer.tensor], stored)

    def _dense(self, layer: Layer, slot: Slot, compressed: CompressedInput | None) -> None:
        if self.statistics is None:
            return
        W = self.weights.block(layer.index)[layer.tensor]
        base_type = self.weights.tensors[layer.tensor].tensor_type
        if compressed is None and slot.type == base_type:
            return
        H = self.entries(layer.index)[layer.tensor].input.H if compressed is None else compressed.H
        target = W if compressed is None else (W.double() @ compressed.M.to(W.device)).float()
        matrix = quantize_matrix(target, H.to(W.device), slot.type, self.rounding)
        assert matrix.type == slot.type, (slot.name, matrix.type, slot.type)
        self._done[layer.tensor] = [matrix.data]
        if self.compensation is not None:
            self.compensation.install(layer, W, matrix.dequantized())
