"""Write the final GGUF: the base file with some tensors replaced, streamed block by block."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    ReaderTensor,
    quants,
)

from skipcat_edge import format as fmt
from skipcat_edge.errors import UserError
from skipcat_edge.runtime.library import requires_importance
from skipcat_edge.weight_types import correction_type

from .layers import LayerMap
from .plan import PlannedOwner
from .quantized import QuantizedFactors, Rounding, quantize_matrix

_EMBEDDINGS = ("token_embd.weight", "output.weight")
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# Every quantised GGUF carries it; 2 is the only version there is.
_QUANTIZATION_VERSION = 2
# About what a tensor's name, shape, type and offset take.
TENSOR_INFO = 80
# That are rounded at a time.
_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class OutputTypes:
    """ggml types of the file: None keeps what the base file has."""

    linear: GGMLQuantizationType
    """Factors, and the linear layers that stay dense."""
    head: GGMLQuantizationType | None
    """Token embeddings and output head."""
    added: GGMLQuantizationType | None = None
    """Factors that a level adds to those of lower ones; None: what is usual with `linear`."""

    @property
    def correction(self) -> GGMLQuantizationType:
        """The type of what a level adds."""
        return correction_type(self.linear) if self.added is None else self.added

    def of(self, owner: PlannedOwner) -> GGMLQuantizationType:
        """The type of the owner's factors."""
        return self.correction if owner.added else self.linear


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: rows x columns elements of `type`."""

    name: str
    shape: tuple[int, ...]
    """NumPy's order, in elements."""
    type: GGMLQuantizationType

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], fmt.tensor_bytes(self.type, 1, self.shape[-1]))

    @property
    def nbytes(self) -> int:
        return math.prod(self.byte_shape)

    def padded_bytes(self, alignment: int) -> int:
        """With what the file pads it to."""
        return -(-self.nbytes // alignment) * alignment


def read_weight(tensor: ReaderTensor) -> np.ndarray:
    """A tensor of the base file as float32, rows first. Raises UserError if it is not finite."""
    W = _finite(tensor, tensor.data)
    forget_pages(tensor.data)
    rows_first: np.ndarray = W.reshape(tuple(int(size) for size in reversed(tensor.shape)))
    return rows_first


def _finite(tensor: ReaderTensor, data: np.ndarray) -> np.ndarray:
    """`data`, rows of `tensor`, as float32."""
    W: np.ndarray = quants.dequantize(data, tensor.tensor_type).astype(np.float32)
    if not np.isfinite(W).all():
        raise UserError(f"{tensor.name} holds numbers that are not finite; check the model's weights.")
    return W


def forget_pages(array: np.ndarray) -> None:
    """What was read of the file that `array` is mapped from is no part of the process any more."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def output_type(tensor: ReaderTensor, types: OutputTypes, importances: bool) -> GGMLQuantizationType:
    """The type a dense tensor gets in the file; `importances`: there are statistics of its inputs."""
    base = GGMLQuantizationType(tensor.tensor_type)
    wanted: GGMLQuantizationType | None = None
    in_block = fmt.split_block(tensor.name)
    if tensor.name in _EMBEDDINGS:
        wanted = types.head
    elif in_block is not None and in_block[1].endswith(".weight") and len(tensor.shape) > 1 and (
        # llama.cpp's converter keeps what must not be quantised in F32
        fmt.parse_weight_name(tensor.name) or base != GGMLQuantizationType.F32
    ):
        wanted = types.linear if importances or not requires_importance(types.linear) else None
    return base if wanted is None else fmt.factor_type(wanted, int(tensor.shape[0]))


def factor_slots(owner: PlannedOwner, type_: GGMLQuantizationType) -> list[Slot]:
    """The tensors of one owner, in file order."""
    n, rank = owner.members[0].n, owner.rank
    columns = n - rank if owner.skip else n
    slots = []
    if owner.skip:
        name = fmt.skip_mask_name(owner.block, owner.name, owner.levels)
        slots.append(Slot(name, (-(-n // 32),), GGMLQuantizationType.I32))
    a_name = fmt.lr_a_name(owner.block, owner.name, owner.levels)
    slots.append(Slot(a_name, (rank, columns), fmt.factor_type(type_, columns)))
    slots += [
        Slot(fmt.lr_b_name(layer.index, layer.member, owner.levels), (layer.m, rank),
             fmt.factor_type(type_, rank))
        for layer in owner.members
    ]
    return slots


def factor_data(factors: QuantizedFactors) -> list[np.ndarray]:
    """Bytes in the order of `factor_slots`."""
    mask = [] if factors.skip is None else [fmt.pack_skip_mask(factors.skip).view(np.uint8)]
    return [*mask, factors.T.data, *(matrix.data for matrix in factors.B)]


@dataclass(frozen=True)
class Layout:
    """Everything the file will hold, in order."""

    dense: dict[str, ReaderTensor]
    order: list[Slot | PlannedOwner]
    """Tensors outside blocks first, then block by block."""
    types: OutputTypes

    def slots(self) -> Iterator[Slot]:
        """Every tensor of the file."""
        for item in self.order:
            if isinstance(item, PlannedOwner):
                yield from factor_slots(item, self.types.of(item))
            else:
                yield item


def make_layout(
    reader: GGUFReader, owners: list[PlannedOwner], types: OutputTypes, calibrated: Container[str] = (),
    also_dense: Container[str] = (),
) -> Layout:
    """Lay the file out: an owner's factors stand where its first member stood.

    `calibrated`: the tensors whose inputs have statistics; only they can have a type that needs importances.
    `also_dense`: members that the file holds dense too, for some levels.
    """
    owners_of: dict[str, list[PlannedOwner]] = {}
    for owner in owners:
        for layer in owner.members:
            owners_of.setdefault(layer.tensor, []).append(owner)
    order: list[Slot | PlannedOwner] = []
    dense: dict[str, ReaderTensor] = {}
    placed: set[int] = set()
    for tensor in sorted(reader.tensors, key=lambda tensor: block_of(tensor.name)):
        for owner in owners_of.get(tensor.name, []):
            if id(owner) not in placed:
                placed.add(id(owner))
                order.append(owner)
        if tensor.name not in owners_of or tensor.name in also_dense:
            dense[tensor.name] = tensor
            shape = tuple(int(size) for size in reversed(tensor.shape))
            order.append(Slot(tensor.name, shape, output_type(tensor, types, tensor.name in calibrated)))
    return Layout(dense, order, types)


def metadata_bytes(reader: GGUFReader, layers: LayerMap) -> int:
    """At most so many bytes does everything but the tensors' data take in a file made from `reader`."""
    # per layer at most two more tensors, each with its name, shape, padding and share of a mask
    linear = sum(len(group) for group in layers.groups)
    base: int = reader.data_offset
    return base + linear * (2 * 128 + 2 * int(reader.alignment)) + 1024


def base_metadata_bytes(reader: GGUFReader, layers: LayerMap) -> int:
    """About so many take the keys, and the tensors that are no layers, in a file made from `reader`."""
    base: int = reader.data_offset
    return base - TENSOR_INFO * sum(len(group) for group in layers.groups)


def block_of(name: str) -> int:
    """Index of the block a tensor is in, -1 outside."""
    in_block = fmt.split_block(name)
    return in_block[0] if in_block else -1


def write_file(
    path: Path,
    reader: GGUFReader,
    layout: Layout,
    metadata: Mapping[str, tuple[Any, GGUFValueType]],
    compress: Callable[[PlannedOwner | Slot], list[np.ndarray] | None],
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write `layout` to `path`. `compress` gives the bytes of an owner (as `factor_data`) or of a
    dense tensor; None: that tensor is rounded plainly. It is called in the layout's order.

    `metadata` replaces and extends the base file's keys; a list's type is that of its elements. Raises
    UserError where a weight is not finite, OSError where the disk is full.
    """
    writer = GGUFWriter(path, str(metadata[fmt.KEY_ARCHITECTURE][0]))
    try:
        writer.data_alignment = reader.alignment
        _copy_metadata(writer, reader, metadata, layout)
        for slot in layout.slots():
            writer.add_tensor_info(slot.name, slot.byte_shape, np.dtype(np.uint8), slot.nbytes, slot.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in layout.order:
            arrays = compress(item)
            if arrays is None:
                assert isinstance(item, Slot), item
                arrays = [_dense_data(layout.dense[item.name], item)]
            for array in arrays:
                writer.write_tensor_data(array)
                forget_pages(array)
                advance(array.nbytes)
    finally:
        writer.close()


def _dense_data(tensor: ReaderTensor, slot: Slot) -> np.ndarray:
    """Plainly rounded, some rows at a time: embeddings may be the largest tensor of all."""
    data = np.ascontiguousarray(tensor.data)
    same = slot.type == tensor.tensor_type
    if same and slot.type not in _FLOATS:
        return data.view(np.uint8)
    rows = data.reshape(-1, data.shape[-1])
    stored = None if same else np.empty((len(rows), slot.byte_shape[-1]), np.uint8)
    step = max(1, _ELEMENTS // slot.shape[-1])
    for start in range(0, len(rows), step):
        W = _finite(tensor, rows[start : start + step])
        forget_pages(data)
        if stored is not None:
            matrix = quantize_matrix(torch.from_numpy(W), None, slot.type, Rounding())
            assert matrix.type == slot.type
            stored[start : start + step] = matrix.data.view(np.uint8).reshape(len(W), -1)
    return data.view(np.uint8) if stored is None else stored


def _copy_metadata(
    writer: GGUFWriter, reader: GGUFReader, metadata: Mapping[str, tuple[Any, GGUFValueType]], layout: Layout
) -> None:
    replaced = dict(metadata)
    linear = layout.types.linear
    used = {linear, *(layout.types.of(item) for item in layout.order if isinstance(item, PlannedOwner))}
    replaced["general.file_type"] = (int(file_type(linear)), GGUFValueType.UINT32)
    if any(fmt.block_size(type_) > 1 for type_ in used):
        replaced["general.quantization_version"] = (_QUANTIZATION_VERSION, GGUFValueType.UINT32)
    # the writer adds the architecture itself
    del replaced[fmt.KEY_ARCHITECTURE]
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == fmt.KEY_ARCHITECTURE or name in replaced:
            continue
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for name, (value, type_) in replaced.items():
        if isinstance(value, list):
            writer.add_key_value(name, value, GGUFValueType.ARRAY, sub_type=type_)
        else:
            writer.add_key_value(name, value, type_)


def file_type(type_: GGMLQuantizationType) -> LlamaFileType:
    """llama.cpp's name for a file whose matrices are of `type_`."""
    for name in (f"MOSTLY_{type_.name}", f"MOSTLY_{type_.name}_M", f"ALL_{type_.name}"):
        if name in LlamaFileType.__members__:
            return LlamaFileType[name]
    return LlamaFileType.GUESSED
