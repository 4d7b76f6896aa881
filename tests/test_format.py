"""The format's arithmetic and masks against references written out bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from skipcat_edge import format as fmt

MASKS = st.lists(st.booleans(), min_size=1, max_size=200)


def words_by_hand(skip: list[bool]) -> list[int]:
    """Bit j % 32 of word j // 32, as signed 32-bit integers."""
    words = [0] * ((len(skip) + 31) // 32)
    for j, is_set in enumerate(skip):
        if is_set:
            words[j // 32] += 2 ** (j % 32)
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(MASKS)
def test_mask_words(skip: list[bool]) -> None:
    packed = fmt.pack_skip_mask(np.array(skip))
    assert packed.dtype == np.int32
    assert packed.tolist() == words_by_hand(skip)


@given(MASKS)
def test_mask_round_trip(skip: list[bool]) -> None:
    words = np.array(words_by_hand(skip), dtype=np.int32)
    assert fmt.unpack_skip_mask(words, len(skip)).tolist() == skip


@given(MASKS, st.sampled_from([-1, 1]))
def test_mask_of_wrong_length(skip: list[bool], change: int) -> None:
    words = np.zeros((len(skip) + 31) // 32 + change, dtype=np.int32)
    with pytest.raises(ValueError, match="words"):
        fmt.unpack_skip_mask(words, len(skip))


@given(st.integers(1, 200).filter(lambda n: n % 32), st.data())
def test_mask_with_a_bit_past_the_end(n: int, data: st.DataObject) -> None:
    skip = [False] * n + [False] * (-n % 32)
    skip[data.draw(st.integers(n, len(skip) - 1))] = True
    with pytest.raises(ValueError, match="past"):
        fmt.unpack_skip_mask(np.array(words_by_hand(skip), dtype=np.int32), n)


@given(st.integers(1, 500), st.integers(1, 500), st.data())
def test_skip_never_costs_more_than_dense(m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    assert fmt.factor_parameters(m, n, rank, skip=True) == m * rank + rank * (n - rank) <= m * n
    assert fmt.factor_parameters(m, n, rank, skip=False) == m * rank + rank * n


@pytest.mark.parametrize(
    ("type_", "columns", "expected"),
    [
        (Type.F32, 7, Type.F32),
        (Type.F16, 8, Type.F16),
        (Type.Q8_0, 64, Type.Q8_0),
        (Type.Q8_0, 40, Type.F16),
        (Type.Q4_0, 32, Type.Q4_0),
        (Type.Q4_K, 512, Type.Q4_K),
        (Type.Q4_K, 128, Type.F16),
    ],
)
def test_factor_type(type_: Type, columns: int, expected: Type) -> None:
    assert fmt.factor_type(type_, columns) == expected


@pytest.mark.parametrize(
    ("type_", "n", "grid"),
    [(Type.F32, 256, 8), (Type.F32, 384, 16), (Type.F16, 2048, 64), (Type.BF16, 768, 64),
     (Type.Q4_0, 384, 32), (Type.Q4_0, 2048, 64), (Type.Q6_K, 2048, 256)],
)  # fmt: skip
def test_rank_grid(type_: Type, n: int, grid: int) -> None:
    assert fmt.rank_grid(type_, n) == grid


@pytest.mark.parametrize(
    ("type_", "nbytes"), [(Type.F16, 6 * 64 * 2), (Type.Q8_0, 6 * 2 * 34), (Type.Q4_0, 6 * 2 * 18)]
)
def test_tensor_bytes(type_: Type, nbytes: int) -> None:
    assert fmt.tensor_bytes(type_, 6, 64) == nbytes


@given(st.integers(0, 999), st.sampled_from(sorted(fmt.GROUP_OF)))
def test_weight_names_round_trip(layer: int, member: str) -> None:
    assert fmt.parse_weight_name(fmt.weight_name(layer, member)) == (layer, member)


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.bias",
                                  "blk.0.attn_q.lr_b.weight", "enc.blk.0.attn_q.weight"])
def test_other_names_are_no_weights(name: str) -> None:
    assert fmt.parse_weight_name(name) is None


def test_owner_of() -> None:
    assert fmt.owner_of(["attn_q", "attn_k", "attn_v"]) == "attn_in"
    assert fmt.owner_of(["ffn_gate", "ffn_up"]) == "ffn_in"
    assert fmt.owner_of(["attn_q"]) == "attn_q"


def test_read_owners(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "skipcat-llama")
    writer.add_uint32(fmt.KEY_FORMAT_VERSION, 1)
    skip = np.arange(48) % 6 == 5
    writer.add_tensor(fmt.lr_a_name(3, "attn_in"), np.zeros((8, 40), np.float32))
    writer.add_tensor(fmt.skip_mask_name(3, "attn_in"), fmt.pack_skip_mask(skip))
    for member, m in (("attn_q", 48), ("attn_k", 16), ("attn_v", 16)):
        writer.add_tensor(fmt.lr_b_name(3, member), np.zeros((m, 8), np.float16))
    writer.add_tensor(fmt.lr_a_name(0, "ffn_down"), np.zeros((16, 96), np.float16))
    writer.add_tensor(fmt.lr_b_name(0, "ffn_down"), np.zeros((48, 16), np.float16))
    writer.add_tensor(fmt.weight_name(0, "ffn_up"), np.zeros((96, 48), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    down, attention = fmt.read_owners(GGUFReader(path))
    assert (down.layer, down.name, down.m, down.n, down.rank, down.skip) == (0, "ffn_down", 48, 96, 16, False)
    assert down.total_bytes == 2 * (16 * 96 + 48 * 16)
    assert (attention.layer, attention.name, attention.n, attention.rank) == (3, "attn_in", 48, 8)
    assert attention.skip
    assert [(member.name, member.m) for member in attention.members] == [
        ("attn_q", 48), ("attn_k", 16), ("attn_v", 16),
    ]
    assert attention.type == Type.F32
    assert {member.type for member in attention.members} == {Type.F16}
    assert attention.total_bytes == 4 * 8 * 40 + 4 * 2 + 2 * 8 * (48 + 16 + 16)
    assert attention.full_rank == 48
    assert attention.ratio == pytest.approx((8 * 40 + 8 * 80) / (48 * 80))
