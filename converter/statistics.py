"""Two-sided statistics of linear layers, one block at a time.

H = E[x x^T] of a layer's input and G = E[g g^T] of the gradient of the model's loss with respect
to its output. The hidden states before every block are kept from a forward pass; then each block,
from the last to the first, is run once more forwards and backwards, so that only one block's
matrices and activations are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NoReturn

import torch

from skipcat_edge.errors import UserError

from .block_chain import BlockChain, Recorded, find_chain, run_body, run_whole
from .calibration import Batch, CalibrationSet
from .collector import BlockStatistics, Collector
from .job import Job
from .layers import Layer, LayerMap
from .losses import loss_of
from .memory import HEAD_TOKENS, MemoryPlan
from .source_model import SourceModel
from .states import States, open_states, states_artifact


def block_statistics(
    model: SourceModel,
    layers: LayerMap,
    calibration: CalibrationSet,
    advance: Callable[[], None] = lambda: None,
    gradients: bool = True,
    seed: int = 0,
    job: Job | None = None,
    say: Callable[[str], None] = lambda text: None,
    memory: MemoryPlan | None = None,
) -> Iterator[tuple[int, BlockStatistics]]:
    """Yield (block index, statistics of some of its layers) for all layers to factor, the last block first.
    What reads the same input comes together.

    `advance` is called after each batch of each block, on the way forwards and on the way back. With a
    `job`, hidden states and gradients are kept in it, a block counts as done when the next one is asked
    for, and what an earlier run did is told and not done again. `memory` says how many matrices may be there
    at once; where a block has more, it is run again for the others. Raises UserError, naming the layer,
    where an activation or a gradient is not finite.
    """
    by_block: dict[int, list[Layer]] = {}
    for group in layers.groups:
        by_block.setdefault(group[0].index, []).extend(group)
    wanted = layers.members
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    chain = find_chain(model, wanted, calibration.batches[0])
    generator = torch.Generator().manual_seed(seed)
    if chain is None:
        yield from _all_at_once(model, by_block, calibration, advance, gradients, generator)
        return
    head_tokens = HEAD_TOKENS if memory is None else memory.head_tokens
    states, recorded = open_states(chain, calibration.batches, job, _hidden(0))
    last = len(chain.blocks) if gradients else max(by_block) + 1
    # blocks from here on have their statistics; None: not all have been run forwards
    done = next((index for index in range(last + 1) if states.has(_gradient(index))), None)
    if done is None:
        first = max(index for index in range(last + 1) if states.has(_hidden(index)))
        if first:
            say(f"Resuming: the text has been through {first} of {last} blocks.")
        _forward(chain, range(first, last), by_block, calibration, states, recorded, advance)
        with states.writing(_gradient(last)) as put:
            for number, batch in enumerate(calibration.batches if gradients else []):
                hidden = states.read(_hidden(last), number)
                put(_head_gradient(chain, batch, hidden, generator, head_tokens))
        done = last
    else:
        first = last
        if done < last:
            say(f"Resuming: the statistics of {last - done} of {last} blocks are done.")
    for _ in range((first + last - done) * len(recorded)):
        advance()
    for index in reversed(range(done)):
        # its gradient is there, and so is it done, only after its statistics were taken
        with states.writing(_gradient(index)) as put:
            own = by_block.get(index, [])
            parts = [own] if memory is None else memory.parts(own)
            for part in parts:
                collector = Collector(model, part, gradients)
                with collector.hooked():
                    for number, batch in enumerate(calibration.batches):
                        collector.start(batch)
                        hidden = states.read(_hidden(index), number).detach().requires_grad_(gradients)
                        with torch.set_grad_enabled(gradients):
                            output = chain.run(index, hidden, recorded[number])
                        if gradients:
                            upstream = states.read(_gradient(index + 1), number).to(output.device)
                            gradient = torch.autograd.grad(output, hidden, upstream)[0]
                            if part is parts[0]:
                                put(gradient)
                        if part is parts[0]:
                            advance()
                        del hidden, output
                for statistics in collector.finish():
                    yield index, statistics
                    del statistics
                del collector
        states.drop(_hidden(index + 1))
        states.drop(_gradient(index + 1))
    states.drop(_hidden(0))


def _hidden(index: int) -> str:
    """What enters the block."""
    return f"hidden-{index}"


FIRST_STATES = states_artifact(_hidden(0))
"""The artifact that is there before any block has been run."""


def _gradient(index: int) -> str:
    """Of the loss with respect to what enters the block."""
    return f"gradient-{index}"


def _forward(
    chain: BlockChain, blocks: range, by_block: dict[int, list[Layer]], calibration: CalibrationSet,
    states: States, recorded: list[Recorded], advance: Callable[[], None],
) -> None:
    for index in blocks:
        with torch.no_grad(), states.writing(_hidden(index + 1)) as put:
            for number, batch in enumerate(calibration.batches):
                hidden = states.read(_hidden(index), number)
                output = chain.run(index, hidden, recorded[number])
                if not bool(torch.isfinite(output).all()):
                    _blame(chain, index, by_block, batch, hidden, recorded[number])
                put(output)
                advance()


def _blame(
    chain: BlockChain, index: int, by_block: dict[int, list[Layer]], batch: Batch,
    hidden: torch.Tensor, recorded: Recorded,
) -> NoReturn:
    """Raise UserError, naming the layer whose input is the first that is not finite."""
    collector = Collector(chain.model, by_block.get(index, []), gradients=False)
    with collector.hooked():
        collector.start(batch)
        chain.run(index, hidden, recorded)
    for _ in collector.finish():
        pass
    raise UserError(f"Block {index} of {chain.model.name} gives numbers that are not finite; "
                    "check the model's weights.")


def _head_gradient(
    chain: BlockChain, batch: Batch, hidden: torch.Tensor, generator: torch.Generator, tokens: int
) -> torch.Tensor:
    """Gradient of the loss with respect to the last block's output: as `hidden`. At most so many `tokens`,
    or one sequence, go through the head at a time."""
    rows = max(1, tokens // hidden.shape[1])
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
    if model.residency is not None:
        raise UserError(f"The blocks of {model.name} are no plain chain, so that its weights cannot be "
                        "streamed; leave out --max-memory.")
    collectors = {index: Collector(model, layers, gradients) for index, layers in by_block.items()}
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
                        for _ in collectors[index].finish():
                            pass
                    raise UserError(f"{model.name} gives numbers that are not finite; check its weights.")
                if gradients:
                    torch.autograd.backward(loss_of(model, batch, output, generator))
            for _ in range(2 * n_blocks):
                advance()
    for index in sorted(collectors, reverse=True):
        for statistics in collectors.pop(index).finish():
            yield index, statistics


def split_by_input(model: SourceModel, layers: LayerMap, calibration: CalibrationSet) -> LayerMap:
    """`layers` with each group split where its members turn out to read different inputs.

    Layers whose module is not run go to `dense`.
    """
    inputs: dict[str, torch.Tensor] = {}
    batch = calibration.batches[-1]
    with ExitStack() as stack:
        for layer in layers.members:

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
