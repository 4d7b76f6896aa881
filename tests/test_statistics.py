"""H and G from the block-by-block pass against plain sums over whole passes of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conversion import DEMO

torch = pytest.importorskip("torch", reason="the converter needs torch")

from skipcat_converter import statistics as stats  # noqa: E402
from skipcat_converter.calibration import load_calibration, split_sentences  # noqa: E402
from skipcat_converter.collector import root  # noqa: E402
from skipcat_converter.layers import keeps_input_order  # noqa: E402

from skipcat_edge.errors import UserError  # noqa: E402

TEXT = DEMO / "calibration.txt"


def test_every_layer_is_mapped(layers: Any) -> None:
    assert not layers.dense
    names = {layer.tensor for group in layers.groups for layer in group}
    members = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert names == {f"blk.{i}.{member}.weight" for i in range(6) for member in members}


def test_equals_plain_sums(source: Any, layers: Any) -> None:
    calibration = load_calibration(TEXT, source, 1500, 100)
    sums: dict[str, np.ndarray] = {}
    handles = []
    for layer in (layer for group in layers.groups for layer in group):

        def hook(_: Any, args: Any, name: str = layer.tensor) -> None:
            x = args[0][keep].double().numpy()
            sums[name] = sums.get(name, 0) + x.T @ x

        handles.append(source.module.get_submodule(layer.module).register_forward_pre_hook(hook))
    total = 0
    with torch.no_grad():
        for batch in calibration.batches:
            keep = batch.mask.bool()
            total += int(keep.sum())
            source.module(input_ids=batch.ids, attention_mask=batch.mask)
    for handle in handles:
        handle.remove()
    seen = 0
    for _, statistics in stats.block_statistics(source, layers, calibration):
        for name, entry in statistics.items():
            assert entry.input.tokens == total
            plain = sums[name] / total
            kept = 1 - entry.input.shrinkage
            expected = kept * plain + (1 - kept) * np.diag(np.diag(plain))
            np.testing.assert_allclose(entry.input.H.numpy(), expected, rtol=1e-3, atol=1e-5)
            seen += 1
        # what reads the same input comes together
        assert len({id(entry.input) for entry in statistics.values()}) == 1
    assert seen == len(sums)


def test_gradients_equal_those_of_a_whole_backward_pass(
    source: Any, layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = load_calibration(TEXT, source, 700, 64)
    monkeypatch.setattr(stats, "HEAD_TOKENS", 10**6)
    found = {
        name: entry.output
        for _, statistics in stats.block_statistics(source, layers, calibration, seed=3)
        for name, entry in statistics.items()
    }
    layer = next(layer for group in layers.groups for layer in group if layer.tensor == "blk.2.attn_v.weight")
    module = source.module.get_submodule(layer.module)
    generator = torch.Generator().manual_seed(3)
    total, rows = np.zeros((layer.m, layer.m)), 0
    for batch in calibration.batches:
        outputs: list[Any] = []
        handle = module.register_forward_hook(lambda _m, _a, output, kept=outputs: kept.append(output))
        embedded = source.module.get_input_embeddings()(batch.ids).detach().requires_grad_()
        logits = source.module(inputs_embeds=embedded, attention_mask=batch.mask).logits
        handle.remove()
        keep = batch.mask.bool()
        real = logits[keep]
        drawn = torch.multinomial(torch.softmax(real.detach(), -1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(real, drawn, reduction="sum")
        g = torch.autograd.grad(loss, outputs[0])[0][keep].double().numpy()
        total, rows = total + g.T @ g, rows + len(g)
    output = found[layer.tensor]
    assert output is not None
    G, W = total / rows, module.weight.detach().double().numpy()
    G = (1 - output.shrinkage) * G + output.shrinkage * np.diag(np.diag(G))
    expected = W.T @ G @ W
    np.testing.assert_allclose(output.C.numpy().T @ output.C.numpy(), expected,
                               rtol=1e-2, atol=1e-3 * np.abs(expected).max())
    assert output.mean_weight == pytest.approx(np.diag(G).mean(), rel=1e-3)


def test_without_gradients_there_is_no_output_side(source: Any, layers: Any) -> None:
    calibration = load_calibration(TEXT, source, 300, 64)
    for _, statistics in stats.block_statistics(source, layers, calibration, gradients=False):
        assert all(entry.output is None for entry in statistics.values())


def merged(parts: Any) -> dict[int, Any]:
    """All statistics of each block."""
    blocks: dict[int, Any] = {}
    for block, statistics in parts:
        blocks.setdefault(block, {}).update(statistics)
    return blocks


def test_a_model_that_is_no_chain_gives_the_same(
    source: Any, layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = load_calibration(TEXT, source, 600, 64)
    # windows are drawn for in the same order only where they all fit one part
    monkeypatch.setattr(stats, "HEAD_TOKENS", 10**6)
    chained = merged(stats.block_statistics(source, layers, calibration))
    monkeypatch.setattr(stats, "find_chain", lambda *_: None)
    whole = merged(stats.block_statistics(source, layers, calibration))
    assert chained.keys() == whole.keys()
    for block, statistics in chained.items():
        for name, entry in statistics.items():
            other = whole[block][name]
            torch.testing.assert_close(entry.input.H, other.input.H, rtol=1e-4, atol=1e-6)
            assert entry.output is not None
            assert other.output is not None
            scale = float(other.output.C.abs().max())
            gram, expected = entry.output.C.T @ entry.output.C, other.output.C.T @ other.output.C
            torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-4 * scale**2)
            assert entry.output.mean_weight == pytest.approx(other.output.mean_weight, rel=1e-3)


def test_groups_are_split_where_inputs_differ(source: Any, layers: Any) -> None:
    calibration = load_calibration(TEXT, source, 300, 64)
    assert stats.split_by_input(source, layers, calibration).groups == layers.groups
    value = source.module.model.layers[2].self_attn.v_proj
    handle = value.register_forward_pre_hook(lambda _, args: (args[0] * 2,), prepend=True)
    try:
        split = stats.split_by_input(source, layers, calibration).groups
    finally:
        handle.remove()
    assert len(split) == len(layers.groups) + 1
    assert [layer.member for group in split for layer in group if len(group) == 1 and layer.index == 2] == [
        "attn_v", "attn_output", "ffn_down"]  # fmt: skip


def test_not_finite_activations_name_the_layer(source: Any, layers: Any) -> None:
    calibration = load_calibration(TEXT, source, 300, 64)
    weight = source.module.model.layers[1].mlp.up_proj.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj \(blk\.1\.ffn_down\.weight\)"):
            list(stats.block_statistics(source, layers, calibration))
    finally:
        with torch.no_grad():
            weight[0, 0] = kept


def test_windows_start_with_bos_and_use_the_first_tokens(source: Any) -> None:
    calibration = load_calibration(TEXT, source, 500, 64)
    expected = source.tokenizer(TEXT.read_text(), add_special_tokens=False)["input_ids"][:500]
    found = [
        token
        for batch in calibration.batches
        for ids, mask in zip(batch.ids, batch.mask, strict=True)
        for token in ids[mask.bool()][1:].tolist()
    ]
    assert found == expected
    assert all(bool((batch.ids[:, 0] == 1).all()) for batch in calibration.batches)


def test_sentences() -> None:
    text = " = Title = \n\nOne two three . Four five six seven! Eight?\nnine ten eleven"
    expected = ["= Title =", "One two three .", "Four five six seven!", "nine ten eleven"]
    assert split_sentences(text) == expected


def test_input_order_check() -> None:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((48, 32)).astype(np.float32)
    module = torch.from_numpy(W)
    assert keeps_input_order(W[rng.permutation(48)], module)
    assert keeps_input_order(W, module.T)
    assert not keeps_input_order(W[:, rng.permutation(32)], module)


@pytest.mark.parametrize("rows", [40, 5])
def test_a_root_of_second_moments(rows: int) -> None:
    """Also where some direction was never seen."""
    X = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, 9)))
    S = X.T @ X
    R = root(S)
    np.testing.assert_allclose((R.T @ R).numpy(), S.numpy(), atol=1e-12)
    S[3, 4] = float("nan")
    assert bool(torch.isnan(root(S)).all())
