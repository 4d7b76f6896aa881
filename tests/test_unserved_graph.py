"""A layer that a graph multiplies by other means than build_lora_mm: refused, not computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFValueType
from gguf_edit import GGUF, Tensor
from level_models import set_levels

from skipcat_edge import format as fmt
from skipcat_edge.cli import main
from skipcat_edge.runtime.check import runtime_status

pytestmark = pytest.mark.runtime

INTEGERS = {
    "block_count": 1, "context_length": 128, "embedding_length": 256, "feed_forward_length": 64,
    "leading_dense_block_count": 1, "expert_feed_forward_length": 64, "expert_shared_count": 1,
    "attention.head_count": 4, "attention.head_count_kv": 4, "attention.key_length": 48,
    "attention.value_length": 32, "attention.kv_lora_rank": 32, "attention.q_lora_rank": 0,
    "rope.dimension_count": 16,
}  # fmt: skip
FLOATS = {"attention.layer_norm_rms_epsilon": 1e-6, "expert_weights_scale": 1.0}
NORMS = {"attn_norm": 256, "ffn_norm": 256, "attn_kv_a_norm": 32}
MATRICES = {
    "attn_q": (192, 256), "attn_kv_a_mqa": (48, 256), "attn_kv_b": (256, 32), "attn_output": (256, 128),
    "ffn_gate": (64, 256), "ffn_up": (64, 256), "ffn_down": (256, 64),
}  # fmt: skip


def deepseek2(vocabulary: GGUF, low_rank: str) -> GGUF:
    """A random one-block deepseek2 whose layer `low_rank` ("" for none) is factored, rank 32."""
    rng = np.random.default_rng(0)
    architecture = "deepseek2"
    file = vocabulary.copy()
    file.keys = {name: value for name, value in file.keys.items() if not name.startswith("llama.")}
    file.tensors = {name: value for name, value in file.tensors.items() if not name.startswith("blk.")}
    file.set(fmt.KEY_ARCHITECTURE, (fmt.ARCHITECTURE_PREFIX if low_rank else "") + architecture)
    for name, integer in INTEGERS.items():
        file.set(f"{architecture}.{name}", integer, GGUFValueType.UINT32)
    for name, number in FLOATS.items():
        file.set(f"{architecture}.{name}", number, GGUFValueType.FLOAT32)

    def random(*shape: int) -> np.ndarray:
        return (0.1 * rng.standard_normal(shape)).astype(np.float16)

    for name, size in NORMS.items():
        file.tensors[fmt.weight_name(0, name)] = Tensor.of(random(size).astype(np.float32))
    for name, (m, n) in MATRICES.items():
        if name == low_rank:
            file.tensors[fmt.lr_a_name(0, name)] = Tensor.of(random(32, n))
            file.tensors[fmt.lr_b_name(0, name)] = Tensor.of(random(m, 32))
        else:
            file.tensors[fmt.weight_name(0, name)] = Tensor.of(random(m, n))
    return file


@pytest.mark.parametrize("low_rank", ["", "attn_output", "ffn_up", "attn_q"])
def test_deepseek2(demo_low_rank_gguf: Path, tmp_path: Path, low_rank: str) -> None:
    path = deepseek2(GGUF.read(demo_low_rank_gguf), low_rank).write(tmp_path / "model.gguf")
    result = CliRunner().invoke(main, ["generate", str(path), "-p", "Once", "-n", "2", "--threads", "1"])
    if low_rank in fmt.UNSERVED["deepseek2"]:
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"'{fmt.weight_name(0, low_rank)}'" in result.stderr and result.stderr.count("\n") == 1
    else:
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("low_rank", "served"), [("attn_output", True), ("attn_q", False)])
def test_a_layer_that_is_dense_at_the_full_level(demo_low_rank_gguf: Path, tmp_path: Path, low_rank: str,
                                                 served: bool) -> None:
    file = deepseek2(GGUF.read(demo_low_rank_gguf), low_rank)
    for of in (fmt.lr_a_name, fmt.lr_b_name):
        file.rename(of(0, low_rank), of(0, low_rank, (0, 0)))
    dense = deepseek2(GGUF.read(demo_low_rank_gguf), "")
    file.tensors[fmt.weight_name(0, low_rank)] = dense.tensors[fmt.weight_name(0, low_rank)]
    set_levels(file, (0.5, 0.8), "deepseek2")
    path = file.write(tmp_path / "model.gguf")
    result = CliRunner().invoke(main, ["generate", str(path), "-p", "Once", "-n", "2", "--threads", "1"])
    assert result.exit_code == (0 if served else 2), result.output
    assert served or f"'{fmt.weight_name(0, low_rank)}'" in result.stderr


def test_a_check_of_the_runtime_keeps_later_reasons(demo_low_rank_gguf: Path, tmp_path: Path) -> None:
    path = deepseek2(GGUF.read(demo_low_rank_gguf), "attn_q").write(tmp_path / "model.gguf")
    command = ["generate", str(path), "-p", "Once", "-n", "2", "--threads", "1"]
    before = CliRunner().invoke(main, command).stderr
    assert runtime_status().patched is not None
    assert "low-rank factors cannot serve" in before and CliRunner().invoke(main, command).stderr == before
