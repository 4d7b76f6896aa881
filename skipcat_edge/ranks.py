"""The uniform rank rule: the same ratio for every projection."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from skipcat_edge.errors import UserError
from skipcat_edge.format import MAX_LEVELS, factor_parameters


def check_ratio(ratio: float) -> None:
    """Raise UserError unless `ratio` is in (0, 1]."""
    if not 0 < ratio <= 1:
        raise UserError(f"The ratio is {ratio:g}, but it must be above 0 and at most 1.")


def check_levels(levels: Sequence[float]) -> None:
    """Raise UserError unless `levels` can be the ratios of a file's rank levels."""
    for level in levels:
        check_ratio(level)
    if not 2 <= len(levels) <= MAX_LEVELS or any(low >= high for low, high in pairwise(levels)):
        raise UserError(f"--levels needs 2 to {MAX_LEVELS} rising ratios, for example 0.6,0.8.")
    if levels[-1] == 1:
        raise UserError("The last of --levels is the whole file's ratio and must be below 1.")


def parse_ratios(text: str, option: str = "--ratios") -> list[float]:
    """`1,0.9,0.8` of `option` as numbers, the largest first. Raises UserError for anything else, or out of
    range."""
    try:
        ratios = sorted({float(part) for part in text.split(",")}, reverse=True)
    except ValueError:
        raise UserError(f"{option} is {text!r}; give numbers with commas between them.") from None
    for ratio in ratios:
        check_ratio(ratio)
    return ratios


def uniform_rank(m: int, n: int, ratio: float, skip: bool, grid: int) -> int:
    """The largest rank of a factored W: [m, n] that keeps at most `ratio` of its parameters.

    Ranks are multiples of `grid`, at most min(m, n), and below n with Skip, where T: [r, n - r]
    must not be empty. Returns 0 if not even one grid step fits.
    """
    largest = min(m, n - 1) if skip else min(m, n)
    # Up to `largest` the parameters grow with the rank, so the ranks can be bisected.
    return grid * bisect_right(
        range(grid, largest + 1, grid), ratio * m * n, key=lambda rank: factor_parameters(m, n, rank, skip)
    )
