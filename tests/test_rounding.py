"""Rounding with error feedback, by what it does to the outputs for correlated inputs, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

torch = pytest.importorskip("torch", reason="the converter needs torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from skipcat_converter import factorize as fact  # noqa: E402
from skipcat_converter.block_types import BLOCK_TYPES  # noqa: E402
from skipcat_converter.factorize import Factors, decompose, factorize, whiten  # noqa: E402
from skipcat_converter.quantized import (  # noqa: E402
    QuantizedFactors,
    Rounding,
    quantize_factors,
    quantize_matrix,
)
from skipcat_converter.rounding import DAMPING, SWEEPS, round_with_feedback, supports_feedback  # noqa: E402

from skipcat_edge.errors import UserError  # noqa: E402

Type = GGMLQuantizationType
SIMPLE = ("Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# K-quants take ggml's search of scales, so need the runtime
all_types = pytest.mark.parametrize(
    "name", [*SIMPLE, *(pytest.param(name, marks=pytest.mark.runtime) for name in K_QUANTS)])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def correlated(n: int, seed: int = 0) -> np.ndarray:
    """Second moments of inputs with a few common causes and different scales."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((max(1, n // 8), n))
    X = rng.standard_normal((4 * n, len(causes))) @ causes / 8 + 0.3 * rng.standard_normal((4 * n, n))
    X *= np.exp(0.5 * rng.standard_normal(n))
    return X.T @ X / len(X)


def weights(m: int, n: int, seed: int = 0) -> np.ndarray:
    return (0.05 * np.random.default_rng(seed + 100).standard_normal((m, n))).astype(np.float32)


def damped(H: np.ndarray, amount: float = DAMPING) -> np.ndarray:
    return H + amount * np.diag(H).mean() * np.eye(len(H))


def loss(W: np.ndarray, Q: np.ndarray, H: np.ndarray) -> float:
    E = W.astype(np.float64) - Q.astype(np.float64)
    return float(((E @ H) * E).sum())


def rounded(W: np.ndarray, H: np.ndarray, name: str, sweeps: int = SWEEPS) -> np.ndarray:
    """What ggml will read, float64; checks that each code is one that ggml can write."""
    kind = BLOCK_TYPES[Type[name]]
    data = round_with_feedback(torch.from_numpy(W), torch.from_numpy(H), kind.type, sweeps)
    assert data.dtype == np.uint8
    assert data.shape == (len(W), W.shape[1] // kind.block * kind.block_bytes)
    codes = kind.codes(data)
    assert kind.low <= codes.min()
    assert codes.max() <= kind.high
    Q = dequantize(data, kind.type).astype(np.float64)
    assert np.isfinite(Q).all()
    return Q


def plain(W: np.ndarray, name: str) -> np.ndarray:
    from skipcat_edge.runtime.library import quantize

    return dequantize(quantize(W, Type[name]), Type[name]).astype(np.float64)


@pytest.mark.runtime
@pytest.mark.parametrize("name", SIMPLE + K_QUANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_change_less_than_by_plain_rounding(name: str, seed: int) -> None:
    W, H = weights(24, 512, seed), correlated(512, seed)
    # on these inputs 0.12 to 0.18 of the loss is left
    assert loss(W, rounded(W, H, name), H) < 0.4 * loss(W, plain(W, name), H)


@pytest.mark.runtime
@pytest.mark.parametrize("name", SIMPLE + K_QUANTS)
def test_without_correlations_it_is_no_worse_than_plain_rounding(name: str) -> None:
    W, H = weights(24, 512), np.eye(512)
    assert loss(W, rounded(W, H, name), H) <= 1.02 * loss(W, plain(W, name), H)


@all_types
def test_sweeps_never_add_to_the_loss(name: str) -> None:
    W, H = weights(16, 512), correlated(512)
    losses = [loss(W, rounded(W, H, name, sweeps), damped(H)) for sweeps in range(4)]
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-5)
    assert losses[1] < 0.97 * losses[0]


@all_types
@settings(deadline=None, max_examples=5)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 2), st.floats(-5, 3), st.booleans())
def test_sweeps_help_every_kind_of_row(
    name: str, seed: int, m: int, blocks: int, magnitude: float, sparse: bool
) -> None:
    n = blocks * BLOCK_TYPES[Type[name]].block
    rng = np.random.default_rng(seed)
    W = (weights(m, n, seed) * 10**magnitude * np.exp(rng.standard_normal((m, 1)))).astype(np.float32)
    if sparse:
        W *= rng.random(W.shape) < 0.2
    H = correlated(n, seed)
    one, many = (loss(W, rounded(W, H, name, sweeps), damped(H)) for sweeps in (0, 3))
    # what float32 adds up to shows only where there is nearly no error
    assert many <= one * (1 + 1e-4) + 1e-9 * loss(W, 0 * W, damped(H))


@all_types
def test_single_codes_and_scales_cannot_be_bettered(name: str) -> None:
    """After many sweeps no code can be one up or down without adding to the loss."""
    kind = BLOCK_TYPES[Type[name]]
    W, H = weights(3, kind.block), correlated(kind.block)
    data = round_with_feedback(torch.from_numpy(W), torch.from_numpy(H), kind.type, 30)
    codes, (scale, _) = kind.codes(data).astype(np.int64), kind.grids(data)
    Q = dequantize(data, kind.type).astype(np.float64)
    D = damped(H)
    pull = (W - Q) @ D
    steps = np.repeat(scale, kind.sub, axis=1).astype(np.float64)
    for move in (-1, 1):
        allowed = (codes + move >= kind.low) & (codes + move <= kind.high)
        change = -2 * move * steps * pull + steps**2 * np.diag(D)
        assert (change[allowed] >= -1e-4 * loss(W, Q, D)).all()


@all_types
def test_inputs_that_say_little(name: str) -> None:
    n = 256
    W = weights(4, n)
    W[1] = 0
    x = np.random.default_rng(0).standard_normal((3, n))
    half = np.diag((np.arange(n) % 2).astype(np.float64))
    for H in (np.zeros((n, n)), x.T @ x, half, np.ones((n, n)), 1e-12 * np.eye(n), 1e8 * np.eye(n)):
        Q = rounded(W, H, name)
        assert not Q[1].any()
        # directions that were never seen are still kept near W, up to what feedback puts there
        metric = damped(H) if H.any() else np.eye(n)
        assert loss(W, Q, metric) < (0.3 if name == "Q2_K" else 0.1) * loss(W, 0 * W, metric)
        np.testing.assert_array_equal(rounded(W[:1], H, name).shape, (1, n))


@all_types
def test_the_unit_of_the_inputs_does_not_matter(name: str) -> None:
    W, H = weights(4, 256), correlated(256)
    expected = rounded(W, H, name)
    for unit in (2.0**-40, 2.0**20):
        np.testing.assert_array_equal(rounded(W, unit * H, name), expected)


@all_types
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    W, H = weights(6, 256), correlated(256)
    both = rounded(W, H, name)
    expected = np.concatenate([rounded(W[:2], H, name), rounded(W[2:], H, name)])
    # sums in another order may move a code, but not the loss
    assert (both == expected).mean() > 0.95
    assert loss(W, both, H) == pytest.approx(loss(W, expected, H), rel=0.02)


@all_types
def test_what_can_be_stored_exactly_stays(name: str) -> None:
    kind = BLOCK_TYPES[Type[name]]
    W = rounded(weights(3, kind.block), np.eye(kind.block), name).astype(np.float32)
    Q = rounded(W, correlated(kind.block), name)
    assert loss(W, Q, np.eye(kind.block)) <= 2e-3 * loss(W, 0 * W, np.eye(kind.block))


@all_types
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_weights_that_cannot_be_stored(name: str, value: float) -> None:
    W = weights(2, 256)
    W[1, 17] = value
    with pytest.raises(UserError):
        quantize_matrix(torch.from_numpy(W), torch.eye(256), Type[name], Rounding())


def test_which_types_are_served() -> None:
    assert {type_.name for type_ in Type if supports_feedback(type_)} == {*SIMPLE, *K_QUANTS}
    with pytest.raises(KeyError):
        round_with_feedback(torch.zeros(1, 32), torch.eye(32), Type.IQ4_NL)


@pytest.mark.parametrize("broken", ["indefinite", "nan"])
def test_what_is_no_second_moments_is_refused(broken: str) -> None:
    H = torch.eye(64, dtype=torch.float64)
    H[0, 0] = -1.0 if broken == "indefinite" else torch.nan
    with pytest.raises(UserError, match="second moments"):
        round_with_feedback(torch.from_numpy(weights(2, 64)), H, Type.Q4_0)


@pytest.mark.parametrize("rank", [0, 1])
def test_singular_second_moments_are_damped(rank: int) -> None:
    """Inputs that never move, or move together, leave finite codes near W."""
    W = weights(4, 64)
    Q = rounded(W, rank * np.ones((64, 64)), "Q8_0")
    assert np.abs(Q - W).max() < 0.05 * np.abs(W).max()


# --- what goes into the file ---


@pytest.mark.runtime
@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_other_types_get_the_diagonal_as_importances(name: str) -> None:
    W = weights(32, 256)
    H = np.diag(np.logspace(-2, 2, 256)[np.random.default_rng(0).permutation(256)])
    found = {
        known: loss(W, quantize_matrix(torch.from_numpy(W), torch.from_numpy(H) if known else None,
                                       Type[name], Rounding()).dequantized().numpy(), H)
        for known in (True, False)
    }
    assert found[True] < found[False]


@pytest.mark.runtime
def test_rows_that_are_not_whole_blocks_become_float16() -> None:
    W = weights(3, 40)
    stored = quantize_matrix(torch.from_numpy(W), torch.eye(40), Type.Q4_0, Rounding())
    assert stored.type == Type.F16
    np.testing.assert_array_equal(stored.dequantized().numpy(), W.astype(np.float16).astype(np.float32))


@pytest.mark.runtime
@pytest.mark.parametrize("feedback", [True, False])
def test_without_second_moments_every_number_is_rounded_by_itself(feedback: bool) -> None:
    W = weights(3, 64)
    stored = quantize_matrix(torch.from_numpy(W), None, Type.Q4_0, Rounding(feedback))
    np.testing.assert_array_equal(stored.dequantized().numpy(), plain(W, "Q4_0"))


M_OUT, N_IN, RANK = 96, 256, 64
OUTPUTS = (64, 32)


def owner(skip: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Factors]:
    W, H = weights(M_OUT, N_IN, seed).astype(np.float64), correlated(N_IN, seed)
    L = whiten(torch.from_numpy(H)).L
    return W, H, factorize(torch.from_numpy(W), decompose(torch.from_numpy(W), L), RANK, skip)


def stored(factors: Factors, W: np.ndarray, H: np.ndarray | None, name: str, rounding: Rounding
           ) -> QuantizedFactors:
    moments = None if H is None else torch.from_numpy(H)
    return quantize_factors(factors, torch.from_numpy(W), moments, OUTPUTS, Type[name], rounding)


def projection(factors: QuantizedFactors) -> np.ndarray:
    """A: [r, n], written out from the file format's definition."""
    T = factors.T.dequantized().numpy().astype(np.float64)
    if factors.skip is None:
        return T
    A = np.zeros((len(T), len(factors.skip)))
    units, rest = iter(np.eye(len(T))), iter(T.T)
    for column, skipped in enumerate(factors.skip):
        A[:, column] = next(units if skipped else rest)
    return A


def members(factors: QuantizedFactors) -> np.ndarray:
    """B of all members: [m, r]."""
    return np.concatenate([part.dequantized().numpy() for part in factors.B]).astype(np.float64)


def least_squares(W: np.ndarray, A: np.ndarray, H: np.ndarray) -> np.ndarray:
    L = np.linalg.cholesky(damped(H, fact.DAMPING))
    return np.linalg.lstsq((A @ L).T, (W @ L).T, rcond=None)[0].T


@pytest.mark.runtime
@pytest.mark.parametrize("skip", [False, True])
def test_b_is_fitted_to_the_stored_projection(skip: bool) -> None:
    W, H, factors = owner(skip)
    rng = np.random.default_rng(5)
    noise = torch.from_numpy(rng.standard_normal(tuple(factors.T.shape)))
    moved = Factors(factors.T + 0.05 * factors.T.std() * noise, lambda: factors.B, factors.skip, 0.0)
    found = stored(moved, W, H, "F32", Rounding())
    expected = least_squares(W, projection(found), H)
    np.testing.assert_allclose(members(found), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    kept = stored(moved, W, H, "F32", Rounding(refit=False))
    np.testing.assert_allclose(members(kept), factors.B.numpy(), rtol=1e-6)
    assert [part.data.shape[0] for part in found.B] == list(OUTPUTS)


@pytest.mark.runtime
@pytest.mark.parametrize("skip", [False, True])
def test_b_of_a_rounded_projection(skip: bool) -> None:
    W, H, factors = owner(skip)
    found = stored(factors, W, H, "Q4_0", Rounding(feedback=False))
    expected = plain(least_squares(W, projection(found), H).astype(np.float32), "Q4_0")
    assert (members(found) == expected).mean() > 0.99


@pytest.mark.runtime
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0"])
def test_each_part_of_rounding_takes_loss_away(skip: bool, name: str) -> None:
    W, H, factors = owner(skip)
    losses = {}
    for feedback in (True, False):
        for refit in (True, False):
            found = stored(factors, W, H, name, Rounding(feedback, refit=refit))
            Q = members(found) @ projection(found)
            for part, whole in zip(found.multiplied_out(), np.split(Q, [OUTPUTS[0]]), strict=True):
                np.testing.assert_allclose(part.numpy(), whole, atol=1e-5 * np.abs(Q).max())
            losses[feedback, refit] = loss(W, Q, H)
    assert losses[True, True] < losses[True, False]
    assert losses[False, True] < losses[False, False]
    assert losses[True, True] < losses[False, True]
    assert losses[True, False] < losses[False, False]


@pytest.mark.runtime
@pytest.mark.parametrize("skip", [False, True])
def test_without_calibration_factors_are_rounded_plainly(skip: bool) -> None:
    W, _, factors = owner(skip)
    found = stored(factors, W, None, "Q4_0", Rounding())
    np.testing.assert_array_equal(found.T.dequantized().numpy(), plain(factors.T.float().numpy(), "Q4_0"))
    np.testing.assert_array_equal(members(found), plain(factors.B.float().numpy(), "Q4_0"))
    assert (found.skip is None) == (not skip)
    if found.skip is not None:
        assert factors.skip is not None
        assert np.flatnonzero(found.skip).tolist() == factors.skip.tolist()
