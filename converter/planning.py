"""The allocation stage: statistics and a budget in, the plan of ranks and forms out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType

from skipcat_edge import format as fmt
from skipcat_edge.errors import UnreachableError

from .allocation import BudgetError, Cost, Groups, allocate, least_cost
from .candidates import Candidate, Form, alternatives, bits, measure, problem
from .collector import BlockStatistics, in_memory
from .executor import Executor, LocalExecutor
from .factorize import Method
from .job import Job
from .job_blocks import BlockCandidates, has_measured, measured
from .layers import Layer, LayerMap
from .level_allocation import Added, LevelBudgets, allocate_levels
from .named_allocations import RULES, allocate_by_rule
from .plan import Plan, PlannedOwner
from .quantized import Rounding
from .writer import TENSOR_INFO, OutputTypes, factor_slots

ALLOCATIONS = ("loss", *RULES)
CAUTION = 30.0
"""How much more a loss counts that takes all of its layers, where losses are weighed against each other."""


@dataclass(frozen=True)
class Budget:
    """How large the linear layers may become."""

    kind: Literal["ratio", "bpw", "file"]
    """`ratio`: kept parameters over dense ones. `bpw`: bits per dense weight. `file`: bytes of the file."""
    value: float
    fixed_bytes: int = 0
    """Of a file: what is no linear layer that can be factored."""

    def __str__(self) -> str:
        words = {"ratio": "a ratio of {:g}", "bpw": "{:g} bits per weight",
                 "file": "a budget of {:,.0f} bytes"}
        return words[self.kind].format(self.value)


def measure_groups(
    layers: LayerMap,
    weights: Callable[[int], Mapping[str, torch.Tensor]],
    statistics: Callable[[int], BlockStatistics],
    type_: GGMLQuantizationType,
    method: Method,
    rounding: Rounding,
    advance: Callable[[], None] = lambda: None,
    job: Job | None = None,
    executor: Executor | None = None,
) -> Groups:
    """Every group's alternatives with their predicted losses, block by block.

    `weights` and `statistics` give those of one block. `advance` is called after each group. `job`: where
    finished blocks are kept and found. `executor`: where blocks are measured; None: here. The result serves
    any budget.
    """
    own: dict[int, list[tuple[Layer, ...]]] = {}
    for group in sorted(layers.groups, key=lambda group: group[0].index):
        own.setdefault(group[0].index, []).append(group)

    def taken(block: int) -> BlockStatistics:
        return statistics(block) if executor is None else in_memory(statistics(block))

    tasks = (
        _BlockTask(own[block], weights(block), taken(block), type_, method, rounding)
        for block in [block for block in own if not has_measured(job, block)]
    )
    results = (executor or LocalExecutor()).map(_measure_block, tasks)
    groups: BlockCandidates = []
    for block in own:
        groups += measured(job, block, lambda: next(results))
        for _ in own[block]:
            advance()
    return groups


@dataclass(frozen=True)
class _BlockTask:
    groups: list[tuple[Layer, ...]]
    weights: Mapping[str, torch.Tensor]
    statistics: BlockStatistics
    type: GGMLQuantizationType
    method: Method
    rounding: Rounding


def _measure_block(task: _BlockTask) -> BlockCandidates:
    return [_measure_group(group, task.weights, task.statistics, task.type, task.method, task.rounding)
            for group in task.groups]


def _measure_group(
    group: tuple[Layer, ...], W: Mapping[str, torch.Tensor], entries: BlockStatistics,
    type_: GGMLQuantizationType, method: Method, rounding: Rounding,
) -> list[list[Candidate]]:
    unit = _unit(group, W, entries, method)
    return [
        [
            measure(problem(members, W, entries, method), members, type_, method, rounding, unit)
            for members in alternative
        ]
        for alternative in alternatives(group, method.share)
    ]


def _unit(
    group: tuple[Layer, ...], W: Mapping[str, torch.Tensor], entries: BlockStatistics, method: Method
) -> float:
    """1 where losses are the model's. Without gradients those of different groups have no common unit;
    they become shares of the loss of leaving the group out."""
    if method.two_sided and any(entry.output is not None for entry in entries.values()):
        return 1.0
    return 1 / max(problem(group, W, entries, method).total(), 1e-300)


def make_plan(
    groups: Groups, method: Method, allocation: str, budget: Budget, type_: GGMLQuantizationType,
    grid: int | None = None,
) -> Plan:
    """Ranks and forms of least predicted loss, or by the rule that `allocation` names.

    Raises UnreachableError if the budget is below the lowest cost.
    """
    layers = _layers(groups)
    cost, total = cost_of(budget, layers, type_)
    grid = grid or fmt.rank_grid(type_, min(layer.n for layer in layers))
    try:
        if allocation == "loss":
            return allocate(groups, total, cost, grid, method.skip, CAUTION)
        if allocation == "uniform" and None in (method.share, method.skip):
            return _each_group(groups, total, cost, grid, method.skip)
        skip = method.skip if method.skip is not None else type_ in _WIDE
        candidates = [candidate for group in groups for candidate in group[0 if method.share else -1]]
        return allocate_by_rule(candidates, RULES[allocation], total, cost, grid, skip)
    except BudgetError as error:
        raise _unreachable(budget, error, layers, grid) from None


def make_level_plan(
    groups: Groups, method: Method, levels: Sequence[float], spare: float, fixed_bytes: float,
    types: OutputTypes, grid: int | None = None,
) -> Plan:
    """The plan of a file whose levels keep these ratios, ascending.

    A level reads as much for a token as a file of its ratio: factors that it adds to lower ones are of
    `types.correction`, and count by what that takes. `spare`: how much larger than one of its last level
    alone the file may be, as a share. `fixed_bytes`: of the file, what is no linear layer that can be
    factored. Raises UnreachableError if the first ratio is below the lowest that there is.
    """
    layers, type_ = _layers(groups), types.linear
    cost = _parameters
    added = Added(_added_cost(cost, types), max(0.0, noise(types.correction) - noise(type_)))
    total = cost_of_all(layers, cost)
    grid = grid or fmt.rank_grid(type_, min(layer.n for layer in layers))
    reads = tuple(ratio * total for ratio in levels)
    per_byte = total / cost_of_all(layers, _bytes_cost(type_))
    try:
        alone = allocate(groups, reads[-1], cost, grid, method.skip, CAUTION)
        limit = (1 + spare) * (fixed_bytes + _stored_bytes(alone, groups, types)) - _LEVEL_KEYS
        # the names and the padding of about twice as many tensors
        stored = (limit - fixed_bytes - 2 * TENSOR_INFO * 3 * len(alone.owners)) * per_byte
        for _ in range(_TRIES):
            plan = allocate_levels(groups, LevelBudgets(reads, max(stored, reads[-1])), cost, grid,
                                   method.skip, CAUTION, added)
            excess = fixed_bytes + _stored_bytes(plan, groups, types) - limit
            if excess <= 0 or stored <= reads[-1]:
                break
            stored -= 1.1 * excess * per_byte
        return plan
    except BudgetError as error:
        raise _unreachable(Budget("ratio", levels[0]), error, layers, grid) from None


def _unreachable(budget: Budget, error: BudgetError, layers: Sequence[Layer], grid: int) -> UnreachableError:
    return UnreachableError(
        f"{str(budget).capitalize()} is too little: with the lowest ranks on the grid of {grid}, "
        f"{_least(budget, error.least, layers)} is the smallest possible; "
        "raise it, or choose a --quant with a smaller block."
    )


def _layers(groups: Groups) -> list[Layer]:
    """Every layer once: each alternative of a group holds all of its layers."""
    return [layer for group in groups for candidate in group[-1] for layer in candidate.members]


def cost_of(
    budget: Budget, layers: Sequence[Layer], type_: GGMLQuantizationType
) -> tuple[Cost, float]:
    """The cost that `budget` limits, and its limit for `layers`."""
    parameters_of_all = sum(layer.m * layer.n for layer in layers)
    if budget.kind == "file":
        return _bytes_cost(type_), budget.value - budget.fixed_bytes
    if budget.kind == "bpw":
        return _bytes_cost(type_), budget.value / 8 * parameters_of_all
    return _parameters, budget.value * parameters_of_all


def _parameters(members: Sequence[Layer], rank: int, form: Form) -> float:
    if form is None:
        return sum(layer.m * layer.n for layer in members)
    return fmt.factor_parameters(sum(layer.m for layer in members), members[0].n, rank, form)


def cost_of_all(layers: Sequence[Layer], cost: Cost) -> float:
    """What `layers` cost where all stay dense."""
    return sum(cost((layer,), 0, None) for layer in layers)


def _bytes_cost(type_: GGMLQuantizationType) -> Cost:
    def nbytes(members: Sequence[Layer], rank: int, form: Form) -> float:
        if form is None:
            return sum(
                fmt.tensor_bytes(fmt.factor_type(type_, layer.n), layer.m, layer.n) for layer in members)
        owner = PlannedOwner(tuple(members), rank, form)
        return sum(slot.padded_bytes(_ALIGNMENT) for slot in factor_slots(owner, type_))

    return nbytes


def noise(type_: GGMLQuantizationType) -> float:
    """What rounding both factors of a correction loses, over the loss that it takes away: about."""
    return float(_NOISE * 4.0 ** -bits(type_))


def _added_cost(cost: Cost, types: OutputTypes) -> Cost:
    """What factors that a level adds cost, where `cost` is that of the same ones in the file's type."""
    if types.correction == types.linear:
        return cost
    own, linear = _bytes_cost(types.correction), _bytes_cost(types.linear)
    block = fmt.block_size(types.correction)

    def scaled(members: Sequence[Layer], rank: int, form: Form) -> float:
        if rank % block:
            return math.inf  # its rows would be no whole blocks, and so of another type
        return cost(members, rank, form) * own(members, rank, form) / linear(members, rank, form)

    return scaled


def kept_share(layers: Sequence[Layer], plan: Plan, level: int, types: OutputTypes | None = None) -> float:
    """What a level uses of the parameters of `layers`. `types`: what it adds counts by its bytes."""
    added = _parameters if types is None else _added_cost(_parameters, types)
    used = [owner for owner in plan.owners if owner.used_at(level)]
    factored = {layer.tensor for owner in used for layer in owner.members}
    read = sum((added if owner.added else _parameters)(owner.members, owner.rank, owner.skip)
               for owner in used)
    read += cost_of_all([layer for layer in layers if layer.tensor not in factored], _parameters)
    total = cost_of_all(layers, _parameters)
    return 1 - (total - read) / total if total else 1.0


def _each_group(groups: Groups, budget: float, cost: Cost, grid: int, skip: bool | None) -> Plan:
    """The same share of its dense cost for every group, or the least it can have, in its best form.

    Raises BudgetError where even the least is too much.
    """
    dense = [cost_of_all(_layers([group]), cost) for group in groups]
    least = [least_cost([group], cost, grid, skip) for group in groups]
    if sum(least) > budget:
        raise BudgetError(sum(least), budget)

    def limits(share: float) -> list[float]:
        return [max(share * whole, floor) for whole, floor in zip(dense, least, strict=True)]

    low, share = 0.0, budget / sum(dense)
    if sum(limits(share)) > budget:
        # some groups need more than their share
        high = share
        for _ in range(_BISECTIONS):
            share = (low + high) / 2
            low, high = (share, high) if sum(limits(share)) <= budget else (low, share)
        share = low
    plans = [allocate([group], limit, cost, grid, skip)
             for group, limit in zip(groups, limits(share), strict=True)]
    return Plan([owner for plan in plans for owner in plan.owners],
                {name: reason for plan in plans for name, reason in plan.dense.items()},
                sum(plan.loss or 0.0 for plan in plans))


def _least(budget: Budget, least: float, layers: Sequence[Layer]) -> str:
    parameters = sum(layer.m * layer.n for layer in layers)
    # rounded up, so that what is named is enough
    if budget.kind == "ratio":
        return f"{math.ceil(1e4 * least / parameters) / 1e4:.4f}"
    if budget.kind == "bpw":
        return f"{math.ceil(8e3 * least / parameters) / 1e3:.3f}"
    return f"{math.ceil(least + budget.fixed_bytes):,} bytes"


_BISECTIONS = 60

# A file with levels is planned again where it came out larger than it may be; its keys and longer names take
# so many bytes at most.
_TRIES, _LEVEL_KEYS = 8, 1024

# 2.7 % were measured of corrections in Q4_0, which has 4.5 bits.
_NOISE = 14.0

# GGUF's default; a file's tensors begin at its multiples.
_ALIGNMENT = 32

_WIDE = frozenset({
    GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0,
})  # fmt: skip


def dense_plan(groups: Groups) -> Plan:
    """Nothing is factored."""
    candidates = [candidate for group in groups for candidate in group[-1]]
    loss = sum(float(candidate.losses(np.zeros(1, int), None)[0]) for candidate in candidates)
    return Plan([], {layer.tensor: "" for layer in _layers(groups)}, loss)


def _stored_bytes(plan: Plan, groups: Groups, types: OutputTypes) -> float:
    """What the layers of `groups` take in a file, dense ones of higher levels and tensors' names too."""
    again = [layer for layer in _layers(groups) if layer.tensor in plan.dense_from]
    tensors = (sum(len(factor_slots(owner, types.of(owner))) for owner in plan.owners) + len(again)
               + len(plan.dense))
    return (plan_bytes(plan, groups, types) + cost_of_all(again, _bytes_cost(types.linear))
            + TENSOR_INFO * tensors)


def plan_bytes(plan: Plan, groups: Groups, types: OutputTypes) -> int:
    """What the layers of `groups` take in a file."""
    cost = _bytes_cost(types.linear)
    total = sum(_bytes_cost(types.of(owner))(owner.members, owner.rank, owner.skip) for owner in plan.owners)
    return int(total + cost_of_all([layer for layer in _layers(groups) if layer.tensor in plan.dense], cost))
