"""Low-rank factors of one projection: whitened SVD, Cat and Skip.

W: [m, n] is one layer's weight, or the stacked weights of a group (Cat, SkipCat section 3).
H: [n, n] = E[x x^T] of its input. With L L^T = H the best rank-r factors under
E|W x - B A x|^2 are the truncated SVD of W L (SVD-LLM, arXiv 2403.07378).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rrqr import choose_skip_set

# Relative to the mean of H's diagonal: makes directions that the calibration text never
# excited positive definite without moving the others.
DAMPING = 1e-4


@dataclass(frozen=True)
class Method:
    """What a named method does."""

    name: str
    whiten: bool
    share: bool
    """Cat: one projection for all layers that read the same input."""
    skip: bool


METHODS = {
    method.name: method
    for method in (
        Method("skipcat", whiten=True, share=True, skip=True),
        Method("skip", whiten=True, share=False, skip=True),
        Method("cat", whiten=True, share=True, skip=False),
        Method("svd-llm", whiten=True, share=False, skip=False),
        Method("svd", whiten=False, share=False, skip=False),
    )
}


@dataclass(frozen=True)
class Factors:
    """W x ~ B z with z = x[skip] + T x[rest]; z = T x where `skip` is None (T is A then)."""

    T: torch.Tensor
    """[r, n - r], or A: [r, n] without Skip."""
    B: torch.Tensor
    """[m, r]; B' = B A_S with Skip."""
    skip: torch.Tensor | None
    """Inputs in the skip set, ascending: int64 [r]."""
    error: float
    """Predicted E|W x - B z|^2 / E|W x|^2 over the calibration text."""

    @property
    def rank(self) -> int:
        return self.T.shape[0]

    def projection(self, n: int) -> torch.Tensor:
        """A: [r, n] multiplied out."""
        if self.skip is None:
            return self.T
        A = self.T.new_zeros(self.rank, n)
        is_skip = torch.zeros(n, dtype=torch.bool, device=self.T.device)
        is_skip[self.skip] = True
        A[:, is_skip] = torch.eye(self.rank, dtype=A.dtype, device=A.device)
        A[:, ~is_skip] = self.T
        return A


def cholesky(H: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Lower L: [n, n] with L L^T = H + damping * mean(diag H) * I, in float64.

    The damping grows tenfold until the factorisation succeeds.
    """
    H = H.double()
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    scale = float(H.diagonal().mean())
    if scale == 0:
        return eye
    while True:
        L, info = torch.linalg.cholesky_ex(H + damping * scale * eye)
        if int(info) == 0:
            lower: torch.Tensor = L
            return lower
        damping *= 10


def truncated_svd(
    W: torch.Tensor, L: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Best rank-`rank` factors of W: [m, n] under |(W - B A) L|_F: (B: [m, r], A: [r, n], error).

    The error is |(W - B A) L|^2 / |W L|^2. Only the smaller Gram matrix of M = W L is decomposed.
    With M's left singular vectors U, B = U and A = U^T W need no inverse of L; with its right ones
    V, B = M V and A = V^T L^-1.
    """
    m, n = W.shape
    M = W if L is None else W @ L
    G = M @ M.T if m <= n else M.T @ M
    vectors, kept = _leading_eigenvectors(G, rank)
    total = float(G.trace())
    error = max(0.0, 1 - kept / total) if total > 0 else 0.0
    if m <= n:
        return vectors, vectors.T @ W, error
    A = vectors.T if L is None else torch.linalg.solve_triangular(L.T, vectors, upper=True).T
    return M @ vectors, A, error


def _leading_eigenvectors(G: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """Eigenvectors of the `rank` largest eigenvalues: [n, rank], and the sum of these values."""
    values, vectors = torch.linalg.eigh(G)
    # eigh's values ascend
    return vectors[:, -rank:].flip(1), float(values[-rank:].sum())


def factorize(W: torch.Tensor, H: torch.Tensor | None, rank: int, skip: bool) -> Factors:
    """Factors of W: [m, n] at `rank`, whitened by H: [n, n] (None: plain SVD), in float64."""
    W = W.double()
    B, A, error = truncated_svd(W, None if H is None else cholesky(H), rank)
    if not skip:
        return Factors(A, B, None, error)
    chosen = choose_skip_set(A)
    return Factors(chosen.T, B @ A[:, chosen.skip], chosen.skip, error)
