"""Tiny sound models of every form that the loader knows: what tests/hostile_files.py and the fuzzer damage.

`python tests/hostile_seeds.py DIRECTORY` writes them there, for `make fuzz`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType, TokenType, quants
from gguf_edit import GGUF, Tensor
from level_models import QKV, Stage, set_levels, stage_names

from skipcat_edge import format as fmt

GATE_UP = ("ffn_gate", "ffn_up")
_U32, _F32, _BOOL = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.BOOL


def _weights(rng: np.random.Generator, rows: int, columns: int, type_: Type) -> Tensor:
    values = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
    return Tensor((rows, columns), type_, quants.quantize(values, type_).tobytes())


def _keys(file: GGUF, keys: dict[str, object]) -> None:
    types = {bool: _BOOL, int: _U32, float: _F32, str: GGUFValueType.STRING}
    items = {int: GGUFValueType.INT32, float: _F32, str: GGUFValueType.STRING}
    for name, value in keys.items():
        if isinstance(value, list):
            file.keys[name] = value, GGUFValueType.ARRAY, items[type(value[0])]
        else:
            file.set(name, value, types[type(value)])


def _add_stages(
    file: GGUF,
    stages: Sequence[Stage],
    layer: int,
    sizes: dict[str, tuple[int, int]],
    count: int,
    type_: Type,
    rng: np.random.Generator,
) -> None:
    """Factors in place of dense weights, which stay where some level has none; `sizes`: outputs, inputs."""
    for stage in stages:
        n = sizes[stage.members[0]][1]
        a_name, mask_name, b_names = stage_names(stage, layer, count)
        columns = n - stage.rank if stage.skip else n
        file.tensors[a_name] = _weights(rng, stage.rank, columns, fmt.factor_type(type_, columns))
        if stage.skip:
            skip = np.zeros(n, bool)
            skip[rng.choice(n, stage.rank, replace=False)] = True
            file.tensors[mask_name] = Tensor.of(fmt.pack_skip_mask(skip))
        for member, b_name in zip(stage.members, b_names, strict=True):
            file.tensors[b_name] = _weights(
                rng, sizes[member][0], stage.rank, fmt.factor_type(type_, stage.rank)
            )
    for member, size in sizes.items():
        used = {
            place
            for stage in stages
            if member in stage.members
            for place in range(stage.first, stage.last + 1)
        }
        if len(used) < count:
            file.tensors[fmt.weight_name(layer, member)] = _weights(rng, *size, type_)


def _llama(
    n_embd: int,
    n_ff: int,
    n_vocab: int,
    type_: Type,
    blocks: Sequence[Sequence[Stage]],
    levels: Sequence[float],
) -> GGUF:
    rng = np.random.default_rng(n_embd)
    file = GGUF({}, {})
    file.set(fmt.KEY_ARCHITECTURE, "skipcat-llama")
    _keys(file, {
        fmt.KEY_FORMAT_VERSION: fmt.FORMAT_VERSION, fmt.KEY_RUNTIME_MIN: fmt.RUNTIME_MIN, fmt.KEY_RATIO: 0.5,
        "general.name": "tiny", "llama.vocab_size": n_vocab, "llama.context_length": 64,
        "llama.embedding_length": n_embd, "llama.block_count": len(blocks), "llama.feed_forward_length": n_ff,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": n_embd // 4, "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    })  # fmt: skip
    if len(levels) > 1:
        set_levels(file, levels, "llama")
    file.tensors["token_embd.weight"] = _weights(rng, n_vocab, n_embd, Type.Q8_0)
    file.tensors["output_norm.weight"] = Tensor.of(np.ones(n_embd, np.float32))
    sizes = {
        "attn_q": (n_embd, n_embd), "attn_k": (n_embd // 2, n_embd), "attn_v": (n_embd // 2, n_embd),
        "attn_output": (n_embd, n_embd), "ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd),
        "ffn_down": (n_embd, n_ff),
    }  # fmt: skip
    for layer, stages in enumerate(blocks):
        for norm in ("attn_norm", "ffn_norm"):
            file.tensors[f"blk.{layer}.{norm}.weight"] = Tensor.of(np.ones(n_embd, np.float32))
        _add_stages(file, stages, layer, sizes, len(levels), type_, rng)
    return file


def _one_level(rank: int) -> list[Stage]:
    return [
        Stage("attn_in", QKV, 0, 0, rank, True), Stage("attn_output", ("attn_output",), 0, 0, rank, False),
        Stage("ffn_in", GATE_UP, 0, 0, rank, True), Stage("ffn_down", ("ffn_down",), 0, 0, rank, True),
    ]  # fmt: skip


def skip_file() -> GGUF:
    """Version 1, F16, a SentencePiece vocabulary, and a feed-forward width that leaves mask bits to spare."""
    # 76 inputs are no whole number of the vectors that a mask is applied in
    file = _llama(32, 76, 262, Type.F16, [_one_level(8), _one_level(16)[:2]], [0.5])
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "\u2581a", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.NORMAL] * 3, *[TokenType.BYTE] * 256]
    _keys(file, {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(262)],
        "tokenizer.ggml.token_type": [int(type_) for type_ in types], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
    })  # fmt: skip
    return file


def levels_file() -> GGUF:
    """Three levels of Q4_0, which the CPU repacks, dense weights between them, and a BPE vocabulary."""
    block = [
        Stage("attn_in", QKV, 0, 2, 32, True), Stage("attn_v", ("attn_v",), 1, 1, 32, False),
        Stage("attn_output", ("attn_output",), 1, 2, 32, True), Stage("ffn_in", GATE_UP, 0, 1, 32, False),
        Stage("ffn_down", ("ffn_down",), 0, 2, 32, True), Stage("ffn_down", ("ffn_down",), 2, 2, 32, True),
    ]  # fmt: skip
    file = _llama(64, 96, 40, Type.Q4_0, [block], [0.5, 0.7, 0.9])
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [
        "<|endoftext|>",
        *letters,
        "\u0120",
        "\u010a",
        "he",
        "ti",
        "on",
        "me",
        "\u0120a",
        "O",
        "n,",
        ",",
        "1",
        "2",
        "3",
    ]
    _keys(file, {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(TokenType.CONTROL), *[int(TokenType.NORMAL)] * 39],
        "tokenizer.ggml.merges": ["h e", "t i", "o n", "m e", "\u0120 a"], "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    })  # fmt: skip
    return file


def encoder_file() -> GGUF:
    """A BERT of one block in F16, with biases and a WordPiece vocabulary."""
    rng = np.random.default_rng(3)
    n_embd, n_ff, n_vocab = 32, 64, 40
    file = GGUF({}, {})
    file.set(fmt.KEY_ARCHITECTURE, "skipcat-bert")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"\u2581{chr(97 + i)}" for i in range(26)),
              "\u2581once", "\u2581upon", "\u2581time", "on", "ce", "n", "e", "x", "y"]  # fmt: skip
    _keys(file, {
        fmt.KEY_FORMAT_VERSION: fmt.FORMAT_VERSION, fmt.KEY_RUNTIME_MIN: fmt.RUNTIME_MIN, fmt.KEY_RATIO: 0.5,
        "bert.block_count": 1, "bert.context_length": 64, "bert.embedding_length": n_embd,
        "bert.feed_forward_length": n_ff, "bert.attention.head_count": 2, "bert.pooling_type": 1,
        "bert.attention.layer_norm_epsilon": 1e-5, "bert.attention.causal": False,
        "tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.token_type": [int(TokenType.CONTROL)] * 5 + [int(TokenType.NORMAL)] * 35,
        "tokenizer.ggml.unknown_token_id": 1, "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
    })  # fmt: skip
    for name, rows in (("token_embd", n_vocab), ("position_embd", 64), ("token_types", 2)):
        file.tensors[f"{name}.weight"] = _weights(
            rng, rows, n_embd, Type.F16 if rows == n_vocab else Type.F32
        )
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        file.tensors[f"{name}.weight"] = Tensor.of(np.ones(n_embd, np.float32))
        file.tensors[f"{name}.bias"] = Tensor.of(np.zeros(n_embd, np.float32))
    sizes = dict.fromkeys((*QKV, "attn_output"), (n_embd, n_embd))
    sizes |= {"ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
    stages = [
        Stage("attn_in", QKV, 0, 0, 8, True), Stage("attn_output", ("attn_output",), 0, 0, 8, True),
        Stage("ffn_down", ("ffn_down",), 0, 0, 16, True),
    ]  # fmt: skip
    _add_stages(file, stages, 0, sizes, 1, Type.F16, rng)
    for member, (rows, _) in sizes.items():
        file.tensors[f"blk.0.{member}.bias"] = Tensor.of(np.zeros(rows, np.float32))
    return file


def plain_file() -> GGUF:
    """An ordinary dense llama, which takes llama.cpp's own ways."""
    file = _llama(32, 64, 40, Type.F16, [[]], [0.5])
    file.set(fmt.KEY_ARCHITECTURE, "llama")
    file.set("tokenizer.ggml.model", "no_vocab")
    return file


SEEDS = {"skip": skip_file, "levels": levels_file, "encoder": encoder_file}


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in SEEDS.items():
        make().write(directory / f"{name}.gguf")


if __name__ == "__main__":
    main()
