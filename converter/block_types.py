"""ggml's block types as integer codes on a grid: value = scale * code + offset.

ggml's quantiser chooses scales and codes together. Error feedback keeps ggml's layout and mostly its
scales, but chooses the codes itself; this module takes stored blocks apart for that and puts them
together again. The layouts are those of ggml-common.h, whose numbers are little-endian.

The grid is exact, in whatever order ggml computes it: with 11 bits of a float16, at most 7 of a
sub-block's scale and 5 of a code (the code -32 is a power of two), scale, offset and scale * code all
fit the 24 bits of a float32. Only the sum with the offset is rounded, once, with or without a fused
multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type


@dataclass(frozen=True)
class BitField:
    """Some bits of every number of a block, from byte `start` of the block on.

    Each run of `width` bytes holds 8 / bits * width consecutive numbers: the first `width` of them in
    the lowest bits of the bytes, the next `width` in the bits above, and so on.
    """

    start: int
    bits: int
    width: int

    @property
    def _shifts(self) -> np.ndarray:
        """uint8 [numbers per byte, 1]"""
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]

    def _bytes(self, blocks: np.ndarray, count: int) -> np.ndarray:
        """Where blocks: uint8 [blocks, bytes] hold this field of `count` numbers, as a view."""
        return blocks[:, self.start : self.start + count * self.bits // 8]

    def read(self, blocks: np.ndarray, count: int) -> np.ndarray:
        """uint8 [blocks, count] of blocks: uint8 [blocks, bytes]."""
        stored = self._bytes(blocks, count)
        runs = stored.reshape(len(blocks), stored.shape[1] // self.width, 1, self.width)
        numbers: np.ndarray = (runs >> self._shifts) & np.uint8(2**self.bits - 1)
        return numbers.reshape(len(blocks), count)

    def write(self, blocks: np.ndarray, numbers: np.ndarray) -> None:
        """Store the lowest `bits` bits of numbers: uint8 [blocks, count] in blocks: uint8 [blocks, bytes]."""
        stored = self._bytes(blocks, numbers.shape[1])
        shape = (len(blocks), stored.shape[1] // self.width, 8 // self.bits, self.width)
        parts = (numbers & np.uint8(2**self.bits - 1)).reshape(shape) << self._shifts
        stored[:] = np.bitwise_or.reduce(parts, axis=2).reshape(stored.shape)


def _read_fields(fields: tuple[BitField, ...], blocks: np.ndarray, count: int) -> np.ndarray:
    """Numbers whose bits are spread over `fields`, lowest first: uint8 [blocks, count]."""
    numbers = np.zeros((len(blocks), count), dtype=np.uint8)
    shift = 0
    for field in fields:
        numbers |= field.read(blocks, count) << np.uint8(shift)
        shift += field.bits
    return numbers


def _write_fields(fields: tuple[BitField, ...], blocks: np.ndarray, numbers: np.ndarray) -> None:
    """Inverse of `_read_fields`, in place."""
    shift = 0
    for field in fields:
        field.write(blocks, numbers >> np.uint8(shift))
        shift += field.bits


def _read_half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].view("<f2").astype(np.float32)


def _write_half(blocks: np.ndarray, start: int, values: np.ndarray, name: str) -> None:
    """Store values: [blocks, 1] as float16. Raises ValueError if one is not a finite float16."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not (np.isfinite(halves) & (halves == values)).all():
        raise ValueError(f"expected {name} to be exact in float16")
    blocks[:, start : start + 2] = halves.view(np.uint8)


# Grids: scale and offset, float32 [blocks, block // sub] of blocks: uint8 [blocks, bytes].
Grids = tuple[np.ndarray, np.ndarray]


def _read_scale(blocks: np.ndarray) -> Grids:
    scale = _read_half(blocks, 0)
    return scale, np.zeros_like(scale)


def _write_scale(blocks: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> None:
    if offset.any():
        raise ValueError("expected offset to be zero: the type stores none")
    _write_half(blocks, 0, scale, "scale")


def _read_scale_and_offset(blocks: np.ndarray) -> Grids:
    return _read_half(blocks, 0), _read_half(blocks, 2)


def _write_scale_and_offset(blocks: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> None:
    _write_half(blocks, 0, scale, "scale")
    _write_half(blocks, 2, offset, "offset")


def _read_q2_k(blocks: np.ndarray) -> Grids:
    factors = blocks[:, :16]
    return _read_half(blocks, 80) * (factors & 15), -_read_half(blocks, 82) * (factors >> 4)


_Q3_K_FACTORS = (BitField(96, bits=4, width=8), BitField(104, bits=2, width=4))


def _read_q3_k(blocks: np.ndarray) -> Grids:
    factors = _read_fields(_Q3_K_FACTORS, blocks, 16).view(np.int8) - np.int8(32)
    scale = _read_half(blocks, 108) * factors
    return scale, np.zeros_like(scale)


def _read_q4_k(blocks: np.ndarray) -> Grids:
    """Q5_K's too: eight 6-bit factors each of the scale and of the offset, in twelve bytes."""
    scales, offsets, low = np.split(blocks[:, 4:16], 3, axis=1)
    # The first four factors are the low 6 bits of a byte. The other four have their upper 2 bits
    # above those, and their lower 4 bits, a scale's and an offset's to a byte, in `low`.
    scale_factors = np.concatenate([scales & 63, (scales >> 6 << 4) | (low & 15)], axis=1)
    offset_factors = np.concatenate([offsets & 63, (offsets >> 6 << 4) | (low >> 4)], axis=1)
    return _read_half(blocks, 0) * scale_factors, -_read_half(blocks, 2) * offset_factors


def _read_q6_k(blocks: np.ndarray) -> Grids:
    scale = _read_half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return scale, np.zeros_like(scale)


@dataclass(frozen=True)
class BlockType:
    """A ggml type whose elements are scale * code + offset, code an integer in [low, high]."""

    type: Type
    block: int
    """Elements of one stored block."""
    sub: int
    """Consecutive elements that share scale and offset."""
    low: int
    high: int
    bias: int
    """A code is stored as code + bias, modulo 256."""
    code_fields: tuple[BitField, ...]
    """Where a block stores its codes, lowest bits first."""
    read_grids: Callable[[np.ndarray], Grids]
    write_grids: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None
    """Inverse of `read_grids` into blocks; None where ggml alone chooses scales, the K-quants."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one stored block."""
        return int(GGML_QUANT_SIZES[self.type][1])

    @property
    def simple(self) -> bool:
        """Whether a block holds its scale (and offset) itself, in float16."""
        return self.write_grids is not None

    def grids(self, data: np.ndarray) -> Grids:
        """scale, offset: float32 [rows, columns // sub] of data: uint8 [rows, row bytes].

        In float32, scale * code + offset is what ggml dequantises.
        """
        blocks = self._blocks(data)
        shape = (len(data), self._columns(data) // self.sub)
        scale, offset = self.read_grids(blocks)
        return scale.reshape(shape), offset.reshape(shape)

    def codes(self, data: np.ndarray) -> np.ndarray:
        """int16 [rows, columns] of data: uint8 [rows, row bytes].

        Only a Q8_0 block that ggml did not write can hold a code outside [low, high], -128.
        """
        numbers = _read_fields(self.code_fields, self._blocks(data), self.block)
        # Of the stored numbers only Q8_0's pass 127; they are two's complements.
        codes: np.ndarray = numbers.view(np.int8) - np.int16(self.bias)
        return codes.reshape(len(data), self._columns(data))

    def with_codes(self, data: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """data: uint8 [rows, row bytes] with its scales and other codes: integers [rows, columns].

        Raises ValueError where a code is outside [low, high] or the shapes differ.
        """
        out: np.ndarray = self._blocks(data).copy()
        expected = (len(data), self._columns(data))
        if codes.shape != expected:
            raise ValueError(f"expected codes of shape {list(expected)}, got {list(codes.shape)}")
        self._write_codes(out, codes)
        return out.reshape(data.shape)

    def from_grids(self, scale: np.ndarray, offset: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """uint8 [rows, row bytes] of scale, offset: [rows, columns // sub] and codes: [rows, columns].

        Raises ValueError where a scale or offset is not exact in float16, an offset is not zero but
        the type stores none, a code is outside [low, high], the shapes differ, or the type is not
        simple.
        """
        if self.write_grids is None:
            raise ValueError(f"expected a type that stores each scale in float16, got {self.type.name}")
        if codes.ndim != 2 or codes.shape[1] % self.block:
            raise ValueError(f"expected codes in whole blocks of {self.block}, got {list(codes.shape)}")
        rows, per_row = len(codes), codes.shape[1] // self.block
        if not scale.shape == offset.shape == (rows, per_row):
            raise ValueError(f"expected scale and offset of shape {[rows, per_row]}, "
                             f"got {list(scale.shape)} and {list(offset.shape)}")
        out = np.zeros((rows * per_row, self.block_bytes), dtype=np.uint8)
        self.write_grids(out, scale.reshape(len(out), 1), offset.reshape(len(out), 1))
        self._write_codes(out, codes)
        return out.reshape(rows, per_row * self.block_bytes)

    def _columns(self, data: np.ndarray) -> int:
        return int(data.shape[1]) // self.block_bytes * self.block

    def _blocks(self, data: np.ndarray) -> np.ndarray:
        """data: uint8 [rows, row bytes] as C-contiguous [rows * blocks of a row, block bytes]."""
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] % self.block_bytes:
            raise ValueError(f"expected uint8 rows in whole blocks of {self.block_bytes} bytes, "
                             f"got {data.dtype} of shape {list(data.shape)}")
        return np.ascontiguousarray(data).reshape(data.size // self.block_bytes, self.block_bytes)

    def _write_codes(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"expected integer codes, got {codes.dtype}")
        if ((codes < self.low) | (codes > self.high)).any():
            raise ValueError(f"expected codes in [{self.low}, {self.high}] for {self.type.name}, "
                             f"got {int(codes.min())} to {int(codes.max())}")
        numbers = (codes.astype(np.int16) + np.int16(self.bias)).astype(np.uint8)
        _write_fields(self.code_fields, blocks, numbers.reshape(len(blocks), self.block))


def _simple_type(type_: Type, low: int, high: int, code_fields: tuple[BitField, ...],
                 has_offset: bool) -> BlockType:
    # Codes from 0 on go with a stored offset; Q8_0's are two's complements, so have no bias.
    bias = 0 if type_ is Type.Q8_0 else -low
    if has_offset:
        return BlockType(type_, 32, 32, low, high, bias, code_fields, _read_scale_and_offset,
                         _write_scale_and_offset)
    return BlockType(type_, 32, 32, low, high, bias, code_fields, _read_scale, _write_scale)


def _k_type(type_: Type, sub: int, low: int, high: int, code_fields: tuple[BitField, ...],
            read_grids: Callable[[np.ndarray], Grids]) -> BlockType:
    return BlockType(type_, 256, sub, low, high, -low, code_fields, read_grids)


BLOCK_TYPES: Mapping[Type, BlockType] = MappingProxyType({
    block_type.type: block_type
    for block_type in (
        _simple_type(Type.Q8_0, -127, 127, (BitField(2, 8, 32),), has_offset=False),
        _simple_type(Type.Q5_0, -16, 15, (BitField(6, 4, 16), BitField(2, 1, 1)), has_offset=False),
        _simple_type(Type.Q5_1, 0, 31, (BitField(8, 4, 16), BitField(4, 1, 1)), has_offset=True),
        _simple_type(Type.Q4_0, -8, 7, (BitField(2, 4, 16),), has_offset=False),
        _simple_type(Type.Q4_1, 0, 15, (BitField(4, 4, 16),), has_offset=True),
        _k_type(Type.Q2_K, 16, 0, 3, (BitField(16, 2, 32),), _read_q2_k),
        _k_type(Type.Q3_K, 16, -4, 3, (BitField(32, 2, 32), BitField(0, 1, 32)), _read_q3_k),
        _k_type(Type.Q4_K, 32, 0, 15, (BitField(16, 4, 32),), _read_q4_k),
        _k_type(Type.Q5_K, 32, 0, 31, (BitField(48, 4, 32), BitField(16, 1, 32)), _read_q4_k),
        _k_type(Type.Q6_K, 16, -32, 31, (BitField(0, 4, 64), BitField(128, 2, 32)), _read_q6_k),
    )
})
