"""The uniform rank rule against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipcat_edge.ranks import uniform_rank

SIZES = st.integers(1, 400)
RATIOS = st.floats(0.01, 1.0)
GRIDS = st.sampled_from([1, 8, 32, 256])


def brute_force(m: int, n: int, ratio: float, skip: bool, grid: int) -> int:
    """Try every rank, counting the parameters of B': [m, r] and T: [r, n - r] (A: [r, n])."""
    best = 0
    for rank in range(1, min(m, n) + 1):
        columns = n - rank if skip else n
        if rank % grid == 0 and columns > 0 and m * rank + rank * columns <= ratio * (m * n):
            best = rank
    return best


@given(SIZES, SIZES, RATIOS, st.booleans(), GRIDS)
def test_equals_brute_force(m: int, n: int, ratio: float, skip: bool, grid: int) -> None:
    assert uniform_rank(m, n, ratio, skip, grid) == brute_force(m, n, ratio, skip, grid)


@given(SIZES, SIZES, RATIOS, RATIOS, st.booleans(), GRIDS)
def test_grows_with_the_ratio(m: int, n: int, a: float, b: float, skip: bool, grid: int) -> None:
    ranks = [uniform_rank(m, n, ratio, skip, grid) for ratio in sorted((a, b))]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize(
    ("m", "n", "ratio", "skip", "grid", "expected"),
    [
        # Llama-3.2-1B's q, k, v: 1312 * 3808 is 0.794 m n; one step more, 1344 * 3776, 0.807.
        (3072, 2048, 0.8, True, 32, 1312),
        (2048, 2048, 1.0, True, 32, 2016),
        (2048, 2048, 1.0, False, 32, 1024),
        (2048, 2048, 0.01, True, 256, 0),
        (64, 64, 0.5, True, 128, 0),
    ],
)
def test_known_ranks(m: int, n: int, ratio: float, skip: bool, grid: int, expected: int) -> None:
    assert uniform_rank(m, n, ratio, skip, grid) == expected
