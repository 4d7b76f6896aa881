"""Small random models with rank levels, and the dense model that each of their levels stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType, quants
from gguf_edit import GGUF, Tensor

from skipcat_edge import format as fmt
from skipcat_edge.model_table import ModelDimensions
from skipcat_edge.runtime.library import quantize
from skipcat_edge.synth import write
from skipcat_edge.synth_plan import plan

LEVELS = (0.5, 0.7, 0.9)
SMALL = ModelDimensions(
    name="small", architecture="llama", vocabulary="", n_vocab=288, n_embd=128, n_layer=2, n_head=4,
    n_head_kv=2, head_dim=32, n_ff=192, context_length=256, rope_theta=10000.0, norm_eps=1e-5,
    rope_scaling=None, tied_head=False, qkv_bias=False,
)  # fmt: skip
Sizes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of a block's linear layers."""

SIZES: Sizes = {
    "attn_q": (128, 128), "attn_k": (64, 128), "attn_v": (64, 128), "attn_output": (128, 128),
    "ffn_gate": (192, 128), "ffn_up": (192, 128), "ffn_down": (128, 192),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Factors of `owner` for `members`, used by the levels from `first` to `last`."""

    owner: str
    members: tuple[str, ...]
    first: int
    last: int
    rank: int
    skip: bool


QKV, GATE_UP = ("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")
# By block. Block 0: all layers add; the widest graph is level 1's.
# Block 1: replaced, dense at the top, dense below, dense between, and own owners beside the group's.
STAGES: dict[int, tuple[Stage, ...]] = {
    0: (
        Stage("attn_in", QKV, 0, 2, 32, True),
        Stage("attn_in", QKV, 1, 2, 32, True),
        Stage("attn_v", ("attn_v",), 1, 1, 64, False),
        Stage("attn_q", ("attn_q",), 2, 2, 32, True),
        Stage("attn_output", ("attn_output",), 0, 2, 32, False),
        Stage("attn_output", ("attn_output",), 0, 1, 64, True),
        Stage("attn_output", ("attn_output",), 1, 1, 96, True),
        Stage("ffn_in", GATE_UP, 0, 2, 64, False),
        Stage("ffn_in", GATE_UP, 2, 2, 32, False),
        Stage("ffn_down", ("ffn_down",), 0, 2, 64, True),
    ),
    1: (
        Stage("attn_in", ("attn_q", "attn_k"), 0, 0, 96, True),
        Stage("attn_in", ("attn_q", "attn_k"), 1, 2, 64, False),
        Stage("attn_output", ("attn_output",), 0, 1, 64, True),
        Stage("ffn_in", GATE_UP, 1, 2, 64, True),
        Stage("ffn_up", ("ffn_up",), 0, 2, 32, True),
        Stage("ffn_down", ("ffn_down",), 0, 0, 64, True),
        Stage("ffn_down", ("ffn_down",), 2, 2, 96, False),
    ),
}  # fmt: skip


def random_tensor(rng: np.random.Generator, rows: int, columns: int, type_: Type,
                  size: float) -> tuple[Tensor, np.ndarray]:
    """Gaussian weights as the file stores them, and their values in float64."""
    weights = (size / np.sqrt(columns) * rng.standard_normal((rows, columns))).astype(np.float32)
    stored = quantize(weights, type_)
    values = quants.dequantize(stored, type_).astype(np.float64)
    return Tensor((rows, columns), type_, stored.tobytes()), values


def set_levels(file: GGUF, levels: Sequence[float], architecture: str) -> None:
    """Make `file` one of format version 2."""
    file.set(fmt.KEY_ARCHITECTURE, fmt.ARCHITECTURE_PREFIX + architecture)
    file.set(fmt.KEY_FORMAT_VERSION, fmt.LEVELS_FORMAT_VERSION, GGUFValueType.UINT32)
    file.set(fmt.KEY_RUNTIME_MIN, fmt.LEVELS_RUNTIME_MIN)
    file.set(fmt.KEY_RATIO, levels[-1], GGUFValueType.FLOAT32)
    file.keys[fmt.KEY_LEVELS] = (list(levels), GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


@dataclass(frozen=True)
class LevelFiles:
    """A file with levels, and for each level a dense file of the weights multiplied out in float64."""

    path: Path
    dense: tuple[Path, ...]


def stage_names(stage: Stage, layer: int, count: int) -> tuple[str, str, list[str]]:
    """Names of a stage's projection, mask and members' B'."""
    levels = None if (stage.first, stage.last) == (0, count - 1) else (stage.first, stage.last)
    return (fmt.lr_a_name(layer, stage.owner, levels), fmt.skip_mask_name(layer, stage.owner, levels),
            [fmt.lr_b_name(layer, member, levels) for member in stage.members])


def add_levels(base: GGUF, sizes: Sizes, stages: Mapping[int, Sequence[Stage]], type_: Type, directory: Path,
               architecture: str, levels: Sequence[float] = LEVELS) -> LevelFiles:
    """Put factors of `type_` in place of the weights of `base`, a dense model."""
    rng = np.random.default_rng(1)
    places = range(len(levels))
    file, dense = base.copy(), [base.copy() for _ in places]
    for layer, block in stages.items():
        products: dict[str, list[list[np.ndarray]]] = {member: [[] for _ in places] for member in sizes}
        for stage in block:
            n = sizes[stage.members[0]][1]
            a_name, mask_name, b_names = stage_names(stage, layer, len(levels))
            columns = n - stage.rank if stage.skip else n
            file.tensors[a_name], A = random_tensor(rng, stage.rank, columns, type_, 0.7)
            if stage.skip:
                skip = np.zeros(n, bool)
                skip[rng.choice(n, stage.rank, replace=False)] = True
                file.tensors[mask_name] = Tensor.of(fmt.pack_skip_mask(skip))
                T, A = A, np.zeros((stage.rank, n))
                A[:, skip], A[:, ~skip] = np.eye(stage.rank), T
            for member, b_name in zip(stage.members, b_names, strict=True):
                file.tensors[b_name], B = random_tensor(rng, sizes[member][0], stage.rank, type_, 1.0)
                for place in range(stage.first, stage.last + 1):
                    products[member][place].append(B @ A)
        for member, (m, n) in sizes.items():
            name = fmt.weight_name(layer, member)
            del file.tensors[name]
            W = np.empty(0)
            if not all(products[member]):
                file.tensors[name], W = random_tensor(rng, m, n, type_, 1.0)
            for other, parts in zip(dense, products[member], strict=True):
                other.tensors[name] = Tensor.of((sum(parts) if parts else W).astype(np.float32))
    set_levels(file, levels, architecture)
    return LevelFiles(
        file.write(directory / f"levels-{type_.name}.gguf"),
        tuple(other.write(directory / f"dense-{type_.name}-{i}.gguf") for i, other in enumerate(dense)),
    )


def small_base(directory: Path) -> GGUF:
    """A dense F32 llama of random weights, without a vocabulary."""
    path = directory / "base.gguf"
    write(plan(SMALL, Type.F32, 1.0, 0), path, None)
    return GGUF.read(path)


BERT_SIZES: Sizes = {
    "attn_q": (64, 64), "attn_k": (64, 64), "attn_v": (64, 64), "attn_output": (64, 64),
    "ffn_up": (160, 64), "ffn_down": (64, 160),
}  # fmt: skip
BERT_STAGES: dict[int, tuple[Stage, ...]] = {
    0: (
        Stage("attn_in", QKV, 0, 1, 16, True),
        Stage("attn_in", QKV, 0, 0, 32, True),  # the lower level has the larger graph
        Stage("attn_output", ("attn_output",), 1, 1, 32, False),
        Stage("ffn_up", ("ffn_up",), 0, 0, 32, True),
        Stage("ffn_down", ("ffn_down",), 0, 1, 32, True),
        Stage("ffn_down", ("ffn_down",), 1, 1, 32, True),
    ),
}  # fmt: skip


def bert_base() -> GGUF:
    """A dense F32 BERT of one block and random weights, without a vocabulary."""
    rng = np.random.default_rng(2)
    file = GGUF({}, {})
    file.set(fmt.KEY_ARCHITECTURE, "bert")
    file.set("tokenizer.ggml.model", "no_vocab")
    integers = {
        "bert.vocab_size": 288, "bert.block_count": 1, "bert.context_length": 128,
        "bert.embedding_length": 64, "bert.feed_forward_length": 160, "bert.attention.head_count": 4,
        "bert.pooling_type": 1, "tokenizer.ggml.token_type_count": 1,
    }  # fmt: skip
    for name, integer in integers.items():
        file.set(name, integer, GGUFValueType.UINT32)
    file.set("bert.attention.layer_norm_epsilon", 1e-5, GGUFValueType.FLOAT32)
    file.set("bert.attention.causal", False, GGUFValueType.BOOL)
    matrices = {"token_embd": (288, 64), "position_embd": (128, 64)}
    matrices |= {f"blk.0.{name}": size for name, size in BERT_SIZES.items()}
    for name, (rows, columns) in matrices.items():
        file.tensors[f"{name}.weight"], _ = random_tensor(rng, rows, columns, Type.F32, 1.0)
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        file.tensors[f"{name}.weight"] = Tensor.of(np.ones(64, np.float32))
        file.tensors[f"{name}.bias"] = Tensor.of(np.zeros(64, np.float32))
    return file
