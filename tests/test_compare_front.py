"""Fronts against brute force, and labels that never cover anything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from skipcat_edge.compare.front import pareto_front
from skipcat_edge.compare.labels import Box, crosses, place

# few values, so that many points are equal in one coordinate or both
COORDINATE = st.integers(0, 6).map(float)
POINTS = st.lists(st.tuples(COORDINATE, COORDINATE), max_size=12)


@given(POINTS)
def test_the_front_is_what_no_point_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(x <= point[0] and y <= point[1] and (x, y) != point for x, y in points)

    front = pareto_front(points)
    assert sorted(front) == [index for index, point in enumerate(points) if not beaten(point)]
    assert [points[index] for index in front] == sorted(points[index] for index in front)


@given(
    st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300)), max_size=14),
    st.floats(10, 90), st.floats(5, 20),
)
def test_placed_labels_cover_nothing(anchors: list[tuple[float, float]], width: float, height: float) -> None:
    frame = Box(-20, -20, 420, 320)
    points = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in anchors]
    placed = place(anchors, [(width, height)] * len(anchors), points, frame)
    found = [box for box in placed if box is not None]
    for index, box in enumerate(found):
        assert box.inside(frame)
        assert not any(box.overlaps(other) for other in [*found[:index], *points])


def test_labels_have_places_where_there_is_room() -> None:
    anchors = [(200.0, 150.0), (201.0, 151.0), (199.0, 150.5), (200.5, 149.0), (200.0, 152.0)]
    points = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in anchors]
    assert None not in place(anchors, [(60, 14)] * 5, points, Box(0, 0, 400, 300))
    assert place([(200, 150)], [(500, 14)], [], Box(0, 0, 400, 300)) == [None]


def test_segments_that_cross_a_box() -> None:
    box = Box(0, 0, 2, 1)
    assert crosses((-1, 0.5, 3, 0.5), box)
    assert crosses((1, 0.5, 1, 0.6), box)
    assert crosses((-1, -1, 1, 0.9), box)
    assert not crosses((-1, 2, 3, 2), box)
    assert not crosses((-1, 0.5, -0.1, 0.5), box)
    assert not crosses((-1, 0, 1, 3), box)
