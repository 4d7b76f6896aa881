"""Which projection gets which rank and form: one multiplier over all groups.

Minimises the predicted loss of all groups subject to a budget of parameters or bytes: for a
multiplier every group takes the choice with the least loss + multiplier * cost, and the multiplier
is found by bisection. What the grid of ranks leaves over is given to the steps that gain most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from skipcat_edge.errors import UserError

from .candidates import Candidate, Form
from .layers import Layer
from .plan import WORTH_MORE, Plan, PlannedOwner

Cost = Callable[[Sequence[Layer], int, Form], float]
"""Of layers that share a projection: cost(members, rank, form)."""

Groups = Sequence[Sequence[Sequence[Candidate]]]
"""For each group of layers its alternatives, each a list of candidates that hold all its layers."""

_BISECTIONS = 200


class BudgetError(UserError):
    """The budget is below the lowest cost that there is."""

    def __init__(self, least: float, budget: float) -> None:
        super().__init__(f"The lowest ranks already cost {least:,.0f}, but the budget is {budget:,.0f}.")
        self.least = least


@dataclass(frozen=True)
class _Options:
    """What one candidate can become; the first option is to stay dense."""

    candidate: Candidate
    ranks: np.ndarray
    forms: tuple[Form, ...]
    costs: np.ndarray
    losses: np.ndarray
    """Weighed."""


def allocate(
    groups: Groups, budget: float, cost: Cost, grid: int, skip: bool | None = None, caution: float = 0.0
) -> Plan:
    """The ranks of least predicted loss whose cost is at most `budget`.

    `skip` None: decided by loss and cost. `caution`: see `Candidate.weighed`. Raises BudgetError if even the
    lowest ranks cost more.
    """
    tables = _tables(groups, cost, grid, skip, caution)
    chosen = _at_multiplier(tables, float("inf"))
    if _total(chosen) > budget:
        raise BudgetError(_total(chosen), budget)
    low, high = 1e-30, 1e30
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        trial = _at_multiplier(tables, middle)
        if _total(trial) <= budget:
            high, chosen = middle, trial
        else:
            low = middle
    return _plan(_filled(chosen, budget))


def least_cost(groups: Groups, cost: Cost, grid: int, skip: bool | None = None) -> float:
    """The lowest budget that `allocate` takes."""
    return _total(_at_multiplier(_tables(groups, cost, grid, skip, 0.0), float("inf")))


def _tables(
    groups: Groups, cost: Cost, grid: int, skip: bool | None, caution: float
) -> list[list[list[_Options]]]:
    return [
        [[_options(candidate, cost, grid, skip, caution) for candidate in alternative]
         for alternative in group]
        for group in groups
    ]


def _options(candidate: Candidate, cost: Cost, grid: int, skip: bool | None, caution: float) -> _Options:
    m, n = candidate.m, candidate.n
    dense_cost = cost(candidate.members, 0, None)
    ranks, costs = [0], [dense_cost]
    forms: list[Form] = [None]
    losses = [float(candidate.weighed(np.zeros(1, int), None, caution)[0])]
    for form in (False, True) if skip is None else (skip,):
        tried = np.arange(grid, min(m, n - 1 if form else n) + 1, grid)
        prices = np.array([cost(candidate.members, int(rank), form) for rank in tried])
        saves = prices < dense_cost
        ranks += tried[saves].tolist()
        forms += [form] * int(saves.sum())
        costs += prices[saves].tolist()
        losses += candidate.weighed(tried[saves], form, caution).tolist()
    return _Options(candidate, np.array(ranks), tuple(forms), np.array(costs), np.array(losses))


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
    loss = weighed = 0.0
    for options, pick in chosen:
        members, form = options.candidate.members, options.forms[pick]
        loss += float(options.candidate.losses(options.ranks[pick : pick + 1], form)[0])
        weighed += float(options.losses[pick])
        if form is None:
            dense.update({layer.tensor: WORTH_MORE for layer in members})
        else:
            owners.append(PlannedOwner(members, int(options.ranks[pick]), form))
    return Plan(owners, dense, loss, weighed)
