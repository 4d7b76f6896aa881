"""Two-sided statistics of linear layers, one block at a time.

H = E[x x^T] of a layer's input and G = E[g g^T] of the gradient of the model's loss with respect
to its output. The hidden states before every block are kept from a forward pass; then each block,
from the last to the first, is run once more forwards and backwards, so that only one block's
matrices and activations are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from skipcat_edge.errors import UserError

from .block_chain import BlockChain, Recorded, find_chain, run_body, run_whole
from .calibration import Batch, CalibrationSet, half_of_rows
from .layers import Layer, LayerMap, linear_weight
from .losses import loss_of
from .second_moments import SecondMoment
from .source_model import SourceModel

# A forward pass with the head holds this many rows of logits, and their gradients, at a time.
_HEAD_TOKENS = 512


@dataclass(frozen=True)
class InputStatistics:
    """H = E[x x^T] of one input: [n, n], float64, symmetric."""

    H: torch.Tensor
    tokens: int
    shrinkage: float
    """How far H was moved towards its diagonal, in [0, 1]."""


@dataclass(frozen=True)
class OutputStatistics:
    """What G says about a layer W: [m, n], in the only form that the factors need.

    The outputs' order in the file may differ from the module's (llama.cpp's converter permutes
    some), and W^T G W does not depend on it.
    """

    C: torch.Tensor
    """[min(m, n), n], with C^T C = W^T G W."""
    mean_weight: float
    """Mean of G's diagonal."""
    shrinkage: float
    """How far G was moved towards its diagonal, in [0, 1]."""


@dataclass(frozen=True)
class LayerStatistics:
    """Both sides of one layer; `output` is None where no gradient was taken."""

    input: InputStatistics
    output: OutputStatistics | None


BlockStatistics = dict[str, LayerStatistics]
"""By tensor name; layers that read the same input share one InputStatistics."""


def block_statistics(
    model: SourceModel,
    layers: LayerMap,
    calibration: CalibrationSet,
    advance: Callable[[], None] = lambda: None,
    gradients: bool = True,
    seed: int = 0,
) -> Iterator[tuple[int, BlockStatistics]]:
    """Yield (block index, its statistics) for every block with layers to factor, the last one first.

    `advance` is called after each batch of each block, on the way forwards and on the way back.
    Raises UserError, naming the layer, where an activation or a gradient is not finite.
    """
    by_block: dict[int, list[Layer]] = {}
    for group in layers.groups:
        by_block.setdefault(group[0].index, []).extend(group)
    wanted = [layer for group in layers.groups for layer in group]
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    chain = find_chain(model, wanted, calibration.batches[0])
    generator = torch.Generator().manual_seed(seed)
    if chain is None:
        yield from _all_at_once(model, by_block, calibration, advance, gradients, generator)
        return
    recorded = [chain.record(batch) for batch in calibration.batches]
    last = len(chain.blocks) if gradients else max(by_block) + 1
    states = [[item.hidden] for item in recorded]
    with torch.no_grad():
        for index in range(last):
            for batch, batch_states, item in zip(calibration.batches, states, recorded, strict=True):
                batch_states.append(chain.run(index, batch_states[-1], item))
                if not bool(torch.isfinite(batch_states[-1]).all()):
                    _blame(chain, index, by_block, batch, batch_states, item)
                advance()
    upstream: list[torch.Tensor | None] = [None] * len(recorded)
    if gradients:
        upstream = [
            _head_gradient(chain, batch, batch_states[-1], generator)
            for batch, batch_states in zip(calibration.batches, states, strict=True)
        ]
    for index in reversed(range(last)):
        collector = _Collector(model.module, by_block.get(index, []), gradients)
        with collector.hooked():
            for number, batch in enumerate(calibration.batches):
                states[number].pop()
                collector.start(batch)
                hidden = states[number][-1].detach().requires_grad_(gradients)
                with torch.set_grad_enabled(gradients):
                    output = chain.run(index, hidden, recorded[number])
                if gradients:
                    (upstream[number],) = torch.autograd.grad(output, hidden, upstream[number])
                advance()
        if index in by_block:
            yield index, collector.finish()


def _blame(
    chain: BlockChain, index: int, by_block: dict[int, list[Layer]], batch: Batch,
    states: list[torch.Tensor], recorded: Recorded,
) -> NoReturn:
    """Raise UserError, naming the layer whose input is the first that is not finite."""
    collector = _Collector(chain.model.module, by_block.get(index, []), gradients=False)
    with collector.hooked():
        collector.start(batch)
        chain.run(index, states[-2], recorded)
    collector.finish()
    raise UserError(f"Block {index} of {chain.model.name} gives numbers that are not finite; "
                    "check the model's weights.")


def _head_gradient(
    chain: BlockChain, batch: Batch, hidden: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Gradient of the loss with respect to the last block's output: as `hidden`."""
    rows = max(1, _HEAD_TOKENS // hidden.shape[1])
    parts = []
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        some = Batch(batch.ids[part], batch.mask[part])
        leaf = hidden[part].detach().requires_grad_()
        output = chain.output_of(some, leaf, lambda small: run_whole(chain.model, small))
        parts.append(torch.autograd.grad(loss_of(chain.model, some, output, generator), leaf)[0])
    return torch.cat(parts)


def _all_at_once(
    model: SourceModel,
    by_block: dict[int, list[Layer]],
    calibration: CalibrationSet,
    advance: Callable[[], None],
    gradients: bool,
    generator: torch.Generator,
) -> Iterator[tuple[int, BlockStatistics]]:
    """For models whose blocks are no plain chain: whole passes, the matrices of all blocks in memory."""
    collectors = {index: _Collector(model.module, layers, gradients) for index, layers in by_block.items()}
    n_blocks = max(collectors) + 1

    def as_leaf(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
        output.requires_grad_(gradients)

    with ExitStack() as stack:
        embeddings = model.module.get_input_embeddings()  # type: ignore[operator]
        stack.callback(embeddings.register_forward_hook(as_leaf).remove)
        for collector in collectors.values():
            stack.enter_context(collector.hooked())
        for batch in calibration.batches:
            for collector in collectors.values():
                collector.start(batch)
            with torch.set_grad_enabled(gradients):
                output = (run_whole if gradients else run_body)(model, batch)
                if not bool(torch.isfinite(output[0]).all()):
                    for index in sorted(collectors):
                        collectors[index].finish()
                    raise UserError(f"{model.name} gives numbers that are not finite; check its weights.")
                if gradients:
                    torch.autograd.backward(loss_of(model, batch, output, generator))
            for _ in range(2 * n_blocks):
                advance()
    for index in sorted(collectors, reverse=True):
        yield index, collectors.pop(index).finish()


class _Collector:
    """Accumulates H of the inputs of some layers, once per distinct input, and G of their outputs."""

    def __init__(self, module: torch.nn.Module, layers: list[Layer], gradients: bool) -> None:
        self._modules = {layer.tensor: module.get_submodule(layer.module) for layer in layers}
        self._layers = {layer.tensor: layer for layer in layers}
        self._inputs: list[_Input] = []
        self._outputs: dict[str, _Output] = {}
        if gradients:
            for layer in layers:
                W = linear_weight(self._modules[layer.tensor], layer)
                if W is not None:
                    self._outputs[layer.tensor] = _Output(W)
        self._mask: torch.Tensor | None = None
        self._half: torch.Tensor | None = None
        self._sequences = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for tensor, module in self._modules.items():
                stack.callback(module.register_forward_pre_hook(self._input_hook(tensor)).remove)
                if tensor in self._outputs:
                    stack.callback(module.register_forward_hook(self._output_hook(tensor)).remove)
            yield

    def start(self, batch: Batch) -> None:
        """Begin a batch: inputs of the one before are no longer the same input."""
        self._mask = batch.mask
        self._half = half_of_rows(batch, self._sequences)
        self._sequences += len(batch.ids)
        for total in self._inputs:
            total.seen = None

    def _input_hook(self, tensor: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self._add_input(tensor, args[0].detach())

        return hook

    def _output_hook(self, tensor: str) -> Callable[[torch.nn.Module, Any, torch.Tensor], None]:
        def hook(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                take = self._outputs[tensor].add
                output.register_hook(lambda gradient: take(*self._real_rows(gradient)))  # type: ignore[no-untyped-call]

        return hook

    def _real_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: [..., n] as rows without those of padding, and the half that each belongs to."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if self._mask is None or self._half is None or len(rows) != self._mask.numel():
            return rows, None
        return rows[self._mask.reshape(-1).bool().to(rows.device)], self._half.to(rows.device)

    def _add_input(self, tensor: str, x: torch.Tensor) -> None:
        own = next((total for total in self._inputs if tensor in total.readers), None)
        if own is None:
            own = next((total for total in self._inputs if total.is_input(x)), None)
            if own is None:
                own = _Input(SecondMoment(x.shape[-1], x.device))
                self._inputs.append(own)
            own.readers.add(tensor)
        if own.seen is None:
            own.seen = x
            own.moment.add(*self._real_rows(x))
        elif not own.is_input(x):
            raise UserError(
                f"{self._layers[tensor].module} does not always read the same input as its group; "
                "this model cannot be calibrated."
            )

    def finish(self) -> BlockStatistics:
        statistics: BlockStatistics = {}
        for total in self._inputs:
            shrunk = total.moment.shrunk()
            self._require_finite(shrunk.matrix, sorted(total.readers)[0], "An activation entering")
            shared = InputStatistics(shrunk.matrix, shrunk.tokens, shrunk.amount)
            for tensor in total.readers:
                output = self._outputs.get(tensor)
                found = None if output is None or not output.moment.tokens else output.finish()
                if found is not None:
                    self._require_finite(found.C, tensor, "A gradient reaching")
                statistics[tensor] = LayerStatistics(shared, found)
        missing = sorted(self._layers.keys() - statistics.keys())
        if missing:
            name = self._layers[missing[0]].module
            raise UserError(f"{name} was not run by the calibration text; use another text.")
        return statistics

    def _require_finite(self, matrix: torch.Tensor, tensor: str, what: str) -> None:
        if not bool(torch.isfinite(matrix).all()):
            raise UserError(
                f"{what} {self._layers[tensor].module} ({tensor}) is not a finite number; "
                "check the model's weights and the calibration text."
            )


@dataclass
class _Input:
    moment: SecondMoment
    readers: set[str] = field(default_factory=set)
    seen: torch.Tensor | None = None
    """This batch's input. Held, so that no other tensor gets its address."""

    def is_input(self, x: torch.Tensor) -> bool:
        return self.seen is not None and self.seen.data_ptr() == x.data_ptr() and self.seen.shape == x.shape


class _Output:
    """Accumulates G of one layer W: [m, n], or W^T G W where that is smaller."""

    def __init__(self, W: torch.Tensor) -> None:
        self.W = W
        self.wide = W.shape[0] <= W.shape[1]
        self.moment = SecondMoment(min(W.shape), W.device)
        self._diagonal = torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)

    def add(self, rows: torch.Tensor, half: torch.Tensor | None) -> None:
        """Take gradients: [tokens, m] in; `half`: [tokens] as SecondMoment.add."""
        self._diagonal += rows.square().sum(0)
        self.moment.add(rows if self.wide else rows @ self.W, half)

    def finish(self) -> OutputStatistics:
        W = self.W.double()
        diagonal = self._diagonal / self.moment.tokens
        if self.wide:
            G = self.moment.shrunk()
            C = square_root(G.matrix) @ W
        else:
            G = self.moment.shrunk(target=(W.T * diagonal) @ W)
            C = square_root(G.matrix)
        return OutputStatistics(C, float(diagonal.mean()), G.amount)


def square_root(S: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semidefinite S: [n, n]; NaN where S is not finite."""
    if not bool(torch.isfinite(S).all()):
        return torch.full_like(S, float("nan"))
    values, vectors = torch.linalg.eigh(S)
    root: torch.Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def split_by_input(model: SourceModel, layers: LayerMap, calibration: CalibrationSet) -> LayerMap:
    """`layers` with each group split where its members turn out to read different inputs.

    Layers whose module is not run go to `dense`.
    """
    inputs: dict[str, torch.Tensor] = {}
    batch = calibration.batches[-1]
    with ExitStack() as stack:
        for layer in (layer for group in layers.groups for layer in group):

            def hook(_: torch.nn.Module, args: tuple[Any, ...], tensor: str = layer.tensor) -> None:
                inputs[tensor] = args[0]

            module = model.module.get_submodule(layer.module)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        with torch.no_grad():
            run_body(model, Batch(batch.ids[:1], batch.mask[:1]))
    groups: list[tuple[Layer, ...]] = []
    dense = dict(layers.dense)
    for group in layers.groups:
        parts: dict[int, list[Layer]] = {}
        for layer in group:
            if layer.tensor in inputs:
                parts.setdefault(inputs[layer.tensor].data_ptr(), []).append(layer)
            else:
                dense[layer.tensor] = "the calibration text does not run its module"
        groups += [tuple(part) for part in parts.values()]
    return LayerMap(layers.architecture, groups, dense)
