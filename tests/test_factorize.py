"""Low-rank factors against NumPy's SVD in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the converter needs torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from skipcat_converter.factorize import (  # noqa: E402
    DAMPING,
    METHODS,
    Factors,
    decompose,
    refit,
    squared_singular_values,
    whiten,
)
from skipcat_converter.factorize import factorize as factorize_decomposed  # noqa: E402


def problem(m: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """W: [m, n] and H: [n, n] with a spread of input scales."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((3 * n, n)) * np.logspace(0, -2, n)
    return rng.standard_normal((m, n)), X.T @ X / len(X)


def factorize(
    W: torch.Tensor, H: torch.Tensor | None, rank: int, skip: bool, C: torch.Tensor | None = None
) -> Factors:
    L = None if H is None else whiten(H).L
    return factorize_decomposed(W, decompose(W if C is None else C, L), rank, skip)


def damped(H: np.ndarray) -> np.ndarray:
    return H + DAMPING * np.diag(H).mean() * np.eye(len(H))


def best_error(W: np.ndarray, H: np.ndarray, rank: int) -> float:
    """Eckart-Young: the squared singular values of W L beyond `rank`."""
    sigma = np.linalg.svd(W @ np.linalg.cholesky(damped(H)), compute_uv=False)
    return float((sigma[rank:] ** 2).sum())


def error(W: np.ndarray, W_low: np.ndarray, H: np.ndarray) -> float:
    D = W - W_low
    return float(np.trace(D @ damped(H) @ D.T))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 999), st.booleans())
def test_no_factors_of_that_rank_are_better(m: int, n: int, seed: int, skip: bool) -> None:
    W, H = problem(m, n, seed)
    rank = max(1, min(m, n - 1) // 2)
    factors = factorize(torch.from_numpy(W), torch.from_numpy(H), rank, skip)
    W_low = (factors.B @ factors.projection(n)).numpy()
    best, total = best_error(W, H, rank), error(W, np.zeros_like(W), H)
    assert error(W, W_low, H) == pytest.approx(best, rel=1e-6, abs=1e-9 * total)
    assert factors.error == pytest.approx(best / total, rel=1e-6, abs=1e-9)
    assert factors.T.shape == (rank, n - rank if skip else n)


def test_plain_svd_ignores_the_inputs() -> None:
    W, _ = problem(9, 14, 0)
    factors = factorize(torch.from_numpy(W), None, 4, skip=False)
    U, sigma, Vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose((factors.B @ factors.T).numpy(), U[:, :4] * sigma[:4] @ Vt[:4], atol=1e-10)


def test_skip_loses_nothing_beyond_the_rank() -> None:
    W, H = problem(12, 16, 3)
    dense = factorize(torch.from_numpy(W), torch.from_numpy(H), 7, skip=False)
    skipped = factorize(torch.from_numpy(W), torch.from_numpy(H), 7, skip=True)
    np.testing.assert_allclose(
        (dense.B @ dense.projection(16)).numpy(), (skipped.B @ skipped.projection(16)).numpy(), atol=1e-9
    )


def test_cholesky_of_a_singular_matrix() -> None:
    x = np.arange(6.0)[:, None]
    L = whiten(torch.from_numpy(x @ x.T)).L.numpy()
    np.testing.assert_allclose(L @ L.T, damped(x @ x.T), atol=1e-9)


def test_inputs_that_were_never_seen() -> None:
    W, _ = problem(5, 8, 4)
    factors = factorize(torch.from_numpy(W), torch.zeros(8, 8, dtype=torch.float64), 3, skip=True)
    assert bool(torch.isfinite(factors.B).all())


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 16), st.integers(3, 16), st.integers(0, 999), st.booleans())
def test_two_sided_factors_are_the_best_in_the_loss(m: int, n: int, seed: int, skip: bool) -> None:
    W, H = problem(m, n, seed)
    rng = np.random.default_rng(seed + 1)
    g = rng.standard_normal((4 * m, m)) * np.logspace(0, -1, m)
    G = g.T @ g / len(g)
    values, vectors = np.linalg.eigh(G)
    C = (vectors * np.sqrt(values)) @ vectors.T @ W
    rank = max(1, min(m, n - 1) // 2)
    factors = factorize(torch.from_numpy(W), torch.from_numpy(H), rank, skip, torch.from_numpy(C))
    E = W - (factors.B @ factors.projection(n)).numpy()
    best = (np.linalg.svd(C @ np.linalg.cholesky(damped(H)), compute_uv=False)[rank:] ** 2).sum()
    total = np.trace(G @ W @ damped(H) @ W.T)
    assert np.trace(G @ E @ damped(H) @ E.T) == pytest.approx(best, rel=1e-6, abs=1e-9 * total)


def test_the_spectrum_is_the_decompositions() -> None:
    for m, n in ((9, 14), (14, 9)):
        W, H = problem(m, n, 5)
        L = whiten(torch.from_numpy(H)).L
        sigma = np.linalg.svd(W @ L.numpy(), compute_uv=False)
        for values in (decompose(torch.from_numpy(W), L).values,
                       squared_singular_values(torch.from_numpy(W), L)):
            np.testing.assert_allclose(values.numpy(), sigma**2, rtol=1e-8, atol=1e-12)


def test_without_skip_z_has_unit_second_moments() -> None:
    for m, n in ((9, 14), (14, 9)):
        W, H = problem(m, n, 6)
        A = factorize(torch.from_numpy(W), torch.from_numpy(H), 5, skip=False).T.numpy()
        np.testing.assert_allclose(A @ damped(H) @ A.T, np.eye(5), atol=1e-8)


def test_refit_is_the_least_squares_fit() -> None:
    W, H = problem(7, 12, 7)
    A = np.random.default_rng(0).standard_normal((4, 12))
    L = np.linalg.cholesky(damped(H))
    expected = np.linalg.lstsq((A @ L).T, (W @ L).T, rcond=None)[0].T
    found = refit(torch.from_numpy(W), torch.from_numpy(A), torch.from_numpy(L)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-9)
    A[3] = A[0]  # dependent rows: any solution will do, but it must be one
    found = refit(torch.from_numpy(W), torch.from_numpy(A), torch.from_numpy(L)).numpy()
    expected = np.linalg.lstsq((A @ L).T, (W @ L).T, rcond=None)[0].T
    np.testing.assert_allclose(found @ A, expected @ A, atol=1e-8)


def test_singular_moments_are_damped_more_and_say_so() -> None:
    H = np.diag([1.0, 1.0, -1e-2])  # rounding can make it indefinite
    whitening = whiten(torch.from_numpy(H))
    assert whitening.damping > DAMPING
    assert bool(torch.isfinite(whitening.L).all())


def test_methods_are_the_parts_of_skipcat() -> None:
    parts = {name: (method.whiten, method.share, method.skip) for name, method in METHODS.items()}
    assert parts == {
        "skipcat": (True, True, True), "skip": (True, False, True), "cat": (True, True, False),
        "svd-llm": (True, False, False), "svd": (False, False, False), "auto": (True, None, None),
    }  # fmt: skip
    assert [name for name, method in METHODS.items() if method.two_sided] == ["auto"]
