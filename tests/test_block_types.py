"""ggml's block types taken apart and put together, against gguf's own dequantisers."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from skipcat_converter.block_types import BLOCK_TYPES, BlockType

SIMPLE = ("Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Bytes of a block that begin a float16.
HALVES = {"Q8_0": (0,), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_0": (0,), "Q4_1": (0, 2),
          "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}

all_types = pytest.mark.parametrize("name", SIMPLE + K_QUANTS)
simple_types = pytest.mark.parametrize("name", SIMPLE)
few_examples = settings(deadline=None, max_examples=25)
shapes = given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))


def block_type(name: str) -> BlockType:
    return BLOCK_TYPES[GGMLQuantizationType[name]]


def random_data(name: str, rows: int, per_row: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks, more than ggml would write: every bit pattern, but finite numbers."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    blocks = rng.integers(0, 256, (rows * per_row, size), dtype=np.uint8)
    if name == "Q8_0":
        blocks[blocks == 128] = 0  # as a code it is -128, which ggml never writes
    for start in HALVES[name]:
        blocks[:, start : start + 2] = random_halves((len(blocks), 1), rng).view(np.uint8)
    return blocks.reshape(rows, per_row * size)


def random_halves(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """float16 of all magnitudes and both signs, zeros and subnormals among them, but finite."""
    exponents = rng.integers(-26, 16, shape)
    return (rng.choice([-1.0, 1.0], shape) * rng.uniform(1, 1.99, shape) * 2.0**exponents).astype("<f2")


def random_codes(kind: BlockType, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Codes in range; the first row alternates between the two ends."""
    codes = rng.integers(kind.low, kind.high + 1, shape)
    codes[0] = np.where(np.arange(shape[1]) % 2, kind.low, kind.high)
    return codes


def on_grid(kind: BlockType, grids: tuple[np.ndarray, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """scale * code + offset, in float32."""
    scale, offset = (np.repeat(grid, kind.sub, axis=1) for grid in grids)
    assert scale.dtype == offset.dtype == np.float32
    return scale * codes.astype(np.float32) + offset


def weights() -> np.ndarray:
    """float32 [rows, 512]: zeros, both signs or one, tiny, large, constant and mixed rows."""
    x = np.random.default_rng(0).standard_normal((12, 512))
    x[0] = 0
    x[1] *= 1e-30  # scales below float16
    x[2] *= 1e-6  # scales among float16's subnormals
    x[3] *= 8000
    x[4] = np.abs(x[4])
    x[5] = -np.abs(x[5])
    x[6] = 0.37
    x[7, ::2] = 0
    x[8, :256] *= 1e-7
    x[9, 100:300] = 0
    x[10, 7] = 1000
    return x.astype(np.float32)


def ggml_data(kind: BlockType) -> np.ndarray:
    from skipcat_edge.runtime.library import quantize

    return quantize(weights(), kind.type)


def test_every_type_is_served() -> None:
    assert [type_.name for type_ in BLOCK_TYPES] == [*SIMPLE, *K_QUANTS]
    for type_, kind in BLOCK_TYPES.items():
        assert (type_, GGML_QUANT_SIZES[type_]) == (kind.type, (kind.block, kind.block_bytes))
        assert kind.simple == (type_.name in SIMPLE)


@pytest.mark.runtime
@all_types
def test_what_ggml_wrote(name: str) -> None:
    kind = block_type(name)
    data = ggml_data(kind)
    codes = kind.codes(data)
    assert codes.dtype == np.int16
    assert codes.min() >= kind.low
    assert codes.max() <= kind.high
    np.testing.assert_array_equal(on_grid(kind, kind.grids(data), codes), dequantize(data, kind.type))
    np.testing.assert_array_equal(kind.with_codes(data, codes), data)


@pytest.mark.runtime
@all_types
def test_other_codes_on_ggml_scales(name: str) -> None:
    kind = block_type(name)
    data = ggml_data(kind)
    before = data.copy()
    codes = random_codes(kind, weights().shape, np.random.default_rng(1))
    changed = kind.with_codes(data, codes)
    np.testing.assert_array_equal(data, before)
    np.testing.assert_array_equal(dequantize(changed, kind.type), on_grid(kind, kind.grids(data), codes))


@all_types
@few_examples
@shapes
def test_any_block(name: str, rows: int, per_row: int, seed: int) -> None:
    kind = block_type(name)
    data = random_data(name, rows, per_row, np.random.default_rng(seed))
    codes = kind.codes(data)
    np.testing.assert_array_equal(on_grid(kind, kind.grids(data), codes), dequantize(data, kind.type))
    np.testing.assert_array_equal(kind.with_codes(data, codes), data)


@all_types
@few_examples
@shapes
def test_other_codes(name: str, rows: int, per_row: int, seed: int) -> None:
    kind, rng = block_type(name), np.random.default_rng(seed)
    data = random_data(name, rows, per_row, rng)
    codes = random_codes(kind, (rows, per_row * kind.block), rng)
    changed = kind.with_codes(data, codes)
    np.testing.assert_array_equal(dequantize(changed, kind.type), on_grid(kind, kind.grids(data), codes))
    np.testing.assert_array_equal(kind.codes(changed), codes)
    for grid, kept in zip(kind.grids(changed), kind.grids(data), strict=True):
        np.testing.assert_array_equal(grid, kept)


@simple_types
@few_examples
@shapes
def test_from_grids(name: str, rows: int, per_row: int, seed: int) -> None:
    kind, rng = block_type(name), np.random.default_rng(seed)
    scale, offset = random_halves((2, rows, per_row), rng).astype(np.float32)
    if not name.endswith("_1"):
        offset[:] = 0
    codes = random_codes(kind, (rows, per_row * kind.block), rng)
    data = kind.from_grids(scale, offset, codes)
    np.testing.assert_array_equal(dequantize(data, kind.type), on_grid(kind, (scale, offset), codes))
    np.testing.assert_array_equal(kind.codes(data), codes)
    np.testing.assert_array_equal(kind.from_grids(*kind.grids(data), kind.codes(data)), data)


@all_types
@pytest.mark.parametrize("dtype", [np.int16, np.int64])
def test_codes_out_of_range(name: str, dtype: type[np.integer]) -> None:
    kind = block_type(name)
    data = random_data(name, 2, 2, np.random.default_rng(2))
    for outside in (kind.low - 1, kind.high + 1, kind.low + 256, 2**15 - 1):
        codes = np.full((2, 2 * kind.block), kind.low, dtype=dtype)
        codes[1, -1] = outside
        with pytest.raises(ValueError, match=r"expected codes in \["):
            kind.with_codes(data, codes)
        if kind.simple:
            with pytest.raises(ValueError, match=r"expected codes in \["):
                kind.from_grids(np.ones((2, 2)), np.zeros((2, 2)), codes)


@all_types
def test_other_shapes_and_kinds(name: str) -> None:
    kind = block_type(name)
    data = random_data(name, 2, 2, np.random.default_rng(3))
    codes = kind.codes(data)
    for wrong in (codes[:1], codes[:, : kind.block], codes.T, codes.reshape(-1)):
        with pytest.raises(ValueError, match="of shape"):
            kind.with_codes(data, wrong)
    with pytest.raises(ValueError, match="integer"):
        kind.with_codes(data, codes.astype(np.float32))
    for bad_data in (data[:, :-1], data[0], data.view(np.int8)):
        with pytest.raises(ValueError, match="whole blocks"):
            kind.codes(bad_data)
        with pytest.raises(ValueError, match="whole blocks"):
            kind.grids(bad_data)


@all_types
def test_views_and_no_rows(name: str) -> None:
    kind = block_type(name)
    data = random_data(name, 4, 3, np.random.default_rng(4))
    view = data[::2, kind.block_bytes :]
    expected = dequantize(np.ascontiguousarray(view), kind.type)
    np.testing.assert_array_equal(on_grid(kind, kind.grids(view), kind.codes(view)), expected)
    np.testing.assert_array_equal(kind.with_codes(view, kind.codes(view)), view)
    assert kind.codes(data[:0]).shape == (0, 3 * kind.block)
    assert kind.with_codes(data[:0], kind.codes(data[:0])).shape == data[:0].shape


@simple_types
@pytest.mark.parametrize("value", [1 + 2**-11, 65536.0, 2.0**-25, np.inf, np.nan])
def test_scale_not_exact_in_float16(name: str, value: float) -> None:
    kind = block_type(name)
    good, bad = np.ones((1, 2)), np.array([[1, value]])
    codes = np.zeros((1, 2 * kind.block), dtype=np.int16)
    with pytest.raises(ValueError, match="scale to be exact"):
        kind.from_grids(bad, 0 * good, codes)
    with pytest.raises(ValueError, match="expected offset to be"):
        kind.from_grids(good, bad, codes)


@simple_types
def test_from_grids_of_other_shapes(name: str) -> None:
    kind, ones = block_type(name), np.ones((2, 1))
    codes = np.zeros((2, kind.block), dtype=np.int16)
    with pytest.raises(ValueError, match="scale and offset of shape"):
        kind.from_grids(ones.T, 0 * ones.T, codes)
    with pytest.raises(ValueError, match="scale and offset of shape"):
        kind.from_grids(ones, np.zeros(2), codes)
    with pytest.raises(ValueError, match="whole blocks"):
        kind.from_grids(ones, 0 * ones, codes[:, 1:])


@pytest.mark.parametrize("name", K_QUANTS)
def test_from_grids_of_k_quants(name: str) -> None:
    kind = block_type(name)
    grid = np.ones((1, kind.block // kind.sub))
    with pytest.raises(ValueError, match=name):
        kind.from_grids(grid, grid, np.zeros((1, kind.block), dtype=np.int16))
