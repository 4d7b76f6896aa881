"""Factors of symmetric matrices in the memory of the matrix itself: wide layers have room for no copy."""

from __future__ import annotations

import torch


def with_diagonal(H: torch.Tensor, added: torch.Tensor | float) -> torch.Tensor:
    """H + added * I: [n, n], a copy."""
    copy = H.clone(memory_format=torch.contiguous_format)
    copy.diagonal().add_(added)
    return copy


def cholesky_(H: torch.Tensor, upper: bool = False) -> torch.Tensor | None:
    """L with L L^T = H, or U with U^T U = H, in place of H: [n, n], which is lost; None if there is none."""
    # LAPACK wants columns together; the transpose of a symmetric matrix is itself
    columns = H.mT if H.is_contiguous() else H
    info = torch.empty(0, dtype=torch.int32, device=H.device)
    torch.linalg.cholesky_ex(columns, upper=upper, out=(columns, info))
    return None if int(info) else columns


def inverse_of_cholesky_(L: torch.Tensor) -> torch.Tensor:
    """(L L^T)^-1 in place of L: [n, n], columns together."""
    torch.cholesky_inverse(L, out=L)
    return L


def divided_(B: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """B H^-1 in place of B: [k, n] for a positive definite H: [n, n]; both are lost.

    Raises ValueError where H is not.
    """
    L = cholesky_(H)
    if L is None:
        raise ValueError("the matrix is not positive definite")
    torch.linalg.solve_triangular(L.mT, B, upper=True, left=False, out=B)
    torch.linalg.solve_triangular(L, B, upper=False, left=False, out=B)
    return B
