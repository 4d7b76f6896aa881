"""Bytes that a decoded token reads, against the plan of models that are written for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from skipcat_edge.traffic import weight_bytes_per_token


def write(path: Path, tensors: dict[str, tuple[int, ...]], experts: tuple[int, int] | None = None) -> Path:
    """F32 tensors of zeros."""
    writer = GGUFWriter(path, "llama")
    if experts:
        writer.add_expert_used_count(experts[0])
        writer.add_expert_count(experts[1])
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BLOCK = {"blk.0.attn_q.weight": (64, 64), "blk.0.attn_norm.weight": (64,), "output_norm.weight": (64,)}
BLOCK_BYTES = 4 * (64 * 64 + 64 + 64)


@pytest.mark.parametrize(("others", "nbytes"), [
    ({"token_embd.weight": (100, 64)}, 4 * 6400),  # it is the head
    ({"token_embd.weight": (100, 64), "output.weight": (100, 64)}, 4 * 6400),
    ({"token_embd.weight": (100, 64), "position_embd.weight": (512, 64)}, 4 * 6400),
])  # fmt: skip
def test_tables_are_read_by_row(others: dict[str, tuple[int, ...]], nbytes: int, tmp_path: Path) -> None:
    assert weight_bytes_per_token(write(tmp_path / "m.gguf", BLOCK | others)) == BLOCK_BYTES + nbytes


def test_experts_that_are_used(tmp_path: Path) -> None:
    tensors = BLOCK | {"blk.0.ffn_up_exps.weight": (8, 32, 64), "blk.0.ffn_gate_inp.weight": (8, 64)}
    found = weight_bytes_per_token(write(tmp_path / "m.gguf", tensors, (2, 8)))
    assert found == BLOCK_BYTES + 4 * (8 * 64 + 2 * 32 * 64)


@pytest.mark.parametrize("ratio", ["1", "0.8"])
def test_a_known_model(ratio: str, tmp_path: Path) -> None:
    from command_line import run
    from gguf import GGMLQuantizationType

    from skipcat_edge.synth_plan import model_dimensions, plan

    path = tmp_path / "m.gguf"
    assert run("synth", "qwen2.5-0.5b", "-o", path, "--quant", "Q8_0", "--ratio", ratio).exit_code == 0
    planned = plan(model_dimensions("qwen2.5-0.5b"), GGMLQuantizationType.Q8_0, float(ratio), 0)
    assert weight_bytes_per_token(path) == pytest.approx(planned.bytes_per_token, rel=1e-4)
