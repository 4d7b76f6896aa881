"""Places for the labels of points: none covers another label or a point, none leaves the frame.

Libraries that push labels apart stop when their time is up and promise neither; here a label without a
free place is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_REACHES = (6.0, 11.0, 18.0, 27.0, 38.0, 52.0, 70.0, 92.0, 118.0, 150.0, 190.0, 240.0)  # of `scale`
_DIRECTIONS = 24
# In the unit of a reach: what crossing costs, so that a clear place further off may be better.
_LEADER_OVER_LABEL, _LEADER_OVER_POINT, _LEADER_OVER_LEADER, _ON_LINE = 150.0, 60.0, 40.0, 14.0


@dataclass(frozen=True)
class Box:
    """Its lower left and upper right corner."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlaps(self, other: Box) -> bool:
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1

    def inside(self, other: Box) -> bool:
        return other.x0 <= self.x0 and self.x1 <= other.x1 and other.y0 <= self.y0 and self.y1 <= other.y1

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to (x, y)."""
        return min(max(x, self.x0), self.x1), min(max(y, self.y0), self.y1)


Segment = tuple[float, float, float, float]
"""x and y of both ends."""


def crosses(segment: Segment, box: Box) -> bool:
    """Whether a part of `segment` lies within `box` (Liang and Barsky's clipping)."""
    x0, y0, x1, y1 = segment
    first, last = 0.0, 1.0
    for step, low, high in ((x1 - x0, box.x0 - x0, box.x1 - x0), (y1 - y0, box.y0 - y0, box.y1 - y0)):
        if step == 0:
            if low > 0 or high < 0:
                return False
            continue
        near, far = sorted((low / step, high / step))
        first, last = max(first, near), min(last, far)
    return first < last


def place(anchors: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]],
          obstacles: Sequence[Box], frame: Box, lines: Sequence[Segment] = (),
          scale: float = 1.0) -> list[Box | None]:
    """A box for each label of `sizes` (width, height) at `anchors`, or None where there is no room.

    Earlier labels choose first. `obstacles` must not be covered, a place on `lines` is a bad one, and so is
    one whose leader, from the anchor to the box, crosses what is there. `scale`: pixels in a point.
    """
    placed: list[Box | None] = []
    leaders: list[Segment] = []
    for (x, y), size in zip(anchors, sizes, strict=True):
        taken = [*obstacles, *(box for box in placed if box is not None)]
        best: tuple[float, Box, Segment] | None = None
        for reach in _REACHES:
            if best is not None and best[0] <= reach:
                break
            for number in range(_DIRECTIONS):
                angle = 2 * math.pi * number / _DIRECTIONS
                box = _box_at(x, y, size, reach * scale, angle)
                if not box.inside(frame) or any(box.overlaps(other) for other in taken):
                    continue
                leader = (x, y, *box.nearest(x, y))
                crossed = sum(crosses(leader, other) for other in placed if other is not None)
                crossed += sum(crosses(other, box) for other in leaders)
                cost = (reach + _preference(angle) + _LEADER_OVER_LABEL * crossed
                        + _LEADER_OVER_POINT * sum(_over(leader, point, x, y) for point in obstacles)
                        + _LEADER_OVER_LEADER * sum(_meet(leader, other) for other in leaders)
                        + _ON_LINE * any(crosses(line, box) for line in lines))
                if best is None or cost < best[0]:
                    best = cost, box, leader
        placed.append(None if best is None else best[1])
        if best is not None:
            leaders.append(best[2])
    return placed


def _box_at(x: float, y: float, size: tuple[float, float], reach: float, angle: float) -> Box:
    """Beside (x, y): its edge, not its middle, is `reach` away."""
    cos, sin = math.cos(angle), math.sin(angle)
    stretch = max(abs(cos), abs(sin))
    middle_x = x + cos * reach + cos / stretch * size[0] / 2
    middle_y = y + sin * reach + sin / stretch * size[1] / 2
    half_width, half_height = size[0] / 2, size[1] / 2
    return Box(middle_x - half_width, middle_y - half_height, middle_x + half_width, middle_y + half_height)


def _preference(angle: float) -> float:
    """To the right is read best, then to the left, then above and below."""
    return 2.0 - 1.5 * math.cos(angle) ** 2 - 0.5 * math.cos(angle)


def _over(leader: Segment, point: Box, x: float, y: float) -> bool:
    """Whether the leader of (x, y) crosses another point."""
    return not (point.x0 <= x <= point.x1 and point.y0 <= y <= point.y1) and crosses(leader, point)


def _meet(one: Segment, other: Segment) -> bool:
    def side(line: Segment, x: float, y: float) -> float:
        return (line[2] - line[0]) * (y - line[1]) - (line[3] - line[1]) * (x - line[0])

    return (side(one, *other[:2]) * side(one, *other[2:]) < 0
            and side(other, *one[:2]) * side(other, *one[2:]) < 0)
