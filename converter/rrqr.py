"""Skip: choose inputs whose block of a projection becomes the identity.

For A: [r, n] and a set S of r columns, A = A_S [I | T] P with T = A_S^-1 A_R. T depends on
the row space of A and on S alone. Strong rank-revealing QR (Gu and Eisenstat 1996) finds an
S with every |T_ij| <= f; without pivoting T grows without bound and low precision ruins the
model (SkipCat, arXiv 2512.13494, reports a perplexity of 31,628 in BF16).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.linalg import lapack
from threadpoolctl import ThreadpoolController

DEFAULT_BOUND = 1.5
_BLOCK = 32  # columns that LAPACK updates at once, given the memory
# Below this many numbers OpenBLAS's threads wait for each other longer than they compute.
_ONE_THREAD = 2**21


@dataclass(frozen=True)
class SkipSet:
    """S and R with A = A_S [I | T]."""

    skip: torch.Tensor
    """Inputs in S, ascending: int64 [r]."""
    rest: torch.Tensor
    """All other inputs, ascending: int64 [n - r]."""
    T: torch.Tensor
    """A_S^-1 A_R: [r, n - r]."""


def choose_skip_set(A: torch.Tensor, bound: float = DEFAULT_BOUND) -> SkipSet:
    """Strong rank-revealing QR of A: [r, n], r < n, in float64.

    Column-pivoted QR gives the first S; then the largest |T_ij| is swapped into S until none
    exceeds `bound`. A swap multiplies |det A_S| by |T_ij| > bound > 1, so this ends. Where A has
    dependent rows, directions of no consequence complete its row space. Raises ValueError where
    A is not finite.
    """
    r, n = A.shape
    if not 0 < r < n:
        raise ValueError(f"expected 0 < r < n, got r = {r}, n = {n}")
    if bound <= 1:
        raise ValueError(f"expected a bound above 1, got {bound}")
    # T does not change with the basis of the row space; an orthonormal one is safest to pivot in.
    if not bool(torch.isfinite(A).all()):
        raise ValueError("the projection holds numbers that are not finite")
    Q = torch.linalg.qr(A.T.double(), mode="reduced").Q.T
    order = _pivots(Q)
    T = torch.linalg.solve(Q[:, order[:r]], Q[:, order[r:]])
    while True:
        row, column = divmod(int(T.abs().argmax()), n - r)
        if not abs(float(T[row, column])) > bound:
            break
        _exchange(T, row, column)
        order[[row, r + column]] = order[[r + column, row]]
    skip, rest = order[:r].sort().values, order[r:].sort().values
    del T
    # Solved afresh: the exchanges' rounding errors end here.
    return SkipSet(skip, rest, torch.linalg.solve(Q[:, skip], Q[:, rest]))


def _pivots(Q: torch.Tensor) -> torch.Tensor:
    """Columns of Q: [r, n] in the order of LAPACK's column-pivoted QR: int64 [n]."""
    n = Q.shape[1]
    with _one_blas_thread() if Q.numel() <= _ONE_THREAD else nullcontext():
        # the least workspace, SciPy's default, makes LAPACK go column by column
        _, pivots, _, _, info = lapack.dgeqp3(Q.cpu().numpy(), lwork=2 * n + (n + 1) * _BLOCK)
    assert info == 0, info
    return torch.from_numpy(pivots.astype("int64") - 1).to(Q.device)


def _one_blas_thread() -> AbstractContextManager[object]:
    limited: AbstractContextManager[object] = _blas().limit(limits=1)
    return limited


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    """NumPy's and SciPy's BLAS; to look for them takes longer than a small matrix."""
    return ThreadpoolController().select(user_api="blas")


def _exchange(T: torch.Tensor, row: int, column: int) -> None:
    """Swap skip input `row` with rest input `column`: a Gauss-Jordan exchange of T in place."""
    pivot = T[row, column].clone()
    pivot_row = T[row] / pivot
    pivot_column = T[:, column].clone()
    T.sub_(torch.outer(pivot_column, pivot_row))
    T[:, column] = -pivot_column / pivot
    T[row] = pivot_row
    T[row, column] = 1 / pivot
