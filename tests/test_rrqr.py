"""Skip sets: the identity holds, T is bounded, and it depends on the row space alone."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the converter needs torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from skipcat_converter import rrqr  # noqa: E402
from skipcat_converter.rrqr import choose_skip_set  # noqa: E402
from threadpoolctl import threadpool_info, threadpool_limits  # noqa: E402


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**16), st.sampled_from([1.05, 1.5, 3.0]))
def test_factors_multiply_back(r: int, rest: int, seed: int, bound: float) -> None:
    A = np.random.default_rng(seed).standard_normal((r, r + rest))
    chosen = choose_skip_set(torch.from_numpy(A), bound)
    S, R, T = chosen.skip.numpy(), chosen.rest.numpy(), chosen.T.numpy()
    assert sorted([*S, *R]) == list(range(r + rest))
    assert list(S) == sorted(S)
    assert list(R) == sorted(R)
    np.testing.assert_allclose(A[:, R], A[:, S] @ T, atol=1e-9 * np.linalg.cond(A[:, S]))
    assert np.abs(T).max() <= bound * (1 + 1e-9)


def kahan(n: int, theta: float = 1.2) -> np.ndarray:
    """Kahan's matrix: column-pivoted QR alone leaves its columns in place."""
    c, s = np.cos(theta), np.sin(theta)
    return np.diag(s ** np.arange(n)) @ (np.eye(n) - c * np.triu(np.ones((n, n)), 1))


def test_bound_holds_where_pivoting_alone_does_not() -> None:
    # rows scaled apart by 10^8, and a nearly dependent leading block
    A = np.concatenate([1e-8 * kahan(24), kahan(24)], axis=1)[:, np.random.default_rng(0).permutation(48)]
    chosen = choose_skip_set(torch.from_numpy(A), 1.5)
    assert float(chosen.T.abs().max()) <= 1.5 * (1 + 1e-9)


def test_basis_of_the_row_space_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    A, mix = rng.standard_normal((6, 15)), rng.standard_normal((6, 6))
    first, second = choose_skip_set(torch.from_numpy(A)), choose_skip_set(torch.from_numpy(mix @ A))
    assert first.skip.tolist() == second.skip.tolist()
    np.testing.assert_allclose(first.T.numpy(), second.T.numpy(), atol=1e-8)


@pytest.mark.parametrize("shape", [(4, 4), (5, 4)])
def test_needs_more_columns_than_rows(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 < r < n"):
        choose_skip_set(torch.ones(shape))


def test_small_matrices_have_one_thread_of_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    seen = []
    usual = rrqr.lapack.dgeqp3
    monkeypatch.setattr(rrqr.lapack, "dgeqp3", lambda *a, **k: (seen.append(threads()), usual(*a, **k))[1])
    A = torch.from_numpy(np.random.default_rng(2).standard_normal((20, 50)))
    with threadpool_limits(2, "blas"):
        choose_skip_set(A)
        monkeypatch.setattr(rrqr, "_ONE_THREAD", A.numel() - 1)
        choose_skip_set(A)
        assert seen == [{1}, {2}] and threads() == {2}
