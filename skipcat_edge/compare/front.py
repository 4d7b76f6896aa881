"""Pareto fronts: which points no other one beats."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y) that no other point beats, by x, then as given.

    Less is better in both. A point is beaten by one that is as good in both and better in one; of equal
    points, therefore, either all or none are on the front.
    """
    order = sorted(range(len(points)), key=lambda index: points[index])
    front: list[int] = []
    for index in order:
        x, y = points[index]
        if not front or y < points[front[-1]][1] or (x, y) == points[front[-1]]:
            front.append(index)
    return front
