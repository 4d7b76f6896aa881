"""The tensors of a random-weight model: a known model's dimensions, dense or low-rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from skipcat_edge import format as fmt
from skipcat_edge.errors import UserError
from skipcat_edge.model_table import MODELS, LinearGroup, ModelDimensions, RopeScaling
from skipcat_edge.ranks import check_levels, check_ratio, uniform_rank
from skipcat_edge.weight_types import correction_type

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType


class Role(Enum):
    """What a tensor is for."""

    EMBEDDING = "embedding"
    HEAD = "head"
    LINEAR = "linear"
    """Of a transformer block: what low rank compresses."""
    VECTOR = "vector"
    """Norm weights and biases."""
    CONSTANT = "constant"
    """Not trained: skip masks and rotary factors."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to be; `shape` is NumPy's (rows first)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    role: Role
    data: np.ndarray | None = None
    """The values, or None for random weights."""
    input_variance: float = 1.0
    """Of what the weights are multiplied by. Theirs makes the product's 1, in low-rank layers as in dense
    ones: attention would be slower where scores are larger."""
    first_level: int = 0
    """Place of the first rank level that uses it; all higher ones do."""

    @property
    def deviation(self) -> float:
        """Standard deviation of random weights."""
        return 1 / math.sqrt(self.shape[-1] * self.input_variance)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without alignment."""
        return fmt.tensor_bytes(self.type, math.prod(self.shape[:-1]), self.shape[-1])


@dataclass(frozen=True)
class Plan:
    """A model to be written."""

    model: ModelDimensions
    type: GGMLQuantizationType
    ratio: float
    """The ratio that was asked for."""
    seed: int
    tensors: tuple[PlannedTensor, ...]
    levels: tuple[float, ...] = ()
    """The ratios of its rank levels, rising; () for a model without."""

    @property
    def low_rank(self) -> bool:
        """Whether the linear layers are factored."""
        return self.ratio < 1

    @property
    def parameters(self) -> int:
        """Trained parameters of the whole model."""
        return sum(tensor.elements for tensor in self.tensors if tensor.role is not Role.CONSTANT)

    @property
    def linear_parameters(self) -> int:
        """Parameters of the blocks' linear layers, which is also their multiplications per token."""
        return sum(tensor.elements for tensor in self.tensors if tensor.role is Role.LINEAR)

    @property
    def kept(self) -> float:
        """The ratio that was reached: linear parameters over those of the dense model; see `kept_at`."""
        return self.kept_at(len(self.levels))

    def kept_at(self, level: int) -> float:
        """The ratio that a rank level reached, by its place from 0; what it adds counts by its bytes."""
        kept = sum(tensor.elements * _price(self.type, tensor.first_level) for tensor in self.tensors
                   if tensor.role is Role.LINEAR and tensor.first_level <= level)
        return kept / (self.model.n_layer * sum(group.m * group.n for group in self.model.groups))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that decoding one token reads: all but an embedding table that is not the head."""
        unread = set() if self.model.tied_head else {Role.EMBEDDING}
        return sum(tensor.nbytes for tensor in self.tensors if tensor.role not in unread)

    @property
    def fallbacks(self) -> tuple[PlannedTensor, ...]:
        """Weights whose rows are not whole blocks of the type, and are stored as F16."""
        matrices = {Role.EMBEDDING, Role.HEAD, Role.LINEAR}
        return tuple(
            tensor for tensor in self.tensors if tensor.role in matrices
            and tensor.type != _type_at(self.type, tensor.first_level)
        )


def _type_at(type_: GGMLQuantizationType, first_level: int) -> GGMLQuantizationType:
    """Of what levels from this place on use, as `convert` has it."""
    return correction_type(type_) if first_level else type_


def _price(type_: GGMLQuantizationType, first_level: int) -> float:
    """Of a parameter, beside one of the first level."""
    row = 256  # elements; whole blocks of any type
    return fmt.tensor_bytes(_type_at(type_, first_level), 1, row) / fmt.tensor_bytes(type_, 1, row)


def model_dimensions(name: str) -> ModelDimensions:
    """The table's entry. Raises UserError, listing the known names."""
    if name not in MODELS:
        raise UserError(f"{name!r} is not a known model; choose one of {', '.join(MODELS)}.")
    return MODELS[name]


def plan(model: ModelDimensions, type_: GGMLQuantizationType, ratio: float, seed: int,
         levels: Sequence[float] = ()) -> Plan:
    """The tensors of `model`: dense at ratio 1, otherwise low-rank with Skip and shared projections.

    With rank `levels`, the last of which is `ratio`, the first one's factors are used by all, and each
    further one adds factors to those below, of the type that `convert` gives them. Raises UserError for
    ratios that are out of range or that no ranks can keep.
    """
    check_ratio(ratio)
    if levels:
        check_levels(levels)
    rng = np.random.default_rng(seed)
    tensors = tuple(_tensors(model, type_, tuple(levels) or (ratio,), rng))
    return Plan(model, type_, ratio, seed, tensors, tuple(levels))


def _tensors(model: ModelDimensions, type_: GGMLQuantizationType, levels: Sequence[float],
             rng: np.random.Generator) -> Iterator[PlannedTensor]:
    from gguf import MODEL_TENSOR as TENSOR
    from gguf import TENSOR_NAMES
    from gguf import GGMLQuantizationType as Types

    def name(tensor: TENSOR, layer: int = 0, suffix: str = "weight") -> str:
        return f"{TENSOR_NAMES[tensor].format(bid=layer)}.{suffix}"

    def norm(tensor: TENSOR, layer: int = 0) -> PlannedTensor:
        ones = np.ones(model.n_embd, np.float32)
        return PlannedTensor(name(tensor, layer), ones.shape, Types.F32, Role.VECTOR, ones)

    yield _matrix(name(TENSOR.TOKEN_EMBD), model.n_vocab, model.n_embd, type_, Role.EMBEDDING)
    if not model.tied_head:
        yield _matrix(name(TENSOR.OUTPUT), model.n_vocab, model.n_embd, type_, Role.HEAD)
    yield norm(TENSOR.OUTPUT_NORM)
    if model.rope_scaling is not None:
        factors = rope_factors(model.rope_scaling, model.head_dim, model.rope_theta)
        yield PlannedTensor(name(TENSOR.ROPE_FREQS), factors.shape, Types.F32, Role.CONSTANT, factors)
    grid = fmt.rank_grid(type_, min(group.n for group in model.groups))
    for layer in range(model.n_layer):
        yield norm(TENSOR.ATTN_NORM, layer)
        yield norm(TENSOR.FFN_NORM, layer)
        if model.qkv_bias:
            outputs = model.groups[0].members.values()
            for tensor, m in zip((TENSOR.ATTN_Q, TENSOR.ATTN_K, TENSOR.ATTN_V), outputs, strict=True):
                yield PlannedTensor(name(tensor, layer, "bias"), (m,), Types.F32, Role.VECTOR)
        low_rank = levels[-1] < 1
        linear = [tensor for group in model.groups for tensor in (
            _factors(group, layer, type_, levels, grid, rng) if low_rank else _dense(group, layer, type_))]
        # masks beside the norms: what follows the last tensor that is read from the file itself, rather than
        # from a repacked copy, llama.cpp gives back to the system
        yield from (tensor for tensor in linear if tensor.role is Role.CONSTANT)
        yield from (tensor for tensor in linear if tensor.role is not Role.CONSTANT)


def _dense(group: LinearGroup, layer: int, type_: GGMLQuantizationType) -> Iterator[PlannedTensor]:
    for member, m in group.members.items():
        yield _matrix(fmt.weight_name(layer, member), m, group.n, type_)


def _matrix(name: str, rows: int, columns: int, type_: GGMLQuantizationType,
            role: Role = Role.LINEAR) -> PlannedTensor:
    return PlannedTensor(name, (rows, columns), fmt.factor_type(type_, columns), role)


def _factors(group: LinearGroup, layer: int, type_: GGMLQuantizationType, levels: Sequence[float], grid: int,
             rng: np.random.Generator) -> Iterator[PlannedTensor]:
    kept = 0.0
    for first, ratio in enumerate(levels):
        # what rounding to the grid left of a lower level's share goes to the next one
        own, price = _type_at(type_, first), _price(type_, first)
        step = max(grid, fmt.block_size(own))
        share = (ratio - kept / (group.m * group.n)) / price
        rank = uniform_rank(group.m, group.n, share, skip=True, grid=step)
        if rank == 0:
            owner = fmt.owner_of(group.members)
            raise UserError(f"blk.{layer}.{owner}: no rank of {own.name} (a multiple of {step}) "
                            f"{_too_small(levels, first)} or a type with smaller blocks.")
        kept += price * fmt.factor_parameters(group.m, group.n, rank, skip=True)
        used = None if first == 0 else (first, len(levels) - 1)
        for tensor in _stage(group, layer, own, rank, used, len(levels), rng):
            yield replace(tensor, first_level=first)


def _too_small(levels: Sequence[float], level: int) -> str:
    if level > 0:
        return f"fits between the levels {levels[level - 1]:g} and {levels[level]:g}; choose others"
    return (f"keeps a ratio of {levels[0]:g} or less; "
            f"choose a larger {'--ratio' if len(levels) == 1 else 'first level'}")


def _stage(group: LinearGroup, layer: int, type_: GGMLQuantizationType, rank: int, used: fmt.Levels | None,
           stages: int, rng: np.random.Generator) -> Iterator[PlannedTensor]:
    from gguf import GGMLQuantizationType as Types

    owner = fmt.owner_of(group.members)
    skip = np.zeros(group.n, bool)
    skip[rng.choice(group.n, rank, replace=False)] = True
    words = fmt.pack_skip_mask(skip)
    yield PlannedTensor(fmt.skip_mask_name(layer, owner, used), words.shape, Types.I32, Role.CONSTANT, words)
    yield _matrix(fmt.lr_a_name(layer, owner, used), rank, group.n - rank, type_)
    for member, m in group.members.items():
        b = _matrix(fmt.lr_b_name(layer, member, used), m, rank, type_)
        # of z = x_S + T x_R; the products of all stages are added
        yield replace(b, input_variance=2.0 * stages)


def rope_factors(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """Divisors of the rotary frequencies: float32 [head_dim / 2].

    Wavelengths well inside the original context stay, those longer than it are divided by
    `factor`, and between the two the frequencies are interpolated.
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_context_length / wavelength
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (1 / (keep + (1 - keep) / scaling.factor)).astype(np.float32)
