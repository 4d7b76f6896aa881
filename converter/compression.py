"""The factoring stage: one owner or dense layer after another, to the bytes of the file."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor

from skipcat_edge import format as fmt
from skipcat_edge.errors import UserError

from .candidates import problem
from .collector import BlockStatistics, in_memory
from .compensation import Compensation, CompressedInput
from .executor import Executor
from .factorize import DAMPING, Method
from .job import Job
from .job_blocks import StoredBlock, has_stored, keep_stored, read_stored
from .layers import Layer
from .plan import PlannedOwner
from .quantized import Rounding, quantize_matrix
from .stages import FittedStage, LevelWeights, corrections, fit_stage, mixed_input, stages_below
from .statistics_file import Statistics
from .writer import Layout, OutputTypes, Slot, factor_data, read_weight

_Corrections = tuple[tuple[int, int], ...]
"""The levels that use some factors, each with how many it adds to them."""
_Mixed = Callable[[_Corrections], CompressedInput | None]
"""What such factors are fitted to; None without compensation."""


@dataclass(frozen=True)
class OwnerReport:
    """How one owner came out."""

    owner: PlannedOwner
    error: float
    """Predicted share of the loss of leaving it out, before quantisation."""
    largest_t: float
    """Largest |T_ij|."""


@dataclass(frozen=True)
class Weights:
    """The linear layers of a base file as W: [m, n], float32, read from it each time."""

    tensors: Mapping[str, ReaderTensor]
    layers: Mapping[str, Layer]
    device: str = "cpu"

    @classmethod
    def of(cls, reader: GGUFReader, groups: list[tuple[Layer, ...]], device: str) -> Weights:
        layers = {layer.tensor: layer for group in groups for layer in group}
        return cls({tensor.name: tensor for tensor in reader.tensors}, layers, device)

    def only(self, index: int) -> Weights:
        """Those of one block, as the base file stores them."""
        layers = {name: layer for name, layer in self.layers.items() if layer.index == index}
        return Weights({name: self.tensors[name] for name in layers}, layers, self.device)

    def block(self, index: int) -> Mapping[str, torch.Tensor]:
        """All of one block, by tensor name; one that is not finite raises UserError when it is read."""
        return _BlockWeights(self.only(index))


@dataclass(frozen=True)
class _BlockWeights(Mapping[str, torch.Tensor]):
    weights: Weights

    def __getitem__(self, name: str) -> torch.Tensor:
        W = np.require(read_weight(self.weights.tensors[name]), requirements="W")
        return torch.from_numpy(W).to(self.weights.device)

    # the one of Mapping would read the tensor
    def __contains__(self, name: object) -> bool:
        return name in self.weights.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.layers)

    def __len__(self) -> int:
        return len(self.weights.layers)


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
    level_weights: LevelWeights = field(default_factory=LevelWeights)
    compensation: Sequence[Compensation] = ()
    """The flows of each level; none without compensation."""
    job: Job | None = None
    """Where finished blocks are kept and found."""
    executor: Executor | None = None
    """Where blocks are factored if no compensation makes them depend on each other; None: here."""
    reports: list[OwnerReport] = field(default_factory=list)
    damped: dict[str, float] = field(default_factory=dict)
    """Tensors whose H needed more damping than usual -> how much of its mean diagonal."""
    _entries: tuple[int, BlockStatistics] = field(default_factory=lambda: (-1, {}))
    _done: StoredBlock = field(default_factory=StoredBlock)
    _block: int = -1
    _ahead: Iterator[StoredBlock] = field(default_factory=lambda: iter(()))

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
        owners: dict[str, list[PlannedOwner]] = {}
        for owner in (item for item in layout.order if isinstance(item, PlannedOwner)):
            for layer in owner.members:
                owners.setdefault(layer.tensor, []).append(owner)
        slots = {item.name: item for item in layout.order if isinstance(item, Slot)}
        found = [self._layer_of(item) for item in layout.order]
        blocks = dict.fromkeys(layer.index for layer in found if layer is not None)
        self._ahead = self._factor_elsewhere([*blocks], owners, slots)

        def ask(item: PlannedOwner | Slot) -> list[np.ndarray] | None:
            layer = self._layer_of(item)
            if layer is None:
                return None
            if layer.index != self._block:
                self._block = layer.index
                self._to_block(owners, slots)
            return self._done.data.pop(_key(item), None)

        return ask

    def _layer_of(self, item: PlannedOwner | Slot) -> Layer | None:
        """The layer, or the first one, that the item stores."""
        name = item.members[0].tensor if isinstance(item, PlannedOwner) else item.name
        return self.weights.layers.get(name)

    @property
    def blocks(self) -> list[int]:
        """Those that hold groups, ascending."""
        return sorted({group[0].index for group in self.groups})

    @property
    def first_open(self) -> int | None:
        """The first block that no earlier run finished; None where there is none."""
        return next((block for block in self.blocks if not has_stored(self.job, block)), None)

    def _to_block(self, owners: Mapping[str, list[PlannedOwner]], slots: Mapping[str, Slot]) -> None:
        """Everything of the block at hand."""
        if self.job is not None and has_stored(self.job, self._block):
            self._done = read_stored(self.job, self._block)
        else:
            self._done = next(self._ahead, None) or self.factor(self._block, owners, slots)
            if self.job is not None:
                self._keep_block(self.job)
        known = {_key(owner): owner for each in owners.values() for owner in each}
        self.reports += [OwnerReport(known[key], *found) for key, found in self._done.errors.items()]
        self.damped |= self._done.damped

    def factor(
        self, block: int, owners: Mapping[str, list[PlannedOwner]], slots: Mapping[str, Slot]
    ) -> StoredBlock:
        """All groups of one block; owners and dense tensors by their layers' names."""
        self._done = StoredBlock()
        for group in (group for group in self.groups if group[0].index == block):
            self._compress_group(group, owners, slots)
        return self._done

    def _factor_elsewhere(
        self, blocks: Sequence[int], owners: Mapping[str, list[PlannedOwner]], slots: Mapping[str, Slot]
    ) -> Iterator[StoredBlock]:
        """Those of `blocks` that are not done yet, where they do not depend on each other."""
        # without a job, a block that the file holds in two places is asked for twice
        if self.executor is None or self.compensation or self.job is None:
            return iter(())
        missing = [block for block in blocks if not has_stored(self.job, block)]
        return self.executor.map(_factor_block, (self._task(block, owners, slots) for block in missing))

    def _task(
        self, block: int, owners: Mapping[str, list[PlannedOwner]], slots: Mapping[str, Slot]
    ) -> _BlockTask:
        """All that one block's factors depend on, and nothing of the others."""
        weights = self.weights.only(block)
        groups = [group for group in self.groups if group[0].index == block]
        alone = Compressor(weights, self.statistics, self.method, self.types, self.rounding, groups,
                           self.level_weights, _entries=(block, in_memory(self.entries(block))))
        return _BlockTask(
            alone, block, {name: owners[name] for name in weights.layers if name in owners},
            {name: slots[name] for name in weights.layers if name in slots})

    def _keep_block(self, job: Job) -> None:
        """The block counts as finished once what enters the next one is kept too."""
        after = next((block for block in self.blocks if block > self._block), None)
        if after is not None:
            for flow in self.compensation:
                flow.go_to(after)
        keep_stored(job, self._block, self._done)
        for flow in self.compensation:
            flow.drop_before(self._block + 1 if after is None else after)

    def _compress_group(
        self, group: tuple[Layer, ...], owners: Mapping[str, list[PlannedOwner]], slots: Mapping[str, Slot]
    ) -> None:
        inputs = [flow.input_of(group) for flow in self.compensation]

        @cache  # members of a group are often fitted to the same levels
        def mixed(added_to: _Corrections) -> CompressedInput | None:
            if not inputs:
                return None
            weights = self.level_weights.of(dict(added_to))
            return mixed_input({level: inputs[level] for level in weights}, weights)

        stored: dict[str, list[tuple[range, torch.Tensor]]] = {layer.tensor: [] for layer in group}
        for layer in group:
            own = owners.get(layer.tensor, [])
            if own and own[0].members[0] == layer:
                self._owners(own, mixed, stored)
            if layer.tensor in slots:
                factored = {level for owner in own for level in self._levels(owner)}
                first = min(level for level in self._levels(None) if level not in factored)
                levels = range(first, self.level_weights.levels)
                self._dense(layer, slots[layer.tensor], mixed, levels, stored)
        W = self.weights.block(group[0].index)
        for level, flow in enumerate(self.compensation):
            for layer in group:
                parts = [part for levels, part in stored[layer.tensor] if level in levels]
                if parts:
                    flow.install(layer, W[layer.tensor], torch.stack(parts).sum(0))

    def _levels(self, owner: PlannedOwner | None) -> range:
        first, last = (owner and owner.levels) or (0, self.level_weights.levels - 1)
        return range(first, last + 1)

    def _owners(
        self, owners: Sequence[PlannedOwner], mixed: _Mixed,
        stored: Mapping[str, list[tuple[range, torch.Tensor]]],
    ) -> None:
        """All factors of the same layers, those of lower levels first."""
        first = owners[0].members[0]
        W = self.weights.block(first.index)
        fitted: dict[PlannedOwner, FittedStage] = {}
        for owner in sorted(owners, key=lambda owner: owner.levels or (0, 0)):
            added_to = corrections(owner, owners, self._levels(owner))
            whole = problem(owner.members, W, self.entries(first.index), self.method,
                            mixed(tuple(added_to.items())))
            if whole.damping > DAMPING:
                self._done.damped[first.tensor] = whole.damping
            try:
                stage = fit_stage(owner, whole, [fitted[each] for each in stages_below(owner, owners)],
                                  self.types.of(owner), self.rounding, last=not any(added_to.values()))
            except (ValueError, RuntimeError) as error:
                raise UserError(f"{first.tensor} cannot be factored: {error}; "
                                "use more calibration tokens or a lower ratio.") from None
            fitted[owner] = stage
            self._done.errors[_key(owner)] = stage.error, stage.largest_t
            self._done.data[_key(owner)] = factor_data(stage.quantized)
            parts = torch.split(stage.taken_w, list(owner.outputs))
            for layer, part in zip(owner.members, parts, strict=True):
                stored[layer.tensor].append((self._levels(owner), part))

    def _dense(
        self, layer: Layer, slot: Slot, mixed: _Mixed, levels: range,
        stored: Mapping[str, list[tuple[range, torch.Tensor]]],
    ) -> None:
        if self.statistics is None:
            return
        W = self.weights.block(layer.index)[layer.tensor]
        base_type = self.weights.tensors[layer.tensor].tensor_type
        compressed = mixed(tuple((level, 0) for level in levels))
        if compressed is None and slot.type == base_type:
            return
        H = self.entries(layer.index)[layer.tensor].input.H if compressed is None else compressed.H
        target = W if compressed is None else (W.double() @ compressed.M.to(W.device)).float()
        matrix = quantize_matrix(target, H.to(W.device), slot.type, self.rounding)
        assert matrix.type == slot.type, (slot.name, matrix.type, slot.type)
        self._done.data[layer.tensor] = [matrix.data]
        stored[layer.tensor].append((levels, matrix.dequantized()))


@dataclass(frozen=True)
class _BlockTask:
    compressor: Compressor
    block: int
    owners: Mapping[str, list[PlannedOwner]]
    slots: Mapping[str, Slot]


def _factor_block(task: _BlockTask) -> StoredBlock:
    return task.compressor.factor(task.block, task.owners, task.slots)


def _key(item: PlannedOwner | Slot) -> str:
    """Of an item's bytes."""
    return fmt.lr_a_name(item.block, item.name, item.levels) if isinstance(item, PlannedOwner) else item.name
