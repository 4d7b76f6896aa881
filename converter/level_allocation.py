"""Ranks of several levels at once: which factors each level uses, at the least predicted loss.

A layer's factors may grow from level to level, each step with a skip set of its own, or be replaced by
others, for which the file pays but no level reads both. Every level has a budget of its own, and the file
one: no single multiplier decides, so the choice is a linear program over the ways that a group can go
through the levels. Of these there are too many to list; they are generated as the program's prices ask for
them (column generation), each by dynamic programming over levels and ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from scipy.optimize import LinearConstraint, OptimizeResult, linprog, milp

from skipcat_edge.format import Levels

from .allocation import BudgetError, Cost, Groups, allocate, least_cost
from .candidates import Candidate
from .layers import Layer
from .plan import WORTH_MORE, Plan, PlannedOwner

_ROUNDS = 200
# The level that is furthest from its own best decides; the others' mean breaks ties.
_TIE = 0.05
_TOLERANCE = 1e-5
_NEARBY = (0.5, 0.75, 1.3, 2.0)
# A choice in whole numbers is sought among ways whose loss at the program's prices is at most so much more
# than that of the best, as a share of the whole; and among more where it is not near to the program's own.
_SLACK = (0.002, 0.02, np.inf)
_NEAR = 1.02
_NODES, _GAP = 1000, 5e-3


@dataclass(frozen=True)
class LevelBudgets:
    """What each level may read of the linear layers, in a cost's unit, and what the file may hold."""

    levels: tuple[float, ...]
    """Rising."""
    file: float


@dataclass(frozen=True)
class Added:
    """Of factors that a level adds to lower ones."""

    cost: Cost
    noise: float = 0.0
    """What rounding them loses, over what they take away; beyond that of the file's type."""


@dataclass(frozen=True)
class _Stage:
    rank: int
    skip: bool | None
    """None: dense."""
    levels: Levels
    added: bool = False
    """To those of lower levels."""

    def used_at(self, level: int) -> bool:
        return self.levels[0] <= level <= self.levels[1]


@dataclass(frozen=True)
class _Way:
    """How one candidate, or a group of them, goes through the levels."""

    stages: tuple[tuple[Candidate, _Stage], ...]
    read: np.ndarray
    """Cost of what each level reads."""
    stored: float
    losses: np.ndarray
    """Of each level, weighed."""

    def __add__(self, other: _Way) -> _Way:
        return _Way(self.stages + other.stages, self.read + other.read, self.stored + other.stored,
                    self.losses + other.losses)


@dataclass(frozen=True)
class _Prices:
    loss: np.ndarray
    read: np.ndarray
    stored: float

    def of(self, way: _Way) -> float:
        return float(self.loss @ way.losses + self.read @ way.read + self.stored * way.stored)

    def nearby(self) -> Iterator[_Prices]:
        """Each price a little lower and higher than it is."""
        for factor in _NEARBY:
            for level in range(len(self.loss)):
                change = np.where(np.arange(len(self.loss)) == level, factor, 1.0)
                yield _Prices(self.loss * change, self.read, self.stored)
                yield _Prices(self.loss, self.read * change, self.stored)
            yield _Prices(self.loss, self.read, self.stored * factor)


def allocate_levels(
    groups: Groups, budgets: LevelBudgets, cost: Cost, grid: int, skip: bool | None = None,
    caution: float = 0.0, added: Added | None = None,
) -> Plan:
    """The plan whose levels lose least, each measured by what it would lose in a file of its own.

    Minimises the largest of those shares. `skip` None: decided by loss and cost. `caution`: see
    `Candidate.weighed`. `added` None: as any others. Ranks never fall as the level rises. Raises BudgetError
    if even the lowest ranks cost more than the lowest level's budget.
    """
    least = least_cost(groups, cost, grid, skip)
    if least > budgets.levels[0]:
        raise BudgetError(least, budgets.levels[0])
    alone = np.array([allocate(groups, budget, cost, grid, skip, caution).weighed
                      for budget in budgets.levels], dtype=float)
    levels = len(budgets.levels)
    tables = [[[_Table(candidate, cost, added or Added(cost), grid, skip, levels, caution)
                for candidate in alternative] for alternative in group] for group in groups]
    ways = _generate(tables, budgets, np.maximum(alone, 1e-9 * max(alone.max(), 1e-300)))
    return _plan(ways, levels, added.noise if added else 0.0)


_Partial = tuple[float, int, tuple[_Stage, ...]]
"""A way through the first levels: its price, the rank of the last of them, its stages."""


class _Table:
    """What a candidate costs and loses at every rank, in every form."""

    def __init__(self, candidate: Candidate, cost: Cost, added: Added, grid: int, skip: bool | None,
                 levels: int, caution: float) -> None:
        self.candidate, self.levels, self.noise = candidate, levels, added.noise
        m, n = candidate.m, candidate.n
        self.dense_cost = cost(candidate.members, 0, None)
        self.dense_loss = float(candidate.weighed(np.zeros(1, int), None, caution)[0])
        self.ranks: dict[bool, np.ndarray] = {}
        self.costs: dict[bool, np.ndarray] = {}
        """Of going from one rank to another, [from, to]; index 0 is no rank at all."""
        self.more: dict[bool, np.ndarray] = {}
        """Of adding so many ranks to lower ones."""
        self.losses: dict[bool, np.ndarray] = {}
        for form in (False, True) if skip is None else (skip,):
            ranks = np.arange(grid, min(m, n - 1 if form else n) + 1, grid)
            prices = np.array([cost(candidate.members, int(rank), form) for rank in ranks])
            # in the file's type no level would read more than the dense layer
            ranks, prices = ranks[prices < self.dense_cost], prices[prices < self.dense_cost]
            if not len(ranks):
                continue
            more = np.array([0.0, *(added.cost(candidate.members, int(rank), form) for rank in ranks)])
            index = np.arange(len(more))
            up = index[None, :] - index[:, None]
            self.ranks[form] = np.concatenate([[0], ranks])
            self.costs[form] = np.where((up >= 0) & (index[None, :] > 0), more[np.maximum(up, 0)], np.inf)
            self.costs[form][0, 1:] = prices
            self.more[form] = more
            self.losses[form] = np.concatenate([[0.0], candidate.weighed(ranks, form, caution)])

    def cheapest(self) -> _Way:
        """The lowest cost at every level."""
        ways = [self.dense(0)]
        ways += [self._way([_Stage(int(ranks[1]), form, (0, self.levels - 1))])
                 for form, ranks in self.ranks.items()]
        return min(ways, key=lambda way: way.stored)

    def dense(self, first: int, before: Sequence[_Stage] = ()) -> _Way:
        """Dense from the level `first` on."""
        return self._way([*before, _Stage(0, None, (first, self.levels - 1))])

    def best(self, prices: _Prices) -> _Way:
        """The way of the lowest price."""
        # ended[j]: what the levels before j cost, by the rank that the last of them has
        ended: list[list[_Partial]] = [[(0.0, 0, ())]]
        for last in range(1, self.levels + 1):
            found = [each for first in range(last) for form in self.ranks
                     for each in self._segment(ended[first], first, last, form, prices)]
            ended.append(found)
        least = [min(found, key=itemgetter(0))[2] if found else None for found in ended]
        ways = [self._way(least[-1])] if least[-1] else []
        ways += [self.dense(first, before) for first, before in enumerate(least[:-1]) if before is not None]
        return min(ways, key=prices.of)

    def _segment(
        self, before: Sequence[_Partial], first: int, last: int, form: bool, prices: _Prices
    ) -> Iterator[_Partial]:
        """Factors that grow from the level `first` to the one before `last`, where others replace them."""
        ranks, costs, losses = self.ranks[form], self.costs[form], self.losses[form]
        # [from, to]; the first row has nothing to add to
        lost = losses[None, :] + self.noise * np.maximum(losses[:, None] - losses[None, :], 0.0)
        # what comes before, by the least rank that may follow it
        least = np.full(len(ranks), np.inf)
        source = np.zeros(len(ranks), int)
        for number, (value, rank, _) in enumerate(before):
            allowed = (ranks >= rank) & (value < least)
            least[allowed], source[allowed] = value, number
        steps: list[np.ndarray] = []
        values = np.zeros(0)
        for level in range(first, last):
            # never zero: factors that cost nothing would grow for nothing
            price = max(float(prices.read[level:last].sum() + prices.stored), 1e-30)
            whole = price * costs + prices.loss[level] * lost
            if level == first:
                values = whole[0] + least
            else:
                moved = values[:, None] + whole
                steps.append(moved.argmin(0))
                values = moved.min(0)
        for end in np.flatnonzero(np.isfinite(values)):
            stages, index = [], int(end)
            for level in range(last - 1, first, -1):
                origin = int(steps[level - first - 1][index])
                if origin != index:
                    stages.append(_Stage(int(ranks[index] - ranks[origin]), form, (level, last - 1), True))
                index = origin
            stages.append(_Stage(int(ranks[index]), form, (first, last - 1)))
            earlier = before[source[index]][2]
            yield float(values[end]), int(ranks[end]), (*earlier, *reversed(stages))

    def _way(self, stages: Sequence[_Stage]) -> _Way:
        read, losses = np.zeros(self.levels), np.zeros(self.levels)
        for level in range(self.levels):
            used = [stage for stage in stages if stage.used_at(level)]
            form = used[0].skip
            if form is None:
                losses[level] = self.dense_loss
            else:
                below, whole = self.losses[form][np.searchsorted(self.ranks[form], _ranks(used))]
                losses[level] = whole + self.noise * (below - whole)
            read[level] = sum(self._cost(stage) for stage in used)
        stored = sum(self._cost(stage) for stage in stages)
        return _Way(tuple((self.candidate, stage) for stage in stages), read, stored, losses)

    def _cost(self, stage: _Stage) -> float:
        if stage.skip is None:
            return self.dense_cost
        costs = self.more[stage.skip] if stage.added else self.costs[stage.skip][0]
        return float(costs[np.searchsorted(self.ranks[stage.skip], stage.rank)])


def _ranks(used: Sequence[_Stage]) -> tuple[int, int]:
    """Of a level's factors without the latest that were added, and of all of them."""
    rank = sum(stage.rank for stage in used)
    added = [stage for stage in used if stage.added]
    return rank - (max(added, key=lambda stage: stage.levels[0]).rank if added else 0), rank


_Tables = Sequence[Sequence[Sequence[_Table]]]


def _sum(ways: Sequence[_Way]) -> _Way:
    total = ways[0]
    for way in ways[1:]:
        total = total + way
    return total


def _generate(tables: _Tables, budgets: LevelBudgets, alone: np.ndarray) -> list[_Way]:
    """One way for each group."""
    ways: list[_Way] = []
    group_of: list[int] = []
    for number, group in enumerate(tables):
        found = [_sum([table.cheapest() for table in alternative]) for alternative in group]
        found.append(_sum([table.dense(0) for table in group[-1]]))
        ways += found
        group_of += [number] * len(found)
    for _ in range(_ROUNDS):
        prices, worth = _Program(ways, group_of, budgets, alone).prices()
        enough = worth - _TOLERANCE * abs(worth).sum() / len(tables)
        best = [(number, _best(group, prices)) for number, group in enumerate(tables)]
        better = {number: way for number, way in best if prices.of(way) < enough[number]}
        if not better:
            break
        ways += better.values()
        group_of += better
    # at the program's own prices groups may be divided between ways; near them are others that fill the rest
    for near in prices.nearby():
        ways += [_best(group, near) for group in tables]
        group_of += range(len(tables))
    return _Program(ways, group_of, budgets, alone).whole()


def _best(group: Sequence[Sequence[_Table]], prices: _Prices) -> _Way:
    return min((_sum([table.best(prices) for table in alternative]) for alternative in group), key=prices.of)


class _Program:
    """Choose one of every group's `ways`: the linear program, and the same in whole numbers.

    The last variable is the largest share of a level's loss by what it would lose alone.
    """

    def __init__(
        self, ways: Sequence[_Way], group_of: Sequence[int], budgets: LevelBudgets, alone: np.ndarray
    ) -> None:
        self.ways, self.alone = ways, alone
        losses = np.array([way.losses for way in ways]).T / alone[:, None]
        limits = np.array([*budgets.levels, budgets.file])
        costs = np.array([[*way.read, way.stored] for way in ways]).T / limits[:, None]
        self.limits = limits
        levels = len(alone)
        self.goal = np.append(_TIE * losses.mean(0), 1.0)
        self.upper = np.block([[losses, -np.ones((levels, 1))], [costs, np.zeros((levels + 1, 1))]])
        self.bounds = np.concatenate([np.zeros(levels), np.ones(levels + 1)])
        groups = max(group_of) + 1
        self.choice = np.zeros((groups, len(ways) + 1))
        self.choice[group_of, np.arange(len(ways))] = 1.0

    def prices(self) -> tuple[_Prices, np.ndarray]:
        """The program's prices, and what each group's choice is worth at them."""
        found = self._divided()
        levels = len(self.alone)
        marginals = np.maximum(-found.ineqlin.marginals, 0.0)
        loss = (marginals[:levels] + _TIE / levels) / self.alone
        costs = marginals[levels:] / self.limits
        return _Prices(loss, costs[:-1], float(costs[-1])), np.asarray(found.eqlin.marginals)

    def _divided(self) -> OptimizeResult:
        """The linear program's solution, in which groups may be divided between ways."""
        found = linprog(self.goal, A_ub=self.upper, b_ub=self.bounds, A_eq=self.choice,
                        b_eq=np.ones(len(self.choice)), method="highs")
        if found.status != 0:
            raise ValueError(f"the allocation of levels has no solution: {found.message}")
        return found

    def whole(self) -> list[_Way]:
        """The best choice in whole numbers, or nearly."""
        found = self._divided()
        more = found.lower.marginals[:-1]  # what taking a way loses, at the program's prices
        _, different = np.unique(np.vstack([self.upper, self.choice])[:, :-1], axis=1, return_index=True)
        least, chosen = np.inf, None
        for slack in _SLACK:
            # no choice that is better than one that is known has a way that loses more than what is between
            room = min(slack * max(found.fun, 1e-12), least - found.fun + 1e-9)
            few = np.sort(different[more[different] <= room])
            kept = np.append(few, len(self.ways))
            whole = milp(
                self.goal[kept], integrality=np.append(np.ones(len(few)), 0),
                constraints=[LinearConstraint(self.upper[:, kept], -np.inf, self.bounds),
                             LinearConstraint(self.choice[:, kept], 1.0, 1.0)],
                options={"node_limit": _NODES, "mip_rel_gap": _GAP},
            )
            if whole.x is not None and whole.fun < least:
                least, chosen = whole.fun, few[whole.x[:-1] > 0.5]
            if least <= _NEAR * found.fun:
                break
        if chosen is None:
            raise ValueError(f"the allocation of levels has no solution: {whole.message}")
        return [self.ways[i] for i in chosen]


def _plan(ways: Sequence[_Way], levels: int, noise: float) -> Plan:
    owners: list[PlannedOwner] = []
    dense: dict[str, str] = {}
    from_level: dict[str, int] = {}
    for candidate, stage in (each for way in ways for each in way.stages):
        if stage.skip is not None:
            used = None if stage.levels == (0, levels - 1) else stage.levels
            owners.append(PlannedOwner(candidate.members, stage.rank, stage.skip, used, stage.added))
            continue
        for layer in candidate.members:
            if stage.levels[0]:
                from_level[layer.tensor] = stage.levels[0]
            else:
                dense[layer.tensor] = WORTH_MORE
    losses = [_predicted(ways, level, noise) for level in range(levels)]
    return Plan(owners, dense, losses[-1], float(_sum(ways).losses[-1]), tuple(losses), from_level)


def _predicted(ways: Sequence[_Way], level: int, noise: float) -> float:
    """The loss of a level, without caution."""
    used: dict[tuple[Layer, ...], tuple[Candidate, list[_Stage]]] = {}
    for candidate, stage in (each for way in ways for each in way.stages):
        if stage.used_at(level):
            used.setdefault(candidate.members, (candidate, []))[1].append(stage)
    total = 0.0
    for candidate, stages in used.values():
        below, whole = candidate.losses(np.array(_ranks(stages)), stages[0].skip)
        total += float(whole + noise * (below - whole))
    return total
