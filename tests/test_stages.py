"""Factors stage after stage, against NumPy's SVD and least squares in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType

torch = pytest.importorskip("torch", reason="the converter needs torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from skipcat_converter.candidates import Problem  # noqa: E402
from skipcat_converter.compensation import CompressedInput  # noqa: E402
from skipcat_converter.factorize import whiten  # noqa: E402
from skipcat_converter.layers import Layer  # noqa: E402
from skipcat_converter.plan import PlannedOwner  # noqa: E402
from skipcat_converter.planning import noise  # noqa: E402
from skipcat_converter.quantized import Rounding  # noqa: E402
from skipcat_converter.stages import (  # noqa: E402
    FittedStage,
    LevelWeights,
    corrections,
    fit_stage,
    level_weights,
    mixed_input,
    stages_below,
)
from test_factorize import best_error, damped, error  # noqa: E402
from test_factorize import problem as random_problem  # noqa: E402

M, N = 20, 24
LAYERS = Layer(0, "attn_q", "model.layers.0.q", 12, N), Layer(0, "attn_k", "model.layers.0.k", 8, N)


def whole_problem(seed: int, gradients: bool) -> tuple[Problem, np.ndarray, np.ndarray]:
    """The problem of `LAYERS`, and its C and H."""
    W, H = random_problem(M, N, seed)
    G = np.diag(np.random.default_rng(seed).uniform(0.5, 2.0, M)) if gradients else np.eye(M)
    C = torch.from_numpy(np.sqrt(G) @ W)
    whitening = whiten(torch.from_numpy(H))
    weights = torch.from_numpy(np.diag(G).copy())
    stacked = torch.from_numpy(W)
    own = Problem(stacked, C if gradients else stacked, torch.from_numpy(H), whitening.L, whitening.damping,
                  weights)
    return own, C.numpy(), H


def stages(skip: bool, *ranks: int) -> list[PlannedOwner]:
    last = len(ranks) - 1
    return [PlannedOwner(LAYERS, rank, skip, None if level == 0 else (level, last))
            for level, rank in enumerate(ranks)]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.booleans(), st.booleans())
def test_every_level_is_the_best_of_its_rank(seed: int, skip: bool, gradients: bool) -> None:
    """Eckart-Young: what a lower level uses costs a higher one nothing."""
    own, C, H = whole_problem(seed, gradients)
    plan = stages(skip, 4, 3, 5)
    fitted: list[FittedStage] = []
    total = error(C, np.zeros_like(C), H)
    for owner in plan:
        fitted.append(fit_stage(owner, own, fitted, GGMLQuantizationType.F32, Rounding(), last=False))
        rank = sum(each.rank for each in plan[: len(fitted)])
        lost = error(C, sum(stage.taken_c for stage in fitted).numpy(), H)
        assert lost == pytest.approx(best_error(C, H, rank), rel=1e-3, abs=1e-5 * total)
        assert fitted[-1].error == pytest.approx(lost / total, rel=1e-3, abs=1e-5)
        # the factors of the file take of W what those of C say
        root = np.sqrt(own.weights.numpy())[:, None]
        W_taken = sum(stage.taken_w for stage in fitted).double().numpy()
        assert np.allclose(root * W_taken, sum(stage.taken_c for stage in fitted).numpy(), atol=1e-3)


def test_a_later_stage_takes_what_rounding_left() -> None:
    own, C, H = whole_problem(5, False)
    first, second = stages(False, 4, 12)
    coarse = fit_stage(first, own, [], GGMLQuantizationType.F32, Rounding(), last=False)
    spoilt = replace(coarse, taken_w=coarse.taken_w * 1.1, taken_c=coarse.taken_c * 1.1)
    both = fit_stage(second, own, [spoilt], GGMLQuantizationType.F32, Rounding(), last=False)
    lost = error(C, (spoilt.taken_c + both.taken_c).numpy(), H)
    assert lost == pytest.approx(best_error(C - spoilt.taken_c.numpy(), H, 12), rel=1e-3)
    assert lost < error(C, spoilt.taken_c.numpy(), H)


@pytest.mark.parametrize("skip", [False, True])
def test_noise_of_a_correction(skip: bool) -> None:
    """About what the allocation expects of rounding it."""
    m, n = 96, 128
    layers = (Layer(0, "attn_q", "model.layers.0.q", m, n),)
    W, H = random_problem(m, n, 3)
    stacked = torch.from_numpy(W)
    whitening = whiten(torch.from_numpy(H))
    own = Problem(stacked, stacked, torch.from_numpy(H), whitening.L, whitening.damping,
                  torch.ones(m, dtype=torch.float64))
    first, second = PlannedOwner(layers, 32, skip), PlannedOwner(layers, 32, skip, (1, 1), added=True)
    below = fit_stage(first, own, [], GGMLQuantizationType.F32, Rounding(), last=False)
    above = fit_stage(second, own, [below], GGMLQuantizationType.Q4_0, Rounding(), last=True)
    lost = error(W, (below.taken_w + above.taken_w).double().numpy(), H) - best_error(W, H, 64)
    taken = best_error(W, H, 32) - best_error(W, H, 64)
    assert 0.4 < lost / taken / noise(GGMLQuantizationType.Q4_0) < 2.5


def test_what_a_level_uses_already() -> None:
    grown = stages(True, 8, 8, 8)
    assert [stages_below(owner, grown) for owner in grown] == [[], grown[:1], grown[:2]]
    levels = range(3)
    assert [corrections(owner, grown, levels) for owner in grown] == [
        {0: 0, 1: 1, 2: 2}, {0: 0, 1: 0, 2: 1}, {0: 0, 1: 0, 2: 0}]
    replaced = [PlannedOwner(LAYERS, 8, True, (0, 0)), PlannedOwner(LAYERS, 16, True, (1, 2))]
    assert [stages_below(owner, replaced) for owner in replaced] == [[], []]
    assert not any(any(corrections(owner, replaced, range(owner.levels[0], owner.levels[1] + 1)).values())
                   for owner in replaced)
    alone = [PlannedOwner(LAYERS, 8, True)]
    assert corrections(alone[0], alone, range(1)) == {0: 0}


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.floats(0.1, 10))
def test_mixed_inputs_weigh_the_levels(seed: int, weight: float) -> None:
    """The least-squares V of all samples of both levels, those of one weighted."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((6, 8))
    inputs, rows, targets = {}, [], []
    for level, scale in enumerate((1.0, weight)):
        y = rng.standard_normal((200, 8)) @ rng.standard_normal((8, 8))
        M = np.eye(8) + 0.1 * rng.standard_normal((8, 8))
        inputs[level] = CompressedInput(torch.from_numpy(y.T @ y / len(y)), torch.from_numpy(M), 1.0)
        rows.append(np.sqrt(scale) * y)
        targets.append(np.sqrt(scale) * y @ (W @ M).T)
    mixed = mixed_input(inputs, {0: 1.0, 1: weight})
    expected = np.linalg.lstsq(np.vstack(rows), np.vstack(targets), rcond=None)[0].T
    H = sum(row.T @ row for row in rows) / 200 / (1 + weight)
    assert np.allclose(mixed.H.numpy(), H)
    found = W @ mixed.M.numpy()
    assert error(expected, found, H) <= 1e-3 * error(expected, np.zeros_like(expected), H)
    assert np.allclose(damped(H), damped(mixed.H.numpy()))


def test_one_level_is_itself() -> None:
    own = CompressedInput(torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), 0.5)
    assert mixed_input({2: own}, {2: 1.0}) is own


def test_levels_count_by_what_they_lose() -> None:
    same = level_weights([0.4, 0.1], False)
    assert same.levels == 2 and same.shared == pytest.approx([6.25, 100.0])
    assert same.of({0: 0, 1: 0}) == {0: same.shared[0], 1: same.shared[1]}
    assert same.of({0: 0, 1: 1}) == {0: 1.0, 1: 1.0}
    smaller = level_weights([0.4, 0.1], True)
    assert smaller.shared == pytest.approx([2.5, 10.0])
    assert smaller.of({1: 0}) == {1: smaller.shared[1]}
    # of three levels, the second uses the factors as the first does
    found = LevelWeights((1.0, 2.0, 3.0), smaller.corrected).of({0: 0, 1: 0, 2: 1})
    assert found[0] == found[1] > found[2] > 0
    # a level that loses nothing has not all the weight, nor one of a model that loses nothing
    assert level_weights([0.5, 0.0], False).shared == pytest.approx([4.0, 4e6])
    nothing = level_weights([0.0, 0.0], True).shared
    assert nothing[0] == nothing[1] > 0
