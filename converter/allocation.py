"""Which projection gets which rank and form: one multiplier over all groups.

Minimises the predicted loss of all groups subject to a budget of parameters or bytes: for a
multiplier every group takes the choice with the least loss + multiplier * cost, and the multiplier
is found by bisection. What the grid of ranks leaves over is given to the steps that gain most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from skipcat_edge.errors import UserError

from .layers import Layer
from .plan import Plan, PlannedOwner

Cost = Callable[[Sequence[Layer], int | None, bool], float]
"""Of layers that share a projection: cost(members, rank, skip); rank None: they stay dense."""

Noise = Callable[[Sequence[Layer], int | None, bool], float]
"""Predicted loss by rounding, with the same arguments."""

_BISECTIONS = 200


@dataclass(frozen=True)
class Candidate:
    """Layers that may share one projection, and what dropping its terms costs."""

    members: tuple[Layer, ...]
    spectrum: np.ndarray
    """Squared singular values, descending; all of W at once for a candidate of one layer."""

    @property
    def m(self) -> int:
        return sum(layer.m for layer in self.members)

    @property
    def n(self) -> int:
        return self.members[0].n


@dataclass(frozen=True)
class _Options:
    """What one candidate can become: ranks[i] is 0 where it stays dense."""

    candidate: Candidate
    ranks: np.ndarray
    skips: np.ndarray
    costs: np.ndarray
    losses: np.ndarray


def allocate(
    groups: Sequence[Sequence[Sequence[Candidate]]],
    budget: float,
    cost: Cost,
    grid: int,
    skip: bool | None = None,
    noise: Noise = lambda members, rank, skip: 0.0,
) -> Plan:
    """The ranks of least predicted loss whose cost is at most `budget`.

    `groups`: for each group of layers its alternatives (shared, not shared), each a list of
    candidates that together hold the group's layers. `skip` None: decided by loss and cost.
    Raises UserError if even the lowest ranks cost more.
    """
    tables = [
        [[_options(candidate, cost, grid, skip, noise) for candidate in alternative] for alternative in group]
        for group in groups
    ]
    chosen = _at_multiplier(tables, float("inf"))
    if _total(chosen) > budget:
        raise UserError(
            f"The lowest ranks on the grid of {grid} already cost {_total(chosen):,.0f}, but the budget "
            f"is {budget:,.0f}; raise it, or choose a --quant with a smaller block."
        )
    low, high = 1e-30, 1e30
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        trial = _at_multiplier(tables, middle)
        if _total(trial) <= budget:
            high, chosen = middle, trial
        else:
            low = middle
    return _plan(_filled(chosen, budget))


def _options(candidate: Candidate, cost: Cost, grid: int, skip: bool | None, noise: Noise) -> _Options:
    members, m, n = candidate.members, candidate.m, candidate.n
    tail = np.concatenate([np.cumsum(candidate.spectrum[::-1])[::-1], [0.0]])
    dense_cost = cost(members, None, False)
    rows: list[tuple[int, bool, float, float]] = [(0, False, dense_cost, noise(members, None, False))]
    for with_skip in (False, True) if skip is None else (skip,):
        for rank in range(grid, min(m, n - 1 if with_skip else n) + 1, grid):
            price = cost(members, rank, with_skip)
            if price < dense_cost:
                loss = float(tail[min(rank, len(tail) - 1)]) + noise(members, rank, with_skip)
                rows.append((rank, with_skip, price, loss))
    ranks, skips, costs, losses = zip(*rows, strict=True)
    return _Options(candidate, np.array(ranks), np.array(skips), np.array(costs), np.array(losses))


_Chosen = list[tuple[_Options, int]]


def _at_multiplier(tables: list[list[list[_Options]]], multiplier: float) -> _Chosen:
    chosen: _Chosen = []
    for group in tables:
        best: tuple[float, _Chosen] | None = None
        for alternative in group:
            picks: _Chosen = []
            value = 0.0
            for options in alternative:
                weighed = options.costs if np.isinf(multiplier) else (
                    options.losses + multiplier * options.costs)
                pick = int(np.argmin(weighed))
                picks.append((options, pick))
                value += float(weighed[pick])
            if best is None or value < best[0]:
                best = value, picks
        assert best is not None
        chosen += best[1]
    return chosen


def _total(chosen: _Chosen) -> float:
    return float(sum(options.costs[pick] for options, pick in chosen))


def _filled(chosen: _Chosen, budget: float) -> _Chosen:
    """Spend what is left on the step with the largest gain for its cost, while one fits."""
    chosen = list(chosen)
    while True:
        left = budget - _total(chosen)
        best: tuple[float, int, int] | None = None
        for index, (options, pick) in enumerate(chosen):
            more = options.costs - options.costs[pick]
            gain = options.losses[pick] - options.losses
            fits = np.flatnonzero((more <= left) & (gain > 0))
            if len(fits):
                rate = gain[fits] / np.maximum(more[fits], 1e-9)
                step = int(np.argmax(rate))
                if best is None or rate[step] > best[0]:
                    best = float(rate[step]), index, int(fits[step])
        if best is None:
            return chosen
        _, index, pick = best
        chosen[index] = chosen[index][0], pick


def _plan(chosen: _Chosen) -> Plan:
    owners: list[PlannedOwner] = []
    dense: dict[str, str] = {}
    for options, pick in chosen:
        members, rank = options.candidate.members, int(options.ranks[pick])
        if rank == 0:
            dense.update({layer.tensor: "worth more than it costs" for layer in members})
        else:
            owners.append(PlannedOwner(members, rank, bool(options.skips[pick])))
    return Plan(owners, dense)


def allocate_by_energy(
    candidates: Sequence[Candidate], budget: float, cost: Cost, grid: int, skip: bool
) -> Plan:
    """Every projection keeps the same share of its energy (the sum of its squared singular values)."""

    def ranks(share: float) -> list[int]:
        found = []
        for candidate in candidates:
            kept = np.cumsum(candidate.spectrum)
            rank = int(np.searchsorted(kept, share * kept[-1])) + 1
            found.append(-(-rank // grid) * grid)
        return found

    return _by_knob(candidates, budget, cost, grid, skip, ranks)


def allocate_by_fisher(
    candidates: Sequence[Candidate], budget: float, cost: Cost, grid: int, skip: bool
) -> Plan:
    """Ranks in proportion to each projection's Fisher score (FLRC, arXiv 2510.09332).

    The score is the loss of removing W whole, tr(G W H W^T), with the two-sided statistics in
    place of the squared products of weights and gradients.
    """
    scores = np.array([candidate.spectrum.sum() for candidate in candidates])
    weights = scores / scores.max()

    def ranks(share: float) -> list[int]:
        return [
            grid * int(np.ceil(share * len(candidates) * weight * min(candidate.m, candidate.n) / grid))
            for weight, candidate in zip(weights, candidates, strict=True)
        ]

    return _by_knob(candidates, budget, cost, grid, skip, ranks)


def _by_knob(
    candidates: Sequence[Candidate], budget: float, cost: Cost, grid: int, skip: bool,
    ranks: Callable[[float], list[int]],
) -> Plan:
    """The plan of the largest share in [0, 1] that the budget allows; ranks(share) must not fall."""

    def plan(share: float) -> tuple[float, Plan]:
        owners: list[PlannedOwner] = []
        dense: dict[str, str] = {}
        total = 0.0
        for candidate, wanted in zip(candidates, ranks(share), strict=True):
            rank = max(grid, wanted)
            largest = min(candidate.m, candidate.n - 1 if skip else candidate.n)
            whole = cost(candidate.members, None, False)
            if rank > largest or cost(candidate.members, rank, skip) >= whole:
                total += whole
                dense.update({layer.tensor: "worth more than it costs" for layer in candidate.members})
            else:
                total += cost(candidate.members, rank, skip)
                owners.append(PlannedOwner(candidate.members, rank, skip))
        return total, Plan(owners, dense)

    total, best = plan(0.0)
    if total > budget:
        raise UserError(f"The lowest ranks on the grid of {grid} cost more than the budget allows; raise it.")
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        total, found = plan(middle)
        if total <= budget:
            low, best = middle, found
        else:
            high = middle
    return best


def candidates_of(groups: Sequence[tuple[Layer, ...]], share: bool | None) -> Iterator[list[list[tuple[Layer, ...]]]]:
    """The alternatives of each group: shared, not shared, or both."""
    for group in groups:
        alone = [(layer,) for layer in group]
        together = [group]
        if len(group) == 1 or share is False:
            yield [alone]
        else:
            yield [together] if share else [together, alone]
