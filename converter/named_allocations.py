"""Rules for ranks that others use, to compare with `allocation`: uniform, energy, and FLRC's Fisher score.

Each has one knob, and takes its largest setting that the budget allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .allocation import BudgetError, Cost
from .candidates import Candidate
from .plan import WORTH_MORE, Plan, PlannedOwner

_BISECTIONS = 60

Ranks = Callable[[float], list[int]]
"""Ranks of all candidates at a setting of the knob in [0, 1]; none may fall as it rises."""

Rule = Callable[[Sequence[Candidate], int, bool], Ranks]
"""Of candidates, the grid of ranks, and Skip."""


def uniform(candidates: Sequence[Candidate], grid: int, skip: bool) -> Ranks:
    """The same ratio for every projection (the papers' rule)."""
    from skipcat_edge.ranks import uniform_rank

    return lambda share: [uniform_rank(c.m, c.n, share, skip, grid) for c in candidates]


def energy(candidates: Sequence[Candidate], grid: int, skip: bool) -> Ranks:
    """Every projection keeps the same share of its energy, the sum of its squared singular values."""
    kept = [np.cumsum(candidate.spectrum) for candidate in candidates]

    def ranks(share: float) -> list[int]:
        found = [int(np.searchsorted(sums, share * sums[-1])) + 1 for sums in kept]
        return [-(-rank // grid) * grid for rank in found]

    return ranks


def fisher(candidates: Sequence[Candidate], grid: int, skip: bool) -> Ranks:
    """Ranks in proportion to each projection's Fisher score (FLRC, arXiv 2510.09332, section 3).

    The score is the loss of leaving W out, tr(G W H W^T): FLRC's sum of squared products of weights
    and gradients, with the two-sided statistics in their place.
    """
    scores = np.array([candidate.spectrum.sum() for candidate in candidates])
    weights = scores / max(scores.max(), 1e-300)

    def ranks(share: float) -> list[int]:
        # at 1 the lowest score reaches full rank
        scale = share / max(weights.min(), 1e-12)
        return [grid * int(np.ceil(min(1.0, scale * weight) * min(c.m, c.n) / grid))
                for weight, c in zip(weights, candidates, strict=True)]

    return ranks


RULES: dict[str, Rule] = {"uniform": uniform, "energy": energy, "flrc": fisher}


def allocate_by_rule(
    candidates: Sequence[Candidate], rule: Rule, budget: float, cost: Cost, grid: int, skip: bool
) -> Plan:
    """The plan of the largest knob in [0, 1] that the budget allows. Raises BudgetError."""
    ranks = rule(candidates, grid, skip)
    total, best = _plan(candidates, ranks(0.0), cost, grid, skip)
    if total > budget:
        raise BudgetError(total, budget)
    total, whole = _plan(candidates, ranks(1.0), cost, grid, skip)
    if total <= budget:
        return whole
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        # ranks of a Fisher score may need a very small knob
        middle = high / 2 if low == 0 else float(np.sqrt(low * high))
        total, found = _plan(candidates, ranks(middle), cost, grid, skip)
        if total <= budget:
            low, best = middle, found
        else:
            high = middle
    return best


def _plan(
    candidates: Sequence[Candidate], ranks: list[int], cost: Cost, grid: int, skip: bool
) -> tuple[float, Plan]:
    owners: list[PlannedOwner] = []
    dense: dict[str, str] = {}
    total = loss = 0.0
    for candidate, wanted in zip(candidates, ranks, strict=True):
        rank, whole = max(grid, wanted), cost(candidate.members, 0, None)
        largest = min(candidate.m, candidate.n - 1 if skip else candidate.n)
        price = whole if rank > largest else cost(candidate.members, rank, skip)
        if price >= whole:
            total += whole
            loss += float(candidate.losses(np.zeros(1, int), None)[0])
            dense.update({layer.tensor: WORTH_MORE for layer in candidate.members})
        else:
            total += price
            loss += float(candidate.losses(np.array([rank]), skip)[0])
            owners.append(PlannedOwner(candidate.members, rank, skip))
    return total, Plan(owners, dense, loss)
