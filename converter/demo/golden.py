"""Make what `skipcat-edge runtime selftest` compares with: tiny models, and the logits they should give.

    python converter/demo/golden.py [--out skipcat_edge/runtime/golden]

Each model is one block of the demo model in one type, with the form of its layers mixed, so that it takes
every kernel that a low-rank file of that type takes. The logits are computed here with NumPy in float64
from what the files store: no code of the runtime has a part in them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from skipcat_converter.base_gguf import write_base
from skipcat_converter.factorize import decompose, factorize

from skipcat_edge import format as fmt
from skipcat_edge.runtime.library import quantize
from skipcat_edge.runtime.selftest import GOLDEN, LOGITS, TOKENS
from skipcat_edge.runtime.source import stock_tree

DEMO = Path(__file__).resolve().parent

# With no layer of this block the logits are what they were: setting any one to zero moves them by more
# than their own size. Of the first block, whose attention adds little, that is not so.
BLOCK = 1
# Pieces of words; the special tokens and the bytes before them are hardly trained. No multiple of 8, so
# that the head is a matrix whose rows are not interleaved.
VOCABULARY = slice(259, 381)
# Of 768: two blocks of a K-quant, so that one of them can be skipped.
N_FF = 512
# Eight groups of four tokens and one more: matrix kernels with a remainder.
N_TOKENS = 33

Weights = dict[str, np.ndarray]
"""Arrays by their names in a file, rows first."""


@dataclass(frozen=True)
class Form:
    """Layers that share one projection."""

    members: tuple[str, ...]
    rank: int
    skip: bool


@dataclass(frozen=True)
class Golden:
    """One model: layers that no form names stay dense."""

    type: GGMLQuantizationType
    forms: tuple[Form, ...]


def _golden(type_: GGMLQuantizationType, attn_in: int, attn_out: int, ffn_in: int, ffn_out: int) -> Golden:
    """Both kinds of projection with Skip and without it, at these ranks, and `attn_v` dense."""
    return Golden(type_, (
        Form(("attn_q", "attn_k"), attn_in, True),
        Form(("attn_output",), attn_out, False),
        Form(("ffn_gate", "ffn_up"), ffn_in, False),
        Form(("ffn_down",), ffn_out, True),
    ))


# Ranks are odd numbers of blocks where they can be: kernels that take two at a time have a remainder.
GOLDENS = (
    _golden(GGMLQuantizationType.F16, 40, 24, 24, 72),
    _golden(GGMLQuantizationType.Q8_0, 96, 32, 32, 96),
    _golden(GGMLQuantizationType.Q4_0, 96, 32, 32, 96),
    # A block of 256 leaves one rank: all of attn_in's inputs, half of ffn_out's.
    Golden(GGMLQuantizationType.Q4_K, (
        Form(("attn_q", "attn_k"), 256, False), Form(("ffn_down",), 256, True))),
)


def cut(reader: GGUFReader) -> Weights:
    """One block, a part of the vocabulary and N_FF neurons of the dense demo model, as float32."""
    weights = {}
    for tensor in reader.tensors:
        W = np.array(tensor.data, np.float32)
        place = fmt.split_block(tensor.name)
        if place is None:
            weights[tensor.name] = W[VOCABULARY] if tensor.name == "token_embd.weight" else W
        elif place[0] == BLOCK:
            if place[1] in ("ffn_gate.weight", "ffn_up.weight"):
                W = W[:N_FF]
            elif place[1] == "ffn_down.weight":
                W = W[:, :N_FF]
            weights[f"blk.0.{place[1]}"] = W
    return weights


def factored(dense: Weights, forms: Sequence[Form]) -> Weights:
    """`dense` with factors instead of the weights that `forms` name, and their masks."""
    weights = dict(dense)
    for form in forms:
        parts = [weights.pop(fmt.weight_name(0, member)) for member in form.members]
        W = torch.from_numpy(np.concatenate(parts))
        factors = factorize(W, decompose(W, None), form.rank, form.skip)
        owner = fmt.owner_of(form.members)
        weights[fmt.lr_a_name(0, owner)] = factors.T.numpy()
        if factors.skip is not None:
            skip = np.zeros(W.shape[1], bool)
            skip[factors.skip.numpy()] = True
            weights[fmt.skip_mask_name(0, owner)] = fmt.pack_skip_mask(skip)
        outputs = [len(part) for part in parts]
        for member, B in zip(form.members, factors.B.split(outputs), strict=True):
            weights[fmt.lr_b_name(0, member)] = B.numpy()
    return weights


def write(path: Path, base: GGUFReader, weights: Weights, type_: GGMLQuantizationType) -> None:
    """Write a low-rank file of one block, without a tokenizer, with all matrices in `type_`."""
    writer = GGUFWriter(path, "skipcat-llama")
    own = {"llama.block_count": 1, "llama.feed_forward_length": N_FF,
           "llama.vocab_size": len(weights["token_embd.weight"])}
    for name, field in base.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, own.get(name, field.contents()), field.types[0])
    writer.add_tokenizer_model("no_vocab")
    writer.add_quantization_version(2)
    writer.add_uint32(fmt.KEY_FORMAT_VERSION, fmt.FORMAT_VERSION)
    writer.add_string(fmt.KEY_RUNTIME_MIN, "skipcat.1")  # every patched runtime can be tested
    writer.add_string(fmt.KEY_SOURCE_NAME, "demo")
    for name, W in weights.items():
        if W.ndim == 1:
            writer.add_tensor(name, W)
        elif type_ == GGMLQuantizationType.F16:
            writer.add_tensor(name, W.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(W, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> tuple[Weights, Mapping[str, Any]]:
    """What `path` stores, as float64 (masks as they are), and its `llama.*` keys without that prefix."""
    reader = GGUFReader(path)
    weights = {
        tensor.name: np.array(tensor.data) if tensor.name.endswith("skip_mask")
        else quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in reader.tensors
    }
    keys = {name.removeprefix("llama."): field.contents()
            for name, field in reader.fields.items() if name.startswith("llama.")}
    return weights, keys


def linear(weights: Weights, member: str, x: np.ndarray) -> np.ndarray:
    """The layer `member` of the block for x: [tokens, n], dense or by its factors: [tokens, m]."""
    dense = weights.get(fmt.weight_name(0, member))
    y: np.ndarray
    if dense is not None:
        y = x @ dense.T
        return y
    owner = member if fmt.lr_a_name(0, member) in weights else fmt.GROUP_OF[member]
    T, mask = weights[fmt.lr_a_name(0, owner)], weights.get(fmt.skip_mask_name(0, owner))
    if mask is None:
        z = x @ T.T
    else:
        skip = fmt.unpack_skip_mask(mask, x.shape[1])
        z = x[:, skip] + x[:, ~skip] @ T.T
    y = z @ weights[fmt.lr_b_name(0, member)].T
    return y


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits after each of `tokens`: [tokens, vocabulary], of a Llama of one block, in float64."""
    weights, keys = read(path)
    heads, heads_kv = keys["attention.head_count"], keys["attention.head_count_kv"]
    count, size = len(tokens), keys["attention.key_length"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        epsilon = keys["attention.layer_norm_rms_epsilon"]
        scaled: np.ndarray = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weights[name]
        return scaled

    angle = np.arange(count)[:, None] * keys["rope.freq_base"] ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * angle)[:, None]  # [tokens, 1, size / 2]

    def rotate(x: np.ndarray) -> np.ndarray:
        """RoPE on x: [tokens, heads, size] whose neighbours are pairs, as llama.cpp permutes them."""
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = weights["token_embd.weight"][tokens]
    h = norm(x, "blk.0.attn_norm.weight")
    q = rotate(linear(weights, "attn_q", h).reshape(count, heads, size))
    k = rotate(linear(weights, "attn_k", h).reshape(count, heads_kv, size))
    v = linear(weights, "attn_v", h).reshape(count, heads_kv, size)
    k, v = (np.repeat(part, heads // heads_kv, axis=1) for part in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size)
    scores[:, ~np.tri(count, dtype=bool)] = -np.inf
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    x = x + linear(weights, "attn_output", np.einsum("hij,jhd->ihd", weight, v).reshape(count, -1))
    h = norm(x, "blk.0.ffn_norm.weight")
    gate = linear(weights, "ffn_gate", h)
    x = x + linear(weights, "ffn_down", gate / (1 + np.exp(-gate)) * linear(weights, "ffn_up", h))
    head: np.ndarray = norm(x, "output_norm.weight") @ weights["token_embd.weight"].T
    return head


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=GOLDEN, show_default=True)
def main(out: Path) -> None:
    """Write the models, NAME.gguf, and all logits, in float32."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "base.gguf"
        write_base(DEMO / "model", dense, "f32", stock_tree())
        base = GGUFReader(dense)
        weights = cut(base)
        tokens = np.random.default_rng(0).integers(len(weights["token_embd.weight"]), size=N_TOKENS)
        arrays = {TOKENS: tokens.astype(np.int32)}
        for golden in GOLDENS:
            path = out / f"{golden.type.name}.gguf"
            write(path, base, factored(weights, golden.forms), golden.type)
            arrays[golden.type.name] = logits(path, tokens).astype(np.float32)
            click.echo(f"{path} {path.stat().st_size}")
        del base  # the mapped file
    np.savez(out / LOGITS, **arrays)  # type: ignore[arg-type]  # none is called allow_pickle


if __name__ == "__main__":
    main()
