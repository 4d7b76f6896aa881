"""H and G of one block's layers, collected by hooks while it runs.

H = E[x x^T] of a layer's input and G = E[g g^T] of the gradient of the model's loss with respect to its
output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from skipcat_edge.errors import UserError

from .calibration import Batch, half_of_rows
from .layers import Layer, linear_weight
from .second_moments import SecondMoment
from .source_model import SourceModel
from .symmetric import cholesky_, with_diagonal


@dataclass(frozen=True)
class InputStatistics:
    """H = E[x x^T] of one input."""

    read: Callable[[], torch.Tensor]
    tokens: int
    shrinkage: float
    """How far H was moved towards its diagonal, in [0, 1]."""

    @property
    def H(self) -> torch.Tensor:  # noqa: N802
        """[n, n], float64, symmetric; read anew each time where it is on the disk."""
        return self.read()


@dataclass(frozen=True)
class OutputStatistics:
    """What G says about a layer W: [m, n], in the only form that the factors need.

    The outputs' order in the file may differ from the module's (llama.cpp's converter permutes
    some), and W^T G W does not depend on it.
    """

    read: Callable[[], torch.Tensor]
    mean_weight: float
    """Mean of G's diagonal."""
    shrinkage: float
    """How far G was moved towards its diagonal, in [0, 1]."""

    @property
    def C(self) -> torch.Tensor:  # noqa: N802
        """[min(m, n), n], float64, with C^T C = W^T G W; read anew each time where it is on the disk."""
        return self.read()


@dataclass(frozen=True)
class LayerStatistics:
    """Both sides of one layer; `output` is None where no gradient was taken."""

    input: InputStatistics
    output: OutputStatistics | None


@dataclass(frozen=True)
class _InMemory:
    matrix: torch.Tensor

    def __call__(self) -> torch.Tensor:
        return self.matrix


BlockStatistics = dict[str, LayerStatistics]
"""By tensor name; layers that read the same input share one InputStatistics."""


class Collector:
    """Accumulates H of the inputs of some layers, once per distinct input, and G of their outputs."""

    def __init__(self, model: SourceModel, layers: list[Layer], gradients: bool) -> None:
        self._modules = {layer.tensor: model.module.get_submodule(layer.module) for layer in layers}
        self._layers = {layer.tensor: layer for layer in layers}
        self._inputs: list[_Input] = []
        self._outputs: dict[str, _Output] = {}
        if gradients:
            for layer in layers:
                model.bring(self._modules[layer.tensor])
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

    def finish(self) -> Iterator[BlockStatistics]:
        """Input after input, the statistics of the layers that read it. Each is forgotten then."""
        seen = {tensor for total in self._inputs for tensor in total.readers}
        missing = sorted(self._layers.keys() - seen)
        if missing:
            name = self._layers[missing[0]].module
            raise UserError(f"{name} was not run by the calibration text; use another text.")
        while self._inputs:
            total = self._inputs.pop()
            readers = sorted(total.readers)
            shrunk = total.moment.shrunk()
            del total
            self._require_finite(shrunk.matrix, readers[0], "An activation entering")
            shared = InputStatistics(_InMemory(shrunk.matrix), shrunk.tokens, shrunk.amount)
            del shrunk
            statistics: BlockStatistics = {}
            for tensor in readers:
                output = self._outputs.pop(tensor, None)
                found = None if output is None or not output.moment.tokens else output.finish()
                if found is not None:
                    self._require_finite(found.C, tensor, "A gradient reaching")
                statistics[tensor] = LayerStatistics(shared, found)
            del shared
            yield statistics

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
            C = root(G.matrix) @ W
        else:
            G = self.moment.shrunk(target=(W.T * diagonal) @ W)
            C = root(G.matrix)
        return OutputStatistics(_InMemory(C), float(diagonal.mean()), G.amount)


def root(S: torch.Tensor) -> torch.Tensor:
    """R with R^T R = S for a positive semidefinite S: [n, n]; NaN where S is not finite."""
    if not bool(torch.isfinite(S).all()):
        return torch.full_like(S, float("nan"))
    upper = cholesky_(with_diagonal(S, 0.0), upper=True)
    if upper is not None:
        return upper
    # some gradient was never there: twenty times as long
    values, vectors = torch.linalg.eigh(S)
    symmetric: torch.Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return symmetric


def in_memory(statistics: BlockStatistics) -> BlockStatistics:
    """The same with its matrices, for a machine that does not have the file."""
    inputs = {id(each.input): each.input for each in statistics.values()}
    inputs = {key: replace(each, read=_InMemory(each.H)) for key, each in inputs.items()}
    return {
        name: LayerStatistics(
            inputs[id(each.input)],
            None if each.output is None else replace(each.output, read=_InMemory(each.output.C)))
        for name, each in statistics.items()
    }
