"""Run a model's blocks one after another, forwards and backwards, outside its own forward pass.

What a block takes besides the hidden states (masks, positions) is recorded by a pass in which
the blocks do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from skipcat_edge.errors import RetryError

from .calibration import Batch
from .layers import Layer
from .source_model import SourceModel


@dataclass(frozen=True)
class Recorded:
    """Of one batch: what enters the first block, and per block what else its forward takes."""

    hidden: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class BlockChain:
    """The blocks of a model whose forward pass is embedding -> block after block -> head."""

    model: SourceModel
    blocks: list[torch.nn.Module]
    in_tuple: bool
    """Blocks return a tuple whose first element is the hidden states."""

    def record(self, batch: Batch) -> Recorded:
        """Run the model on `batch` with blocks that pass their input on; keep what each is called with."""
        calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def stub(hidden: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if hidden is None:
                hidden = kwargs.pop("hidden_states")
            calls.append((hidden, args, kwargs))
            return (hidden,) if self.in_tuple else hidden

        with torch.no_grad(), self._replaced(stub):
            run_body(self.model, batch)
        return Recorded(calls[0][0], [(args, kwargs) for _, args, kwargs in calls])

    def record_all(self, batches: Sequence[Batch], put: Callable[[torch.Tensor], None]) -> list[Recorded]:
        """The same of all `batches`, except for what enters the first block: `put` gets it."""
        recorded = []
        for batch in batches:
            item = self.record(batch)
            put(item.hidden)
            recorded.append(replace(item, hidden=item.hidden.new_empty(0)))
        return recorded

    def run(self, index: int, hidden: torch.Tensor, recorded: Recorded,
            block: torch.nn.Module | None = None) -> torch.Tensor:
        """Hidden states after block `index`, or after `block` in its place."""
        args, kwargs = recorded.arguments[index]
        return _first((block or self.blocks[index])(hidden, *args, **kwargs))

    def output_of(self, batch: Batch, hidden: torch.Tensor, run: Callable[[Batch], Any]) -> Any:
        """What `run` (a forward pass of the model) returns where the last block gave `hidden`."""

        def stub(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self.in_tuple else hidden

        with self._replaced(stub):
            return run(batch)

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        # a block on another device than the one before has a forward of accelerate's
        own = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = forward
            yield
        finally:
            for block, known in zip(self.blocks, own, strict=True):
                if known is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = known


def find_chain(model: SourceModel, layers: list[Layer], batch: Batch) -> BlockChain | None:
    """The chain that holds all `layers`; None where running it is not the model's forward pass."""
    containers = set()
    for layer in layers:
        head, found, _ = layer.module.partition(f".{layer.index}.")
        containers.add(head if found else None)
    if len(containers) != 1 or None in containers:
        return None
    blocks = model.module.get_submodule(str(containers.pop()))
    return _checked(model, list(blocks), batch) if isinstance(blocks, torch.nn.ModuleList) else None


def _checked(model: SourceModel, blocks: list[torch.nn.Module], batch: Batch) -> BlockChain | None:
    small = Batch(batch.ids[:1], batch.mask[:1])
    outputs: list[Any] = []
    handle = blocks[-1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with torch.no_grad():
            run_body(model, small)
            handle.remove()
            chain = BlockChain(model, blocks, isinstance(outputs[0], tuple))
            recorded = chain.record(small)
            if len(recorded.arguments) != len(blocks):
                return None
            hidden = recorded.hidden
            for index in range(len(blocks)):
                hidden = chain.run(index, hidden, recorded)
            same = torch.allclose(_first(outputs[0]), hidden, rtol=1e-4, atol=1e-5)
    except torch.OutOfMemoryError:
        raise RetryError("The device has too little memory for this model; use --device cpu.") from None
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
        return None
    finally:
        handle.remove()
    return chain if same else None


def run_body(model: SourceModel, batch: Batch) -> Any:
    """A forward pass without the head, whose logits nobody reads."""
    return _run(getattr(model.module, "base_model", model.module), model, batch)


def run_whole(model: SourceModel, batch: Batch) -> Any:
    """A forward pass with the head."""
    return _run(model.module, model, batch)


def _run(module: torch.nn.Module, model: SourceModel, batch: Batch) -> Any:
    return module(input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device),
                  **({} if model.is_encoder else {"use_cache": False}))


def _first(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
