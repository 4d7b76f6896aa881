"""Low-rank factors of one projection: whitened SVD on one side or both, Cat and Skip.

W: [m, n] is one layer's weight, or the stacked weights of a group (Cat, SkipCat section 3).
H: [n, n] = E[x x^T] of its input, G: [m, m] = E[g g^T] of the gradient at its output. With
L L^T = H the best rank-r factors under tr(G (W - B A) H (W - B A)^T) are the truncated SVD of
G^1/2 W L (one-sided, G = I: SVD-LLM, arXiv 2403.07378).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from skipcat_edge.errors import UserError

from .rrqr import choose_skip_set
from .symmetric import cholesky_, with_diagonal

# Relative to the mean of H's diagonal: makes directions that the calibration text never
# excited positive definite without moving the others.
DAMPING = 1e-4


@dataclass(frozen=True)
class Method:
    """What a named method does; None: decided per group, by the smaller predicted error."""

    name: str
    whiten: bool
    two_sided: bool
    share: bool | None
    """Cat: one projection for all layers that read the same input."""
    skip: bool | None
    allocation: str
    """How ranks are chosen unless the user says: one of planning.ALLOCATIONS."""
    compensate: bool = False
    """Later layers make up for what earlier ones lost."""


METHODS = {
    method.name: method
    for method in (
        Method("auto", True, True, None, None, "loss", compensate=True),
        Method("skipcat", True, False, True, True, "uniform"),
        Method("skip", True, False, False, True, "uniform"),
        Method("cat", True, False, True, False, "uniform"),
        Method("svd-llm", True, False, False, False, "uniform"),
        Method("svd", False, False, False, False, "uniform"),
    )
}


@dataclass(frozen=True)
class Factors:
    """W x ~ B z with z = x[skip] + T x[rest]; z = T x where `skip` is None (T is A then)."""

    T: torch.Tensor
    """[r, n - r], or A: [r, n] without Skip."""
    fit: Callable[[], torch.Tensor]
    """What makes B."""
    skip: torch.Tensor | None
    """Inputs in the skip set, ascending: int64 [r]."""
    error: float
    """Predicted loss over the loss of W = 0, both in the metric that was minimised."""

    @cached_property
    def B(self) -> torch.Tensor:  # noqa: N802
        """[m, r]; B' = B A_S with Skip. Fitted when it is asked for: rounding T asks for another."""
        return self.fit()

    @property
    def rank(self) -> int:
        return self.T.shape[0]

    def projection(self, n: int) -> torch.Tensor:
        """A: [r, n] multiplied out."""
        return multiplied_out(self.T, self.skip, n)


def multiplied_out(T: torch.Tensor, skip: torch.Tensor | None, n: int) -> torch.Tensor:
    """A: [r, n] of T: [r, n - r] and the skip set [r]; T itself where `skip` is None."""
    if skip is None:
        return T
    A = T.new_zeros(len(T), n)
    is_skip = torch.zeros(n, dtype=torch.bool, device=T.device)
    is_skip[skip] = True
    A[:, is_skip] = torch.eye(len(T), dtype=A.dtype, device=A.device)
    A[:, ~is_skip] = T
    return A


@dataclass(frozen=True)
class Whitening:
    """L L^T = H + damping * mean(diag H) * I."""

    L: torch.Tensor
    """Lower, [n, n], float64."""
    damping: float
    """DAMPING, or more where H would not be factored with it."""


def whiten(H: torch.Tensor) -> Whitening:
    """The damped Cholesky factor of H: [n, n]; the damping grows tenfold until there is one.

    Raises UserError where H is not finite, or far from positive semidefinite.
    """
    H = H.double()
    if not bool(torch.isfinite(H).all()):
        raise UserError("The second moments of a layer's input are not finite numbers; calibrate again.")
    scale = float(H.diagonal().mean())
    if scale <= 0:
        return Whitening(torch.eye(len(H), dtype=H.dtype, device=H.device), 1.0)
    damping = DAMPING
    # once the damping dominates, only a matrix that is no second moments at all can fail
    while damping < 1e6:
        L = cholesky_(with_diagonal(H, damping * scale))
        if L is not None:
            return Whitening(L, damping)
        damping *= 10
    raise UserError("The second moments of a layer's input are not those of any numbers; calibrate again.")


@dataclass(frozen=True)
class Decomposition:
    """The SVD of C L, from the smaller of its Gram matrices."""

    C: torch.Tensor
    """[k, n], with C^T C = W^T G W."""
    L: torch.Tensor | None
    """[n, n]; None: I."""
    values: torch.Tensor
    """Squared singular values, descending: [min(k, n)]. Dropping one costs its value in loss."""
    vectors: torch.Tensor
    """Left singular vectors [k, k] where k <= n, else right ones [n, n]."""

    def projection(self, rank: int) -> torch.Tensor:
        """A: [rank, n] of the best factors, with A H A^T = I: B's blocks then round with equal weight.

        Left vectors need no inverse of L: Sigma^-1 U^T C is V^T L^-1.
        """
        vectors = self.vectors[:, :rank]
        if len(self.C) <= self.C.shape[1]:
            sigma = self.values[:rank].sqrt()
            # a direction without energy is left as it is
            scale = torch.where(sigma > 1e-7 * sigma[0], sigma, torch.ones_like(sigma))
            return vectors.T @ self.C / scale[:, None]
        if self.L is None:
            return vectors.T
        A: torch.Tensor = torch.linalg.solve_triangular(self.L.T, vectors, upper=True).T
        return A


def decompose(C: torch.Tensor, L: torch.Tensor | None) -> Decomposition:
    """Decompose C L for C: [k, n] and lower L: [n, n], in float64."""
    C = C.double()
    values, vectors = torch.linalg.eigh(_gram(C, L))
    # eigh's values ascend
    return Decomposition(C, L, values.flip(0).clamp(min=0), vectors.flip(1))


def squared_singular_values(C: torch.Tensor, L: torch.Tensor | None) -> torch.Tensor:
    """Decomposition's values alone, in a third of the time."""
    values: torch.Tensor = torch.linalg.eigvalsh(_gram(C.double(), L))
    return values.flip(0).clamp(min=0)


def _gram(C: torch.Tensor, L: torch.Tensor | None) -> torch.Tensor:
    """The smaller Gram matrix of C L."""
    M = C if L is None else C @ L
    return M @ M.T if len(C) <= C.shape[1] else M.T @ M


def factorize(W: torch.Tensor, decomposition: Decomposition, rank: int, skip: bool) -> Factors:
    """Factors of W: [m, n] at `rank`, in float64."""
    T, chosen = decomposition.projection(rank), None
    if skip:
        found = choose_skip_set(T)
        T, chosen = found.T, found.skip
    total = float(decomposition.values.sum())
    error = float(decomposition.values[rank:].sum()) / total if total > 0 else 0.0

    L = decomposition.L  # its vectors should not stay in memory

    def fit() -> torch.Tensor:
        return refit(W, multiplied_out(T, chosen, W.shape[1]), L)

    return Factors(T, fit, chosen, error)


def refit(W: torch.Tensor, A: torch.Tensor, L: torch.Tensor | None) -> torch.Tensor:
    """The best B: [m, r] for a given A: [r, n], W H A^T (A H A^T)^-1 with H = L L^T (None: I).

    It does not depend on G: every row of B is a least-squares fit of its own.
    """
    A = A.double() if L is None else A.double() @ L
    # A^T = Q R: B = W Q R^-T needs no squared condition number
    Q, R = torch.linalg.qr(A.T, mode="reduced")
    scale = R.diagonal().abs()
    inverse = torch.linalg.pinv(A) if bool((scale <= 1e-10 * scale.max()).any()) else None
    del A  # as large as Q, and as the W L that follows
    W = W.double() if L is None else W.double() @ L
    if inverse is not None:
        fallback: torch.Tensor = W @ inverse
        return fallback
    B: torch.Tensor = torch.linalg.solve_triangular(R, (W @ Q).T, upper=True).T
    return B
