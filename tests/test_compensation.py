"""The two flows against whole passes of the model, and the pairing of rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversion import DEMO, tensors

torch = pytest.importorskip("torch", reason="the converter needs torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from skipcat_converter import compensation as comp  # noqa: E402
from skipcat_converter.calibration import load_calibration  # noqa: E402
from skipcat_converter.compensation import Compensation, matching_rows, open_compensation  # noqa: E402

HEADS = {"attn_q": 8, "attn_k": 4}


@pytest.fixture(scope="module")
def calibration(source: Any) -> Any:
    return load_calibration(DEMO / "calibration.txt", source, 1500, 100)


@pytest.fixture(scope="module")
def base(demo_dense_gguf: Path) -> dict[str, torch.Tensor]:
    """Weights by tensor name, as the base file has them."""
    return {name: torch.from_numpy(W.copy()) for name, W in tensors(demo_dense_gguf).items()}


def opened(source: Any, layers: Any, calibration: Any, base: dict[str, torch.Tensor]) -> Compensation:
    found = open_compensation(source, layers, calibration, base)
    assert isinstance(found, Compensation), found
    return found


def group_of(layers: Any, tensor: str) -> Any:
    return next(group for group in layers.groups if tensor in [layer.tensor for layer in group])


def layer_of(layers: Any, tensor: str) -> Any:
    return next(layer for layer in group_of(layers, tensor) if layer.tensor == tensor)


def inputs(source: Any, module: Any, name: str, calibration: Any) -> np.ndarray:
    """What the module called `name` reads in a whole forward pass: float64 [tokens, n]."""
    rows: list[np.ndarray] = []
    handle = module.get_submodule(name).register_forward_pre_hook(
        lambda _, args: rows.append(args[0][keep].double().numpy()))
    with torch.no_grad():
        for batch in calibration.batches:
            keep = batch.mask.bool()
            module(input_ids=batch.ids, attention_mask=batch.mask)
    handle.remove()
    return np.concatenate(rows)


def least_squares_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """M with E|x - M y|^2 + ridge |M - I|^2 at its least."""
    ridge = 1e-4 * (y**2).mean() * np.eye(y.shape[1])
    return np.linalg.solve(y.T @ y / len(y) + ridge, (x.T @ y / len(y) + ridge).T).T


def in_their_order(W: np.ndarray, member: str) -> np.ndarray:
    """llama.cpp's order of the outputs of q and k to that of transformers."""
    if member not in HEADS:
        return W
    m, n = W.shape
    return W.reshape(HEADS[member], m // HEADS[member] // 2, 2, n).swapaxes(1, 2).reshape(m, n)


def assert_shrunk(H: np.ndarray, x: np.ndarray) -> None:
    """H is E[x x^T], moved towards its diagonal by some share."""
    plain = x.T @ x / len(x)
    np.testing.assert_allclose(np.diag(H), np.diag(plain), rtol=1e-3, atol=1e-6)
    off = ~np.eye(len(H), dtype=bool)
    kept = float(H[off] @ plain[off] / (plain[off] @ plain[off]))
    assert 0.3 < kept <= 1
    assert np.linalg.norm(H[off] - kept * plain[off]) < 1e-3 * np.linalg.norm(plain[off])


def test_before_anything_is_stored_the_target_is_w(
    source: Any, layers: Any, calibration: Any, base: dict[str, torch.Tensor]
) -> None:
    flows = opened(source, layers, calibration, base)
    for tensor in ("blk.0.attn_q.weight", "blk.2.ffn_down.weight"):
        group = group_of(layers, tensor)
        found = flows.input_of(group)
        np.testing.assert_allclose(found.M.numpy(), np.eye(group[0].n), atol=1e-3)
        assert_shrunk(found.H.numpy(), inputs(source, source.module, group[0].module, calibration))


@pytest.mark.parametrize(("stored", "read"), [
    ("blk.0.attn_q.weight", "blk.0.attn_output.weight"),
    ("blk.0.ffn_down.weight", "blk.1.attn_q.weight"),
    ("blk.0.attn_k.weight", "blk.2.ffn_down.weight"),
])  # fmt: skip
def test_later_layers_get_the_map_from_what_they_will_read(
    source: Any, layers: Any, calibration: Any, base: dict[str, torch.Tensor], stored: str, read: str
) -> None:
    flows = opened(source, layers, calibration, base)
    layer, group = layer_of(layers, stored), group_of(layers, read)
    flows.input_of(group_of(layers, stored))
    W = base[stored]
    other = W + 0.5 * W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
    flows.install(layer, W, other)
    found = flows.input_of(group)

    changed = copy.deepcopy(source.module)
    weight = changed.get_submodule(layer.module).weight
    with torch.no_grad():
        weight.copy_(torch.from_numpy(np.ascontiguousarray(in_their_order(other.numpy(), layer.member))))
    x = inputs(source, source.module, group[0].module, calibration)
    y = inputs(source, changed, group[0].module, calibration)
    assert np.linalg.norm(x - y) > 0.02 * np.linalg.norm(x)
    assert_shrunk(found.H.numpy(), y)
    M, expected = found.M.numpy(), least_squares_map(x, y)
    eye = np.eye(len(expected))
    expected = eye + found.blend * (expected - eye)
    scale = np.linalg.norm(y @ (expected - eye).T)
    assert 0 <= found.blend <= 1
    assert np.linalg.norm(y @ (M - expected).T) <= 0.02 * scale + 1e-3
    # the map brings y nearer to x, as far as 1,500 tokens can tell
    share = 1.0 if group[0].n > 256 else 0.98
    assert np.linalg.norm(x - y @ M.T) < share * np.linalg.norm(x - y)


def test_the_model_itself_is_left_alone(
    source: Any, layers: Any, calibration: Any, base: dict[str, torch.Tensor]
) -> None:
    before = {name: value.clone() for name, value in source.module.state_dict().items()}
    flows = opened(source, layers, calibration, base)
    for tensor in ("blk.0.attn_q.weight", "blk.1.attn_q.weight"):
        flows.input_of(group_of(layers, tensor))
        flows.install(layer_of(layers, tensor), base[tensor], 0 * base[tensor])
    for name, value in source.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(not module._forward_pre_hooks for module in source.module.modules())


def test_no_chain_is_said(
    source: Any, layers: Any, calibration: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comp, "find_chain", lambda *_: None)
    assert open_compensation(source, layers, calibration, {}) == "the model's blocks are no plain chain"


def test_a_file_with_other_weights_is_said(
    source: Any, layers: Any, calibration: Any, base: dict[str, torch.Tensor]
) -> None:
    tensor = "blk.0.ffn_up.weight"
    reason = open_compensation(source, layers, calibration, {tensor: base[tensor].flip(1)})
    assert isinstance(reason, str)
    assert tensor in reason


# --- rows ---


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(8, 96), st.integers(0, 2**16),
       st.sampled_from([np.float16, np.float32]))
def test_rows_are_found_again(m: int, n: int, seed: int, dtype: type[np.floating[Any]]) -> None:
    rng = np.random.default_rng(seed)
    own = (0.05 * rng.standard_normal((m, n))).astype(np.float32)
    order = rng.permutation(m)
    rows = matching_rows(torch.from_numpy(own[order].astype(dtype).astype(np.float32)), torch.from_numpy(own))
    assert rows is not None
    assert rows.tolist() == order.tolist()


def test_rows_that_are_alike() -> None:
    own = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    own[[3, 9, 20]] = own[5].clone()
    own[[1, 2]] = 0
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    rows = matching_rows(own[order], own)
    assert rows is not None
    assert sorted(rows.tolist()) == list(range(32))
    assert torch.equal(own[rows], own[order])


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 64), st.integers(8, 64), st.integers(0, 2**16))
def test_other_matrices_are_refused(m: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    own = torch.from_numpy(rng.standard_normal((m, n)))
    order = rng.permutation(m)
    one_row = own[order].clone()
    one_row[rng.integers(m)] = torch.from_numpy(rng.standard_normal(n))
    twice = own[order].clone()
    twice[0] = twice[1]
    unlike = torch.from_numpy(rng.standard_normal((m, n)))
    for other in (unlike, 1.1 * own[order], -own, own.flip(1), one_row, twice):
        assert matching_rows(other, own) is None


def held_out_blend(x: np.ndarray, y: np.ndarray, half: np.ndarray) -> float:
    """The blend of least error on each half with the map fitted to the other, by a fine search."""
    maps = [np.linalg.lstsq(y[half == i], x[half == i], rcond=None)[0] for i in range(2)]
    shares = np.linspace(0, 1, 201)

    def error(share: float, i: int) -> float:
        left = x - y - share * (y @ maps[1 - i] - y)
        return float((left[half == i] ** 2).sum() / (half == i).sum())

    errors = [error(share, 0) + error(share, 1) for share in shares]
    return float(shares[np.argmin(errors)])


@pytest.mark.parametrize(("n", "tokens", "noise"), [
    (24, 4000, 0.1), (24, 200, 1.0), (24, 60, 3.0), (120, 4000, 0.1), (120, 600, 1.0)])
def test_the_blend_is_the_best_on_held_out_tokens(
    n: int, tokens: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 100 inputs on, 5 rows of every 40 stand for all."""
    from skipcat_converter import compensation
    from skipcat_converter.second_moments import SecondMoment
    from skipcat_converter.sums import HalfSums

    for name, value in (("_JUDGED_WHOLE", 100), ("_JUDGED", 5), ("_APART", 40)):
        monkeypatch.setattr(compensation, name, value)
    rng = np.random.default_rng(0)
    y = rng.standard_normal((tokens, n))
    M = np.eye(n) + 0.2 * rng.standard_normal((n, n)) / n**0.5
    x = y @ M + noise * rng.standard_normal((tokens, n))
    half = np.arange(tokens) // 5 % 2
    moment = SecondMoment(n, torch.device("cpu"))
    moment.add(torch.from_numpy(y), torch.from_numpy(half))
    crossed = HalfSums(n, torch.device("cpu"))
    for i in range(2):
        crossed.add(i, torch.from_numpy(x[half == i].T @ y[half == i]))
    expected = held_out_blend(x, y, half)
    assert compensation.best_blend(moment, crossed) == pytest.approx(expected, abs=0.02 if n == 24 else 0.05)
    assert (expected > 0.8) == (tokens == 4000)
