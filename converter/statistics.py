"""Second moments of the inputs of linear layers, one block at a time.

The model's blocks are run one after another over all calibration batches, with the hidden
states in between kept, so that only one block's H matrices are in memory. What else a block
takes (masks, positions) is recorded by a first pass in which the blocks do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from skipcat_edge.errors import UserError

from .calibration import Batch, CalibrationSet
from .layers import Layer, LayerMap
from .source_model import SourceModel


@dataclass(frozen=True)
class InputStatistics:
    """H = E[x x^T] of one input: [n, n], float64, symmetric."""

    H: torch.Tensor
    tokens: int


BlockStatistics = dict[str, InputStatistics]
"""By tensor name; layers that read the same input share one object."""


def block_statistics(
    model: SourceModel,
    layers: LayerMap,
    calibration: CalibrationSet,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, BlockStatistics]]:
    """Yield (block index, its statistics) for every block with layers to factor, in order.

    `advance` is called after each batch of each block. Raises UserError, naming the layer,
    where an activation is not finite.
    """
    by_block: dict[int, list[Layer]] = {}
    for group in layers.groups:
        by_block.setdefault(group[0].index, []).extend(group)
    blocks = _find_blocks(model.module, [layer for group in layers.groups for layer in group])
    in_tuple = None if blocks is None else _chain_form(model, blocks, calibration.batches[0])
    if blocks is None or in_tuple is None:
        yield from _all_at_once(model, by_block, calibration, advance)
        return
    with torch.inference_mode():
        states = [_record(model, blocks, batch, in_tuple) for batch in calibration.batches]
    for index, block in enumerate(blocks[: max(by_block) + 1]):
        wanted = by_block.get(index, [])
        collector = _Collector(model.module, wanted)
        with torch.inference_mode(), collector.hooked():
            for batch, state in zip(calibration.batches, states, strict=True):
                collector.start(batch)
                args, kwargs = state.arguments[index]
                state.hidden = _first(block(state.hidden, *args, **kwargs))
                advance()
        if wanted:
            yield index, collector.finish()


def _all_at_once(
    model: SourceModel,
    by_block: dict[int, list[Layer]],
    calibration: CalibrationSet,
    advance: Callable[[], None],
) -> Iterator[tuple[int, BlockStatistics]]:
    """For models whose blocks are no plain chain: whole forward passes, all H in memory."""
    collectors = {index: _Collector(model.module, layers) for index, layers in sorted(by_block.items())}
    n_blocks = max(collectors) + 1
    with torch.inference_mode():
        for batch in calibration.batches:
            with ExitStack() as stack:
                for collector in collectors.values():
                    collector.start(batch)
                    stack.enter_context(collector.hooked())
                _forward(model, batch)
            for _ in range(n_blocks):
                advance()
    for index in list(collectors):
        yield index, collectors.pop(index).finish()


@dataclass
class _State:
    """Of one batch: the hidden states, and per block what else its forward takes."""

    hidden: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _Collector:
    """Accumulates H of the inputs of some layers, once per distinct input."""

    def __init__(self, module: torch.nn.Module, layers: list[Layer]) -> None:
        self._modules = {layer.tensor: module.get_submodule(layer.module) for layer in layers}
        self._layers = {layer.tensor: layer for layer in layers}
        self._sums: list[_Sum] = []
        self._mask: torch.Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(self._hook(tensor)) for tensor, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, batch: Batch) -> None:
        """Begin a batch: inputs of the one before are no longer the same input."""
        self._mask = batch.mask
        for total in self._sums:
            total.seen = None

    def _hook(self, tensor: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self._add(tensor, args[0])

        return hook

    def _add(self, tensor: str, x: torch.Tensor) -> None:
        own = next((total for total in self._sums if tensor in total.readers), None)
        if own is None:
            own = next((total for total in self._sums if total.is_input(x)), None)
            if own is None:
                n = x.shape[-1]
                own = _Sum(torch.zeros(n, n, dtype=torch.float64, device=x.device))
                self._sums.append(own)
            own.readers.add(tensor)
        if own.seen is None:
            own.seen = x
            rows = x.reshape(-1, x.shape[-1]).float()
            if self._mask is not None and len(rows) == self._mask.numel():
                rows = rows[self._mask.reshape(-1).bool().to(rows.device)]
            own.H += rows.T @ rows
            own.tokens += len(rows)
        elif not own.is_input(x):
            raise UserError(
                f"{self._layers[tensor].module} does not always read the same input as its group; "
                "this model cannot be calibrated."
            )

    def finish(self) -> BlockStatistics:
        statistics: BlockStatistics = {}
        for total in self._sums:
            first = self._layers[sorted(total.readers)[0]]
            if not bool(torch.isfinite(total.H).all()):
                raise UserError(
                    f"An activation entering {first.module} ({first.tensor}) is not a finite number; "
                    "check the model's weights and the calibration text."
                )
            shared = InputStatistics(total.H / max(1, total.tokens), total.tokens)
            statistics.update(dict.fromkeys(total.readers, shared))
        missing = sorted(self._layers.keys() - statistics.keys())
        if missing:
            name = self._layers[missing[0]].module
            raise UserError(f"{name} was not run by the calibration text; use another text.")
        return statistics


@dataclass
class _Sum:
    H: torch.Tensor
    readers: set[str] = field(default_factory=set)
    tokens: int = 0
    seen: torch.Tensor | None = None
    """This batch's input. Held, so that no other tensor gets its address."""

    def is_input(self, x: torch.Tensor) -> bool:
        return self.seen is not None and self.seen.data_ptr() == x.data_ptr() and self.seen.shape == x.shape


def _find_blocks(module: torch.nn.Module, layers: list[Layer]) -> list[torch.nn.Module] | None:
    """The list of blocks that holds all layers, where there is one and it is indexed like GGUF."""
    containers = set()
    for layer in layers:
        head, found, _ = layer.module.partition(f".{layer.index}.")
        containers.add(head if found else None)
    if len(containers) != 1 or None in containers:
        return None
    blocks = module.get_submodule(str(containers.pop()))
    return list(blocks) if isinstance(blocks, torch.nn.ModuleList) else None


def _chain_form(model: SourceModel, blocks: list[torch.nn.Module], batch: Batch) -> bool | None:
    """Whether blocks return tuples; None where running block after block is not the model's forward."""
    small = Batch(batch.ids[:1], batch.mask[:1])
    outputs: list[Any] = []
    handle = blocks[-1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with torch.inference_mode():
            _forward(model, small)
            handle.remove()
            in_tuple = isinstance(outputs[0], tuple)
            state = _record(model, blocks, small, in_tuple)
            for block, (args, kwargs) in zip(blocks, state.arguments, strict=True):
                state.hidden = _first(block(state.hidden, *args, **kwargs))
            same = torch.allclose(_first(outputs[0]), state.hidden, rtol=1e-4, atol=1e-5)
    except torch.OutOfMemoryError:
        raise UserError("The device has too little memory for this model; use --device cpu.") from None
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
        return None
    finally:
        handle.remove()
    return in_tuple if same else None


def _record(model: SourceModel, blocks: list[torch.nn.Module], batch: Batch, in_tuple: bool) -> _State:
    """Run the model with blocks that pass their input on; keep what each was called with.

    `in_tuple`: the model's blocks return a tuple whose first element is the hidden states.
    """
    calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def stub(hidden: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if hidden is None:
            hidden = kwargs.pop("hidden_states")
        calls.append((hidden, args, kwargs))
        return (hidden,) if in_tuple else hidden

    try:
        for block in blocks:
            block.forward = stub
        _forward(model, batch)
    finally:
        for block in blocks:
            del block.forward
    return _State(calls[0][0], [(args, kwargs) for _, args, kwargs in calls])


def _forward(model: SourceModel, batch: Batch) -> None:
    device = next(model.module.parameters()).device
    # Without the head, whose logits nobody reads.
    body = getattr(model.module, "base_model", model.module)
    body(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device),
         **({} if model.is_encoder else {"use_cache": False}))


def _first(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def split_by_input(model: SourceModel, layers: LayerMap, calibration: CalibrationSet) -> LayerMap:
    """`layers` with each group split where its members turn out to read different inputs.

    Layers whose module is not run go to `dense`.
    """
    inputs: dict[str, torch.Tensor] = {}
    handles = []
    for layer in (layer for group in layers.groups for layer in group):

        def hook(_: torch.nn.Module, args: tuple[Any, ...], tensor: str = layer.tensor) -> None:
            inputs[tensor] = args[0]

        handles.append(model.module.get_submodule(layer.module).register_forward_pre_hook(hook))
    batch = calibration.batches[-1]
    try:
        with torch.inference_mode():
            _forward(model, Batch(batch.ids[:1], batch.mask[:1]))
    finally:
        for handle in handles:
            handle.remove()
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
