"""Every way we could think of to break a file with rank levels, as in broken_files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from broken_files import Broken, Edit
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType
from gguf_edit import GGUF, Tensor
from level_models import SIZES, STAGES, add_levels, small_base

from skipcat_edge import format as fmt

BROKEN_LEVELS: dict[str, Broken] = {}


def sound_levels(directory: Path) -> GGUF:
    """The small model of three levels; its tensors are named as level_models.STAGES says."""
    return GGUF.read(add_levels(small_base(directory), SIZES, STAGES, Type.F16, directory, "llama").path)


def broken(names: str) -> Callable[[Edit], Edit]:
    """Register an edit; the refusal must mention `names`."""

    def register(edit: Edit) -> Edit:
        BROKEN_LEVELS[edit.__name__] = Broken(names, edit)
        return edit

    return register


# --- the key ---


def _levels(name: str, value: object, item: GGUFValueType = GGUFValueType.FLOAT32) -> None:
    def edit(file: GGUF) -> None:
        file.keys[fmt.KEY_LEVELS] = (value, GGUFValueType.ARRAY, item)

    BROKEN_LEVELS[f"levels_{name}"] = Broken(fmt.KEY_LEVELS, edit)


_levels("one", [0.5])
_levels("nine", [0.1 * place for place in range(1, 10)])
_levels("falling", [0.5, 0.9, 0.7])
_levels("twice_the_same", [0.5, 0.9, 0.9])
_levels("from_zero", [0.0, 0.7, 0.9])
_levels("negative", [-0.5, 0.7, 0.9])
_levels("above_1", [0.5, 0.7, 1.5])
_levels("nan", [0.5, float("nan"), 0.9])
_levels("infinite", [0.5, 0.7, float("inf")])
_levels("of_doubles", [0.5, 0.7, 0.9], GGUFValueType.FLOAT64)
_levels("of_integers", [1, 2, 3], GGUFValueType.INT32)
_levels("of_strings", ["0.5", "0.7", "0.9"], GGUFValueType.STRING)


@broken(fmt.KEY_LEVELS)
def levels_missing(file: GGUF) -> None:
    del file.keys[fmt.KEY_LEVELS]


@broken(fmt.KEY_LEVELS)
def levels_a_number(file: GGUF) -> None:
    file.set(fmt.KEY_LEVELS, 0.9, GGUFValueType.FLOAT32)


@broken(fmt.KEY_LEVELS)
def levels_in_version_1(file: GGUF) -> None:
    file.set(fmt.KEY_FORMAT_VERSION, 1, GGUFValueType.UINT32)


@broken(".lr_")
def factors_of_levels_in_version_1(file: GGUF) -> None:
    file.set(fmt.KEY_FORMAT_VERSION, 1, GGUFValueType.UINT32)
    del file.keys[fmt.KEY_LEVELS]


@broken(".2")
def fewer_levels_than_the_names(file: GGUF) -> None:
    file.keys[fmt.KEY_LEVELS] = ([0.5, 0.9], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


# --- names ---

# A stage of its own, which nothing else depends on: attn_v's at the middle level.
A, B = fmt.lr_a_name(0, "attn_v", (1, 1)), fmt.lr_b_name(0, "attn_v", (1, 1))
MASK = fmt.skip_mask_name(0, "attn_q", (2, 2))


def _suffix(name: str, old: str, new: str, names: str = "") -> None:
    """Another suffix of one tensor; the refusal must name it as it then is, or `names`."""
    BROKEN_LEVELS[f"suffix_{name}"] = Broken(names or new, lambda file: file.rename(old, new))


for _suffixed, _end in (
    ("of_all_levels_written_out", ".0.2"), ("past_the_levels", ".1.3"), ("far_past_the_levels", ".9.9"),
    ("backwards", ".2.1"), ("of_one_number", ".1"), ("of_three_numbers", ".1.1.1"), ("with_a_sign", ".-1.1"),
    ("with_two_digits", ".01.1"), ("with_letters", ".a.b"), ("with_a_space", ". 1.1"), ("empty", "."),
    ("without_a_dot", "11"), ("of_a_dot_too_many", "..1.1"), ("with_a_dot_behind", ".1.1."),
    ("of_ten", ".1.10"), ("of_another_separator", ".1-1"),
):  # fmt: skip
    _suffix(_suffixed, A, f"blk.0.attn_v.lr_a{_end}.weight")
    _suffix(f"{_suffixed}_of_a_member", B, f"blk.0.attn_v.lr_b{_end}.weight")
    _suffix(f"{_suffixed}_of_a_mask", MASK, f"blk.0.attn_q.skip_mask{_end}")

_suffix("behind_weight", A, "blk.0.attn_v.lr_a.weight.1.1")
_suffix("without_weight", A, "blk.0.attn_v.lr_a.1.1")
_suffix("of_a_mask_named_as_a_weight", MASK, f"{MASK}.weight")
_suffix("of_a_bias", A, "blk.0.attn_v.lr_a.1.1.bias")
_suffix("outside_the_blocks", A, "attn_v.lr_a.1.1.weight")
# sound names, each of which leaves B without its projection
_suffix("before_the_role", A, "blk.0.attn_v.1.1.lr_a.weight", names=B)
_suffix("twice", A, "blk.0.attn_v.lr_a.1.1.lr_a.1.1.weight", names=B)
_suffix("of_an_unknown_owner", A, "blk.0.attn_x.lr_a.1.1.weight", names=B)


# --- parts of a stage ---


@broken(B)
def stage_without_projection(file: GGUF) -> None:
    del file.tensors[A]


@broken(A)
def stage_without_members(file: GGUF) -> None:
    del file.tensors[B]


@broken(B)
def projection_of_another_range(file: GGUF) -> None:
    file.rename(A, fmt.lr_a_name(0, "attn_v", (0, 1)))


@broken(fmt.skip_mask_name(0, "attn_q", (1, 1)))
def mask_of_another_range(file: GGUF) -> None:
    # T then has too few columns for a projection without Skip
    file.tensors[fmt.skip_mask_name(0, "attn_q", (1, 1))] = file.tensors[MASK]


@broken(MASK)
def mask_of_a_stage_with_a_bit_too_many(file: GGUF) -> None:
    words = file.tensors[MASK].array().copy()
    skip = fmt.unpack_skip_mask(words, 128)
    skip[np.flatnonzero(~skip)[0]] = True
    file.tensors[MASK] = Tensor.of(fmt.pack_skip_mask(skip))


@broken(A)
def stage_of_another_rank(file: GGUF) -> None:
    file.tensors[B] = Tensor.zeros((64, 32), Type.F16)


@broken(B)
def stage_with_other_outputs(file: GGUF) -> None:
    file.tensors[B] = Tensor.zeros((128, 64), Type.F16)


@broken(A)
def stage_with_other_inputs(file: GGUF) -> None:
    file.tensors[A] = Tensor.zeros((64, 160), Type.F16)


@broken(B)
def stage_of_rank_zero(file: GGUF) -> None:
    file.tensors[A], file.tensors[B] = Tensor.zeros((0, 128), Type.F16), Tensor.zeros((64, 0), Type.F16)


@broken(B)
def stage_of_integers(file: GGUF) -> None:
    file.tensors[B] = Tensor.zeros((64, 64), Type.I32)


@broken(B)
def stage_of_three_dimensions(file: GGUF) -> None:
    file.tensors[B] = Tensor.zeros((2, 64, 64), Type.F16)


# --- dense weights ---

# ffn_gate of block 1 has factors at the levels 1 and 2 only.
DENSE = fmt.weight_name(1, "ffn_gate")


@broken(DENSE)
def dense_weight_missing(file: GGUF) -> None:
    del file.tensors[DENSE]


@broken(fmt.weight_name(0, "attn_q"))
def dense_weight_besides_factors_at_every_level(file: GGUF) -> None:
    file.tensors[fmt.weight_name(0, "attn_q")] = Tensor.zeros(SIZES["attn_q"], Type.F16)


@broken(fmt.weight_name(1, "attn_q"))
def dense_weight_besides_stages_that_cover_every_level(file: GGUF) -> None:
    file.tensors[fmt.weight_name(1, "attn_q")] = Tensor.zeros(SIZES["attn_q"], Type.F16)


@broken(DENSE)
def dense_weight_transposed(file: GGUF) -> None:
    file.tensors[DENSE] = Tensor.zeros((128, 192), Type.F16)


@broken(DENSE)
def dense_weight_of_one_dimension(file: GGUF) -> None:
    file.tensors[DENSE] = Tensor.zeros((128,), Type.F16)


@broken(DENSE)
def dense_weight_of_three_dimensions(file: GGUF) -> None:
    file.tensors[DENSE] = Tensor.zeros((2, 192, 128), Type.F16)


for _type in (Type.I8, Type.I32, Type.F64, Type.Q8_1):
    def _dense_type(file: GGUF, type_: Type = _type) -> None:
        file.tensors[DENSE] = Tensor.zeros((192, 128), type_)

    BROKEN_LEVELS[f"dense_weight_of_{_type.name}"] = Broken(DENSE, _dense_type)


@broken("blk.0.attn_norm")
def stage_of_a_norm(file: GGUF) -> None:
    file.tensors["blk.0.attn_norm.lr_a.0.0.weight"] = Tensor.zeros((8, 128), Type.F16)
    file.tensors["blk.0.attn_norm.lr_b.0.0.weight"] = Tensor.zeros((128, 8), Type.F16)


@broken("token_embd.lr_")
def stage_of_the_embeddings(file: GGUF) -> None:
    file.tensors["token_embd.lr_a.0.0.weight"] = Tensor.zeros((8, 128), Type.F16)
    file.tensors["token_embd.lr_b.0.0.weight"] = Tensor.zeros((288, 8), Type.F16)


# --- bytes ---


def _count_past_the_end(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # After the name: the type of the value, the elements' type, their number.
    at = data.index(fmt.KEY_LEVELS.encode()) + len(fmt.KEY_LEVELS) + 4 + 4
    struct.pack_into("<Q", data, at, 2**60)
    path.write_bytes(data)


BROKEN_LEVELS["levels_without_end"] = Broken("", damage=_count_past_the_end)
