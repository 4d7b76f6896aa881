"""How fast this machine runs a model's layers: some of them with random weights, timed for some seconds.

As many layers as a few hundred megabytes hold are timed dense and low-rank, each time with the head, and a
single one beside them, so that nothing is said of caches, row lengths or threads that was not timed on this
machine. A small model is timed whole; to a large one its other layers are added.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge import synth
from skipcat_edge.decoding import time_batches
from skipcat_edge.errors import UserError
from skipcat_edge.session import BATCH, open_model
from skipcat_edge.synth_plan import Plan as PlannedModel
from skipcat_edge.synth_plan import Role, plan

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from skipcat_edge.model_table import ModelDimensions

_LAYERS_BYTES = 384 * 10**6
"""Of the layers that are timed: far more than caches hold. Two layers of 65 MB ran prompts 1.5 times as fast
as the 16 of the whole model, on a machine with a cache of 32 MB."""
MOST_PROMPT_TOKENS = 128
"""Of the prompt that is timed; more would only take longer."""
_ROUNDS, _LEAST_ROUNDS = 5, 2
_SECONDS = 10.0
"""After so many, types still to come are timed `_LEAST_ROUNDS` times only."""
_GENERATED = 12
_DEPTH = 1024
_WARM_UP = 2


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer, or of the head."""

    prompt_s: float
    """Of the probe's whole prompt."""
    decode_s: float
    """Of one token, the cache empty."""


@dataclass(frozen=True)
class TypeCosts:
    """Of one ggml type."""

    dense: Cost
    dense_parameters: int
    """Linear parameters of a dense layer."""
    low_rank: Cost | None
    """None where no low-rank layer was asked for, or the type's ranks allow none."""
    low_rank_parameters: int
    head: Cost


@dataclass(frozen=True)
class Probe:
    """What was measured of one model's layers with one number of threads."""

    threads: int
    prompt_tokens: int
    types: dict[str, TypeCosts]
    attention_s: float
    """Seconds that one layer's attention adds to decoding a token for each token before it."""
    prompt_attention_s: float
    """Seconds that it adds to a prompt for each pair of its tokens, both orders counted."""

    def prompt_s(self, model: PlannedModel, tokens: int) -> float | None:
        """Seconds of a prompt of `tokens` tokens; None for a type that was not probed."""
        costs = self.types.get(model.type.name)
        layer = None if costs is None else _layer_s(costs, model, lambda cost: cost.prompt_s)
        if costs is None or layer is None:
            return None
        # what was timed holds the attention of `prompt_tokens`; logits are computed for the last token alone
        attention = self.prompt_attention_s * tokens * (tokens - self.prompt_tokens)
        return model.model.n_layer * (layer * tokens / self.prompt_tokens + attention) + costs.head.prompt_s

    def decode_s(self, model: PlannedModel, depth: float) -> float | None:
        """Seconds of a token after `depth` others; None for a type that was not probed."""
        costs = self.types.get(model.type.name)
        layer = None if costs is None else _layer_s(costs, model, lambda cost: cost.decode_s)
        if costs is None or layer is None:
            return None
        return model.model.n_layer * (layer + self.attention_s * depth) + costs.head.decode_s


def _layer_s(costs: TypeCosts, model: PlannedModel, of: Callable[[Cost], float]) -> float | None:
    dense = of(costs.dense)
    if not model.low_rank:
        return dense
    if costs.low_rank is None:
        return None
    # as a dense layer changes with its parameters, from the low-rank layer that was timed
    more = model.linear_parameters / model.model.n_layer - costs.low_rank_parameters
    return of(costs.low_rank) + more * dense / costs.dense_parameters


def steps(types: Sized) -> int:
    """How often `probe` tells that it advances."""
    return 3 * len(types) + _ROUNDS * len(types) + 1


def probe(model: ModelDimensions, ratios: Mapping[GGMLQuantizationType, float | None], *, threads: int,
          prompt_tokens: int, advance: Callable[[str], None] = lambda _: None) -> Probe:
    """Time layers of `model` in each type of `ratios`, dense and low-rank at its ratio (None: dense only).

    `advance` hears a title after each of `steps`. Writes two or three layers and the head of each type into
    the folder for temporary files for a while. Raises UserError where the runtime is missing, or memory or
    that folder's room does not suffice.
    """
    found: dict[str, TypeCosts] = {}
    attention = prompt_attention = 0.0
    started = time.monotonic()
    for index, (type_, ratio) in enumerate(ratios.items()):
        with _subjects(model, type_, ratio, threads, prompt_tokens, advance) as subjects:
            for turn in range(_ROUNDS):
                share = _SECONDS * (index + 1) / len(ratios)
                if turn < _LEAST_ROUNDS or time.monotonic() - started < share:
                    for subject in subjects.values():
                        subject.measure()
                advance(type_.name)
            found[type_.name] = _costs(subjects)
            if index == len(ratios) - 1:
                attention, prompt_attention = subjects["dense"].attention_s()
                advance("attention")
    return Probe(threads, prompt_tokens, found, attention, prompt_attention)


class _Subject:
    def __init__(self, model: PlannedModel, path: Path, threads: int, prompt_tokens: int) -> None:
        self.model = model
        context = max(prompt_tokens, _DEPTH) + _GENERATED + _WARM_UP
        self.llama: Any = open_model(path, context=context, batch=max(BATCH, prompt_tokens), threads=threads,
                                     needs_vocabulary=False)
        self._draw = random.Random(0)
        self._prompt = self._tokens(prompt_tokens)
        self._decoded = [[token] for token in self._tokens(_GENERATED)]
        # what the other models left in the caches
        self._before = [[token] for token in self._tokens(_WARM_UP)]
        self.prompts: list[float] = []
        self.decodes: list[float] = []

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(self.model.model.n_vocab) for _ in range(count)]

    def measure(self) -> None:
        self.prompts.append(time_batches(self.llama, [self._prompt]))
        self.decodes.append(time_batches(self.llama, self._decoded, self._before) / len(self._decoded))

    def cost(self) -> Cost:
        return Cost(statistics.median(self.prompts), statistics.median(self.decodes))

    def attention_s(self) -> tuple[float, float]:
        """Seconds of a layer: for each token of the cache while decoding, and for each pair of a prompt."""
        tokens, cost, layers = self._tokens(_DEPTH), self.cost(), self.model.model.n_layer
        long = [tokens[start : start + BATCH] for start in range(0, _DEPTH, BATCH)]
        deep = time_batches(self.llama, self._decoded, [*long, *self._before]) / len(self._decoded)
        short = len(self._prompt)
        more = time_batches(self.llama, long) - cost.prompt_s * _DEPTH / short
        pairs = _DEPTH * max(1, _DEPTH - short)
        return max(0.0, deep - cost.decode_s) / _DEPTH / layers, max(0.0, more) / pairs / layers


@contextmanager
def _subjects(model: ModelDimensions, type_: GGMLQuantizationType, ratio: float | None, threads: int,
              prompt_tokens: int, advance: Callable[[str], None]) -> Iterator[dict[str, _Subject]]:
    """`dense` and `low-rank` layers, and `one` dense layer, each with the head."""
    layer = plan(replace(model, n_layer=1, tied_head=True), type_, 1.0, 0)
    layer_bytes = sum(tensor.nbytes for tensor in layer.tensors if tensor.role is Role.LINEAR)
    layers = min(model.n_layer, max(2, -(-_LAYERS_BYTES // layer_bytes)))
    few = replace(model, n_layer=layers, tied_head=True)
    wanted = {"dense": (few, 1.0), "one": (replace(few, n_layer=1), 1.0)}
    if ratio is not None:
        wanted["low-rank"] = (few, ratio)
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skipcat-edge-probe-")))
        except OSError as error:
            raise UserError(f"There is no folder for temporary files ({error.strerror}); set TMPDIR to one "
                            "with some gigabytes of room.") from None
        subjects: dict[str, _Subject] = {}
        for name, (dimensions, kept) in wanted.items():
            try:
                planned = plan(dimensions, type_, kept, 0)
            except UserError:
                continue  # a type whose ranks do not reach the ratio
            path = folder / f"{name}.gguf"
            synth.write(planned, path, None)
            subjects[name] = _Subject(planned, path, threads, prompt_tokens)
            stack.callback(subjects[name].llama.close)
            path.unlink()  # mapped: its pages stay until it is closed
            advance(type_.name)
        yield subjects


def _costs(subjects: dict[str, _Subject]) -> TypeCosts:
    dense, one = subjects["dense"], subjects["one"]
    layers = dense.model.model.n_layer
    # (layers - 1) of them and no head lie between the two; where there is one layer, it holds the head
    layer = _cost(dense, one, layers - 1) if layers > 1 else dense.cost()
    single = one.cost()
    head = Cost(max(0.0, single.prompt_s - layer.prompt_s), max(0.0, single.decode_s - layer.decode_s))
    low_rank, low_rank_parameters = None, 0
    if "low-rank" in subjects:
        low_rank = _cost(subjects["low-rank"], head, layers)
        low_rank_parameters = subjects["low-rank"].model.linear_parameters // layers
    return TypeCosts(layer, dense.model.linear_parameters // layers, low_rank, low_rank_parameters, head)


def _cost(subject: _Subject, without: _Subject | Cost, layers: int) -> Cost:
    """Of one of the `layers` that `subject` has beyond `without`."""
    whole, less = subject.cost(), without if isinstance(without, Cost) else without.cost()
    return Cost(max(0.0, whole.prompt_s - less.prompt_s) / layers,
                max(0.0, whole.decode_s - less.decode_s) / layers)
