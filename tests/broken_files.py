"""Every way we could think of to break a low-rank file, each with the name its refusal must mention."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType
from gguf_edit import GGUF, Tensor

from skipcat_edge import format as fmt

BLOCKS = 2
FFN = 760  # not a multiple of 32, so that the mask of ffn_down has bits to spare
LLAMA = "llama"

A, MASK = fmt.lr_a_name(0, "attn_in"), fmt.skip_mask_name(0, "attn_in")
Q, K, V = (fmt.lr_b_name(0, name) for name in ("attn_q", "attn_k", "attn_v"))
DOWN_MASK = fmt.skip_mask_name(0, "ffn_down")
GATE, UP = fmt.lr_b_name(0, "ffn_gate"), fmt.lr_b_name(0, "ffn_up")
OUT_A, OUT_B = fmt.lr_a_name(0, "attn_output"), fmt.lr_b_name(0, "attn_output")

Edit = Callable[[GGUF], object]
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Broken:
    """One broken file: what to do to a sound one, and what the refusal must name."""

    names: str
    edit: Edit | None = None
    damage: Damage | None = None
    """Applied to the bytes of the written file."""


BROKEN: dict[str, Broken] = {}


def broken(names: str) -> Callable[[Edit], Edit]:
    """Register an edit; the refusal must mention `names`."""

    def register(edit: Edit) -> Edit:
        BROKEN[edit.__name__] = Broken(names, edit)
        return edit

    return register


def damaged(names: str) -> Callable[[Damage], Damage]:
    """Register a change of the file's bytes."""

    def register(damage: Damage) -> Damage:
        BROKEN[damage.__name__] = Broken(names, damage=damage)
        return damage

    return register


def sound_file(path: Path) -> GGUF:
    """`path`, a low-rank llama, cut to two blocks and to a feed-forward width of `FFN`."""
    file = GGUF.read(path)
    rng = np.random.default_rng(0)
    for name in [name for name in file.tensors if name.startswith("blk.")]:
        if int(name.split(".")[1]) >= BLOCKS:
            del file.tensors[name]
    for layer in range(BLOCKS):
        for member in ("ffn_gate", "ffn_up"):
            name = fmt.lr_b_name(layer, member)
            file.tensors[name] = Tensor.of(file.tensors[name].array()[:FFN])
        a = fmt.lr_a_name(layer, "ffn_down")
        rank = file.tensors[a].shape[0]
        file.tensors[a] = Tensor.of(np.zeros((rank, FFN - rank), np.float16))
        skip = np.zeros(FFN, dtype=bool)
        skip[rng.choice(FFN, rank, replace=False)] = True
        file.tensors[fmt.skip_mask_name(layer, "ffn_down")] = Tensor.of(fmt.pack_skip_mask(skip))
    file.set(f"{LLAMA}.block_count", BLOCKS, GGUFValueType.UINT32)
    file.set(f"{LLAMA}.feed_forward_length", FFN, GGUFValueType.UINT32)
    return file


def _zeros(file: GGUF, name: str, shape: tuple[int, ...], type_: Type = Type.F16) -> None:
    file.tensors[name] = Tensor.zeros(shape, type_)


def _flip(file: GGUF, mask: str, n: int, wanted: bool) -> None:
    """Set (or clear) one bit of a mask that is not (is) set."""
    skip = fmt.unpack_skip_mask(file.tensors[mask].array(), n)
    skip[np.flatnonzero(skip != wanted)[0]] = wanted
    file.tensors[mask] = Tensor.of(fmt.pack_skip_mask(skip))


# --- shapes, values and absence, one tensor at a time ---


def _change(name: str, tensor: str, change: Callable[[Tensor], Tensor | None], names: str = "") -> None:
    """Register the replacement of one tensor, or its removal; the refusal must name it, or `names`."""

    def edit(file: GGUF) -> None:
        changed = change(file.tensors.pop(tensor))
        if changed is not None:
            file.tensors[tensor] = changed

    BROKEN[name] = Broken(names or tensor, edit)


def _reshape(name: str, tensor: str, change: Callable[[int, int], tuple[int, ...]]) -> None:
    _change(name, tensor, lambda t: Tensor.zeros(change(t.shape[0], t.shape[1]), t.type))


def _words(name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    _change(name, MASK, lambda t: Tensor.of(change(t.array())))


_words("mask_of_zeros", lambda words: np.zeros_like(words))
_words("mask_of_ones", lambda words: np.full_like(words, -1))
_words("mask_too_short", lambda words: words[:-1])
_words("mask_too_long", lambda words: np.append(words, np.int32(0)))
_words("mask_empty", lambda words: words[:0])
_words("mask_of_two_dimensions", lambda words: words.reshape(2, -1))
_words("mask_in_rows_of_its_own_length", lambda words: np.stack([words, words]))
_change("mask_of_floats", MASK, lambda t: Tensor(t.shape, Type.F32, t.data))
_change("mask_of_bytes", MASK, lambda t: Tensor((len(t.data),), Type.I8, t.data))
_change("mask_missing", MASK, lambda t: None, names=A)

_reshape("projection_of_rank_plus_8", A, lambda rank, rest: (rank + 8, rest))
_reshape("projection_of_rank_minus_8", A, lambda rank, rest: (rank - 8, rest))
_reshape("projection_for_other_inputs", A, lambda rank, rest: (rank, rest + 8))
_reshape("projection_of_all_inputs_besides_a_mask", A, lambda rank, rest: (rank, rank + rest))
_reshape("projection_transposed", A, lambda rank, rest: (rest, rank))
_reshape("projection_of_three_dimensions", A, lambda rank, rest: (2, rank, rest))
_reshape("projection_of_one_dimension", A, lambda rank, rest: (rest,))
_change("projection_missing", A, lambda t: None)
_change("own_projection_missing", OUT_A, lambda t: None)

_reshape("member_of_another_rank", K, lambda m, rank: (m, rank - 8))
_reshape("later_member_of_another_rank", UP, lambda m, rank: (m, rank + 8))
_reshape("member_with_other_outputs", K, lambda m, rank: (m + 8, rank))
_reshape("member_of_one_dimension", K, lambda m, rank: (rank,))
_reshape("member_of_three_dimensions", K, lambda m, rank: (2, m, rank))
_change("member_missing", K, lambda t: None, names="blk.0.attn_k")
_change("gate_missing", GATE, lambda t: None, names="blk.0.ffn_gate")


@broken("blk.0.attn_")
def all_members_missing(file: GGUF) -> None:
    del file.tensors[Q], file.tensors[K], file.tensors[V]


@broken(A)
def projection_and_mask_missing(file: GGUF) -> None:
    del file.tensors[A], file.tensors[MASK]


# --- bits of masks ---


@broken(MASK)
def mask_with_a_bit_too_few(file: GGUF) -> None:
    _flip(file, MASK, 256, False)


@broken(MASK)
def mask_with_a_bit_too_many(file: GGUF) -> None:
    _flip(file, MASK, 256, True)


@broken(DOWN_MASK)
def mask_with_a_stray_bit(file: GGUF) -> None:
    words = file.tensors[DOWN_MASK].array().copy()
    words[-1] |= np.int32(-(2**31))
    file.tensors[DOWN_MASK] = Tensor.of(words)


@broken(DOWN_MASK)
def mask_with_a_stray_bit_and_the_right_count(file: GGUF) -> None:
    _flip(file, DOWN_MASK, FFN, False)
    words = file.tensors[DOWN_MASK].array().copy()
    words[-1] |= np.int32(1 << FFN % 32)
    file.tensors[DOWN_MASK] = Tensor.of(words)


# --- tensors in the wrong place ---


@broken(OUT_A)
def own_factors_swapped(file: GGUF) -> None:
    file.swap(OUT_A, OUT_B)


@broken(A)
def factors_of_a_group_swapped(file: GGUF) -> None:
    file.swap(A, K)


@broken(fmt.skip_mask_name(0, "attn_q"))
def mask_without_projection(file: GGUF) -> None:
    file.tensors[fmt.skip_mask_name(0, "attn_q")] = file.tensors[MASK]


@broken(f"{MASK}.weight")
def mask_named_as_a_weight(file: GGUF) -> None:
    file.rename(MASK, f"{MASK}.weight")


@broken(fmt.lr_a_name(0, "attn_q"))
def own_and_group_projection(file: GGUF) -> None:
    file.tensors[fmt.lr_a_name(0, "attn_q")] = file.tensors[A]


@broken(A)
def own_projections_for_all_and_a_group_projection(file: GGUF) -> None:
    for member in ("attn_q", "attn_k", "attn_v"):
        file.tensors[fmt.lr_a_name(0, member)] = file.tensors[A]
        file.tensors[fmt.skip_mask_name(0, member)] = file.tensors[MASK]


@broken("blk.0.attn_in.lr_a.0.0.weight")
def projection_in_stages(file: GGUF) -> None:
    file.rename(A, "blk.0.attn_in.lr_a.0.0.weight")


@broken("blk.0.attn_in.lr_a.1.1.weight")
def second_stage_besides_a_projection(file: GGUF) -> None:
    file.tensors["blk.0.attn_in.lr_a.1.1.weight"] = file.tensors[A]


@broken("blk.0.attn_in.lr_a.bias")
def projection_with_a_bias(file: GGUF) -> None:
    file.tensors["blk.0.attn_in.lr_a.bias"] = Tensor.of(np.zeros(256, np.float32))


@broken(fmt.weight_name(0, "attn_q"))
def dense_weight_besides_its_factors(file: GGUF) -> None:
    _zeros(file, fmt.weight_name(0, "attn_q"), (256, 256))


@broken("blk.0.attn_")
def fused_factor_besides_its_parts(file: GGUF) -> None:
    _zeros(file, fmt.lr_b_name(0, "attn_qkv"), (512, file.tensors[A].shape[0]))


# --- ranks at the edge ---


def _ranks(file: GGUF, rank: int) -> None:
    _zeros(file, A, (rank, 256 - rank))
    for name in (Q, K, V):
        _zeros(file, name, (file.tensors[name].shape[0], rank))
    skip = np.arange(256) < rank
    file.tensors[MASK] = Tensor.of(fmt.pack_skip_mask(skip))


@broken("blk.0.attn_")
def rank_zero(file: GGUF) -> None:
    _ranks(file, 0)


@broken("blk.0.attn_")
def rank_zero_without_mask(file: GGUF) -> None:
    _ranks(file, 0)
    _zeros(file, A, (0, 256))
    del file.tensors[MASK]


@broken("blk.0.attn_")
def rank_of_all_inputs(file: GGUF) -> None:
    _ranks(file, 256)


@broken("blk.0.attn_")
def rank_above_the_inputs(file: GGUF) -> None:
    for name in (Q, K, V):
        _zeros(file, name, (file.tensors[name].shape[0], 264))
    _zeros(file, A, (264, 256))
    del file.tensors[MASK]


@broken("blk.0.attn_")
def rank_far_above_the_inputs(file: GGUF) -> None:
    for name in (Q, K, V):
        _zeros(file, name, (file.tensors[name].shape[0], 2**16))


# --- types that no factor can have ---


def _type(name: str, type_: Type) -> None:
    def edit(file: GGUF) -> None:
        # Without a mask and at full rank every row is a whole number of any type's blocks.
        rank = 256
        del file.tensors[MASK]
        for factor, rows in ((A, rank), (Q, 256), (K, 128), (V, 128)):
            _zeros(file, factor, (rows, 256), type_ if factor == name else Type.F16)

    role = "projection" if name == A else "member"
    BROKEN[f"{role}_of_{type_.name}"] = Broken(name, edit)


for _name in (A, K):
    for _type_ in (Type.I8, Type.I16, Type.I32, Type.I64, Type.F64, Type.Q8_1, Type.Q8_K):
        _type(_name, _type_)


# --- layers that cannot be low-rank ---


def _factors(name: str, tensor: str, m: int, *, dense: bool) -> None:
    """Factors of rank 8 for a weight of 256 inputs, instead of it or (`dense`) besides it."""

    def edit(file: GGUF) -> None:
        if not dense:
            del file.tensors[f"{tensor}.weight"]
        _zeros(file, f"{tensor}.lr_a.weight", (8, 256))
        _zeros(file, f"{tensor}.lr_b.weight", (m, 8))

    BROKEN[name] = Broken(f"{tensor}.", edit)


_factors("factors_of_the_embeddings", "token_embd", 2048, dense=False)
_factors("factors_besides_the_embeddings", "token_embd", 2048, dense=True)
_factors("factors_of_the_head", "output", 2048, dense=True)
_factors("factors_of_a_norm", "blk.0.attn_norm", 256, dense=False)
_factors("factors_besides_a_norm", "blk.0.attn_norm", 256, dense=True)
_factors("factors_of_the_last_norm", "output_norm", 256, dense=False)
_factors("factors_of_a_layer_that_llama_lacks", "blk.0.attn_k_norm", 256, dense=True)
_factors("factors_of_experts", "blk.0.ffn_gate_exps", FFN, dense=True)


@broken(f"blk.{BLOCKS}.attn_")
def factors_of_a_block_past_the_last(file: GGUF) -> None:
    for name in (A, MASK, Q, K, V):
        file.tensors[name.replace("blk.0.", f"blk.{BLOCKS}.")] = file.tensors[name]


@broken("blk.-1.attn_q.lr_b.weight")
def factors_of_block_minus_one(file: GGUF) -> None:
    file.tensors["blk.-1.attn_q.lr_b.weight"] = file.tensors[Q]


# --- keys ---


def _key(name: str, key: str, value: object, type_: GGUFValueType, names: str | None = None) -> None:
    def edit(file: GGUF) -> None:
        file.set(key, value, type_)

    BROKEN[name] = Broken(names or key, edit)


def _no_key(name: str, key: str) -> None:
    BROKEN[name] = Broken(key, lambda file: file.keys.pop(key))


_U32, _STRING = GGUFValueType.UINT32, GGUFValueType.STRING
_VERSION, _RUNTIME = fmt.KEY_FORMAT_VERSION, fmt.KEY_RUNTIME_MIN

_key("format_version_3", _VERSION, 3, _U32)
_key("format_version_2_without_levels", _VERSION, 2, _U32, names=fmt.KEY_LEVELS)
_key("format_version_0", _VERSION, 0, _U32)
_key("format_version_of_32_bits", _VERSION, 2**32 - 1, _U32)
_key("format_version_as_a_string", _VERSION, "1", _STRING)
_key("format_version_as_a_signed_integer", _VERSION, 1, GGUFValueType.INT32)
_key("format_version_as_a_float", _VERSION, 1.0, GGUFValueType.FLOAT32)
_no_key("format_version_missing", _VERSION)
_key("runtime_of_the_future", _RUNTIME, f"skipcat.{10**6}", _STRING)
_key("runtime_of_no_machine_integer", _RUNTIME, "skipcat.99999999999999999999", _STRING)
_key("runtime_garbage", _RUNTIME, "garbage", _STRING)
_key("runtime_without_a_number", _RUNTIME, "skipcat.", _STRING)
_key("runtime_with_a_word", _RUNTIME, "skipcat.one", _STRING)
_key("runtime_with_more_behind", _RUNTIME, "skipcat.1.5", _STRING)
_key("runtime_zero", _RUNTIME, "skipcat.0", _STRING)
_key("runtime_negative", _RUNTIME, "skipcat.-1", _STRING)
_key("runtime_empty", _RUNTIME, "", _STRING)
_key("runtime_as_a_number", _RUNTIME, 1, _U32)
_no_key("runtime_missing", _RUNTIME)

for _architecture in ("skipcat-nonsense", "skipcat-skipcat-llama", "skipcat-", "skipcat", "Skipcat-llama"):
    _key(f"architecture_{_architecture}", fmt.KEY_ARCHITECTURE, _architecture, _STRING,
         names=_architecture)


@broken("blk.0.attn_")
def plain_architecture(file: GGUF) -> None:
    file.set(fmt.KEY_ARCHITECTURE, LLAMA)


# --- bytes ---


@damaged(Q)
def duplicate_tensor(path: Path) -> None:
    # K's name is as long as Q's.
    data = path.read_bytes()
    assert data.count(K.encode()) == 1
    path.write_bytes(data.replace(K.encode(), Q.encode()))


@damaged("")
def truncated_in_the_data(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


@damaged("")
def truncated_in_the_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: data.index(K.encode()) + 4])


@damaged(MASK)
def mask_offset_past_the_end(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # After the name: the number of dimensions, one dimension, the type, the offset.
    at = data.index(MASK.encode()) + len(MASK) + 4 + 8 + 4
    struct.pack_into("<Q", data, at, 2**40)
    path.write_bytes(data)
