"""Which group of layers gets which rank: the allocation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from skipcat_edge import format as fmt
from skipcat_edge.ranks import uniform_rank

from .factorize import Method
from .layers import Layer


@dataclass(frozen=True)
class PlannedOwner:
    """A projection to be: the layers that will share it, and its rank."""

    members: tuple[Layer, ...]
    rank: int
    skip: bool
    levels: fmt.Levels | None = None
    """The first and the last level that use it; None: all."""
    added: bool = False
    """It corrects what the factors of lower levels leave, which that level uses too."""

    def used_at(self, level: int) -> bool:
        """Whether the level at this place uses it."""
        return self.levels is None or self.levels[0] <= level <= self.levels[1]

    @property
    def name(self) -> str:
        return fmt.owner_of(layer.member for layer in self.members)

    @property
    def block(self) -> int:
        return self.members[0].index

    @property
    def dense_parameters(self) -> int:
        return sum(self.outputs) * self.members[0].n

    @property
    def parameters(self) -> int:
        return fmt.factor_parameters(sum(self.outputs), self.members[0].n, self.rank, self.skip)

    @property
    def outputs(self) -> tuple[int, ...]:
        return tuple(layer.m for layer in self.members)


# Why a layer stays dense that could be factored.
WORTH_MORE = "worth more than it costs"


@dataclass(frozen=True)
class Plan:
    """Owners by block, and the layers that stay dense with the reason."""

    owners: list[PlannedOwner]
    dense: dict[str, str]
    loss: float | None = None
    """Predicted, in the unit of the statistics; None where nobody predicted it."""
    weighed: float | None = None
    """What the allocation minimised: the loss with its caution."""
    level_losses: tuple[float, ...] = ()
    """The same of each level, where there are levels."""
    dense_from: dict[str, int] = field(default_factory=dict)
    """Layers that are factored at lower levels only -> the first level that uses them dense."""


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """In JSON's types; floats keep all their digits there."""
    return asdict(plan)


def plan_from_json(told: dict[str, Any]) -> Plan:
    """The plan that `plan_to_json` told."""
    owners = [
        PlannedOwner(tuple(Layer(**layer) for layer in owner["members"]), owner["rank"], owner["skip"],
                     owner["levels"] and tuple(owner["levels"]), owner.get("added", False))
        for owner in told["owners"]
    ]
    return Plan(**{**told, "owners": owners, "level_losses": tuple(told["level_losses"])})


def plan_uniform(
    groups: list[tuple[Layer, ...]], method: Method, ratio: float, grid: int
) -> Plan:
    """The same ratio for every projection: the largest rank on the grid that keeps it (the papers' rule)."""
    assert method.skip is not None
    owners: list[PlannedOwner] = []
    dense: dict[str, str] = {}
    for group in groups:
        for members in [group] if method.share else [(layer,) for layer in group]:
            m, n = sum(layer.m for layer in members), members[0].n
            rank = uniform_rank(m, n, ratio, method.skip, grid)
            if rank == 0:
                reason = f"no rank on the grid of {grid} keeps ratio {ratio:g} of {m} x {n}"
                dense.update({layer.tensor: reason for layer in members})
            else:
                owners.append(PlannedOwner(members, rank, method.skip))
    return Plan(owners, dense)
