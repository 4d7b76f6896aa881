"""Shrinkage of second moments against covariances that are known, and the losses behind G."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the converter needs torch")
from skipcat_converter.calibration import Batch  # noqa: E402
from skipcat_converter.losses import loss_of  # noqa: E402
from skipcat_converter.second_moments import SecondMoment, Shrunk  # noqa: E402

N = 24


def sample(covariance: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tokens, len(covariance))) @ np.linalg.cholesky(covariance).T


def strong() -> np.ndarray:
    """Correlations of about 0.8 throughout."""
    x = np.random.default_rng(0).standard_normal((N, 3))
    C: np.ndarray = x @ x.T + 0.3 * np.eye(N)
    return C


def moment(rows: np.ndarray, part: int = 10**9) -> SecondMoment:
    found = SecondMoment(rows.shape[1], torch.device("cpu"))
    for start in range(0, len(rows), part):
        found.add(torch.from_numpy(rows[start : start + part].astype(np.float32)))
    return found


def shrunk(rows: np.ndarray, target: np.ndarray | None = None) -> Shrunk:
    return moment(rows).shrunk(None if target is None else torch.from_numpy(target))


def test_the_mean_is_numpys() -> None:
    rows = sample(strong(), 1000, 1)
    found = moment(rows)
    assert found.tokens == 1000
    np.testing.assert_allclose(found.mean().numpy(), rows.T @ rows / 1000, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [65, 129, 200, 333, 1000])
def test_parts_of_any_size_give_the_same(tokens: int) -> None:
    rows = sample(strong(), tokens, 2)
    whole = moment(rows).shrunk()
    for part in (7, 64, 100):
        found = moment(rows, part).shrunk()
        assert (found.tokens, found.amount) == (tokens, pytest.approx(whole.amount, rel=1e-4))
        torch.testing.assert_close(found.matrix, whole.matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [65, 129, 200, 333, 1000])
def test_the_amount_is_noise_over_distance(tokens: int) -> None:
    """For halves of any sizes a and b: |S_a - S_b|^2 is the noise of the mean times (a + b)^2 / (a b)."""
    rows = sample(strong(), tokens, 3).astype(np.float32).astype(np.float64)
    first = np.arange(tokens) // 64 % 2 == 0
    a, b = int(first.sum()), int((~first).sum())
    S = rows.T @ rows / tokens
    difference = rows[first].T @ rows[first] / a - rows[~first].T @ rows[~first] / b
    difference -= np.diag(np.diag(difference))  # on the diagonal S and its target agree
    noise = (difference**2).sum() * a * b / tokens**2
    distance = (S**2).sum() - (np.diag(S) ** 2).sum()
    found = shrunk(rows)
    assert found.amount == pytest.approx(min(1.0, noise / distance), rel=1e-3)
    expected = (1 - found.amount) * S + found.amount * np.diag(np.diag(S))
    np.testing.assert_allclose(found.matrix.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_known_correlations_stay() -> None:
    assert shrunk(sample(strong(), 20_000, 4)).amount < 0.01


def test_noise_goes() -> None:
    amounts = [shrunk(sample(np.eye(N), 128, seed)).amount for seed in range(10)]
    assert np.mean(amounts) > 0.8


def test_the_noise_estimate_is_right_on_average() -> None:
    """Its expectation is E|S - C|^2, whatever the sizes of the halves."""
    C = strong()
    ratios = []
    for tokens in (128, 200):
        estimated, true = [], []
        for seed in range(60):
            rows = sample(C, tokens, seed)
            found, S = shrunk(rows), rows.T @ rows / tokens
            estimated.append(found.amount * ((S**2).sum() - (np.diag(S) ** 2).sum()))
            true.append(((S - C) ** 2).sum())
        ratios.append(np.mean(estimated) / np.mean(true))
    assert ratios == pytest.approx([1, 1], abs=0.4)


def test_tokens_that_repeat_count_for_less() -> None:
    rows = sample(strong(), 400, 5)
    once = np.mean([shrunk(sample(strong(), 3200, seed)).amount for seed in range(5)])
    # the same 400 rows, each in eight neighbouring tokens
    repeated = np.mean(
        [shrunk(np.repeat(sample(strong(), 400, seed), 8, axis=0)).amount for seed in range(5)])
    assert repeated > 3 * once
    assert moment(np.repeat(rows, 8, axis=0)).tokens == 3200


@pytest.mark.parametrize("tokens", [130, 256, 999])
@pytest.mark.parametrize("kind", ["strong", "weak", "none"])
def test_closer_to_the_truth_than_the_sample(kind: str, tokens: int) -> None:
    C = {"strong": strong(), "weak": 0.3 * strong() + 3 * np.eye(N), "none": np.eye(N)}[kind]
    own, ours = [], []
    for seed in range(20):
        rows = sample(C, tokens, seed)
        own.append(((rows.T @ rows / tokens - C) ** 2).sum())
        ours.append(((shrunk(rows).matrix.numpy() - C) ** 2).sum())
    # where correlations are strong there is little to gain, and little to lose
    assert np.mean(ours) <= np.mean(own) * {"strong": 1.05, "weak": 1.0, "none": 0.5}[kind]


def test_fewer_rows_than_numbers() -> None:
    rows = sample(0.3 * strong() + np.eye(N), 20, 6)
    repeated = np.concatenate([rows[:10], rows])[:20].repeat(5, axis=0)
    found = shrunk(repeated)
    assert 0 < found.amount <= 1
    eigenvalues = np.linalg.eigvalsh(found.matrix.numpy())
    assert eigenvalues.min() > 0
    np.testing.assert_array_equal(found.matrix.numpy(), found.matrix.numpy().T)


def test_one_run_says_nothing_of_its_noise() -> None:
    rows = sample(strong(), 64, 7)
    found = shrunk(rows)
    assert found.amount == 1
    np.testing.assert_allclose(found.matrix.numpy(), np.diag((rows**2).mean(0)), rtol=1e-4)


def test_nothing_seen_or_nothing_to_shrink() -> None:
    empty = SecondMoment(3, torch.device("cpu"))
    assert empty.shrunk().amount == 0
    assert not empty.shrunk().matrix.any()
    zeros = shrunk(np.zeros((200, 3)))
    assert not zeros.matrix.any()
    one = shrunk(np.random.default_rng(0).standard_normal((200, 1)))
    assert one.amount == 0


def test_towards_a_given_target() -> None:
    C = strong()
    right, wrong = (
        np.mean([shrunk(sample(C, 200, seed), target).amount for seed in range(5)])
        for target in (C, 50 * np.eye(N))
    )
    assert right > 0.6
    assert wrong < 0.1
    rows = sample(C, 200, 8)
    found, S = shrunk(rows, C), rows.T @ rows / 200
    expected = (1 - found.amount) * S + found.amount * C
    np.testing.assert_allclose(found.matrix.numpy(), expected, rtol=1e-4, atol=1e-5)


# --- the losses whose gradients G is made of ---


def batch(mask: np.ndarray) -> Batch:
    return Batch(torch.zeros(mask.shape, dtype=torch.long), torch.from_numpy(mask.astype(np.int64)))


def test_sampled_cross_entropy_has_the_fisher_information() -> None:
    raw = np.array([1.0, 0.2, -1.0, 0.5, -3.0])
    p = np.exp(raw) / np.exp(raw).sum()
    mask = np.ones((40, 1000))
    mask[:, 900:] = 0
    logits = torch.from_numpy(np.tile(raw, (*mask.shape, 1))).requires_grad_()
    model: Any = SimpleNamespace(is_encoder=False)
    loss = loss_of(model, batch(mask), SimpleNamespace(logits=logits), torch.Generator().manual_seed(0))
    # summed, not averaged, over real tokens
    entropy = -(p * np.log(p)).sum()
    assert float(loss.detach()) == pytest.approx(mask.sum() * entropy, rel=0.02)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, 900:].any()
    g = gradient[:, :900].reshape(-1, 5).numpy()
    np.testing.assert_allclose(g.mean(0), np.zeros(5), atol=0.01)
    np.testing.assert_allclose(g.T @ g / len(g), np.diag(p) - np.outer(p, p), atol=0.01)
    # each row is p minus a unit vector
    np.testing.assert_allclose(np.sort(p - g, axis=1), np.tile([0, 0, 0, 0, 1], (len(g), 1)), atol=1e-5)


@pytest.mark.parametrize("first", [False, True])
def test_projected_embedding_has_the_moments_of_the_jacobian(first: bool) -> None:
    hidden = np.random.default_rng(1).standard_normal((3, 4))
    mask = np.tile([1, 1, 0], (20_000, 1))
    states = torch.from_numpy(np.tile(hidden, (len(mask), 1, 1))).requires_grad_()
    model: Any = SimpleNamespace(is_encoder=True, pools_first_token=first)
    loss = loss_of(model, batch(mask), SimpleNamespace(last_hidden_state=states),
                   torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, states)
    g = gradient.numpy()

    def embedding(states: np.ndarray) -> np.ndarray:
        pooled = states[0] if first else states[:2].mean(0)
        unit: np.ndarray = pooled / np.linalg.norm(pooled)
        return unit

    for token in range(3):
        steps = [embedding(hidden + 1e-6 * np.outer(np.eye(3)[token], unit)) for unit in np.eye(4)]
        J = np.stack([step - embedding(hidden) for step in steps], axis=1) / 1e-6
        found = g[:, token].T @ g[:, token] / len(g)
        np.testing.assert_allclose(found, J.T @ J, atol=0.03 * (J**2).max() + 1e-9)
