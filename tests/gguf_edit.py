"""GGUF files held in memory, to be changed in ways that no writer of models would allow."""

from __future__ import annotations

import copy
import struct
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, GGUFWriter
from gguf import GGMLQuantizationType as Type

_NUMPY_TYPES = {np.dtype(np.float32): Type.F32, np.dtype(np.float16): Type.F16, np.dtype(np.int32): Type.I32}


@lru_cache(maxsize=4)
def _packed_strings(strings: tuple[str | bytes, ...]) -> bytes:
    encoded = [string.encode() if isinstance(string, str) else string for string in strings]
    return b"".join(struct.pack("<Q", len(each)) + each for each in encoded)


class _Writer(GGUFWriter):
    """Packs arrays at once: thousands of files repeat one vocabulary."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        format_ = self._simple_value_packing.get(sub_type)
        if vtype != GGUFValueType.ARRAY or not (format_ or sub_type == GGUFValueType.STRING) or not val:
            return super()._pack_val(val, vtype, add_vtype, sub_type)
        head = struct.pack("<I", vtype) if add_vtype else b""
        items = struct.pack(f"<{len(val)}{format_}", *val) if format_ else _packed_strings(tuple(val))
        return head + struct.pack("<IQ", sub_type, len(val)) + items


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file stores it; nothing ties `data` to `shape` and `type`."""

    shape: tuple[int, ...]
    """Rows first, as in NumPy."""
    type: Type
    data: bytes

    @staticmethod
    def of(array: np.ndarray) -> Tensor:
        """A float32, float16 or int32 array."""
        return Tensor(array.shape, _NUMPY_TYPES[array.dtype], np.ascontiguousarray(array).tobytes())

    @staticmethod
    def zeros(shape: tuple[int, ...], type_: Type) -> Tensor:
        """All bytes 0; the last dimension is rounded down to whole blocks for the size."""
        block, size = (32, 36) if type_ == Type.Q8_1 else GGML_QUANT_SIZES[type_]  # gguf has an old Q8_1
        return Tensor(shape, type_, bytes(int(np.prod(shape)) // block * size))

    def array(self) -> np.ndarray:
        """The values of a float32, float16 or int32 tensor."""
        (dtype,) = (dtype for dtype, type_ in _NUMPY_TYPES.items() if type_ == self.type)
        return np.frombuffer(self.data, dtype).reshape(self.shape)


@dataclass
class GGUF:
    """Keys and tensors of one file, in its order; change both dictionaries at will."""

    keys: dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]
    """Value, type and, for an array, its elements' type."""
    tensors: dict[str, Tensor]

    @staticmethod
    def read(path: Path) -> GGUF:
        """Read a whole little-endian file."""
        reader = GGUFReader(path)
        keys = {
            name: (field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
            for name, field in reader.fields.items() if not name.startswith("GGUF.")
        }
        tensors = {
            tensor.name: Tensor(tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type,
                                tensor.data.tobytes())
            for tensor in reader.tensors
        }
        return GGUF(keys, tensors)

    def copy(self) -> GGUF:
        """A copy whose dictionaries can be changed without changing these."""
        return GGUF(copy.copy(self.keys), copy.copy(self.tensors))

    def set(self, key: str, value: Any, type_: GGUFValueType = GGUFValueType.STRING) -> None:
        """Add or replace a key that is not an array."""
        self.keys[key] = (value, type_, None)

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name."""
        self.tensors[new] = self.tensors.pop(old)

    def swap(self, first: str, second: str) -> None:
        """Exchange two tensors' shapes, types and data."""
        tensors = self.tensors
        tensors[first], tensors[second] = tensors[second], tensors[first]

    def to_bytes(self) -> bytes:
        """What `write` writes."""
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            return self.write(Path(file.name)).read_bytes()

    def write(self, path: Path) -> Path:
        """Write `path`; the tensors' offsets follow from the sizes of their data."""
        writer = _Writer(path, arch="")  # no architecture of its own: it is one of the keys
        for name, (value, type_, item) in self.keys.items():
            writer.add_key_value(name, value, type_, item)
        # Only "general.alignment" moves data, and no file of this project has it.
        assert "general.alignment" not in self.keys
        for name, tensor in self.tensors.items():
            # With a dtype other than uint8 the writer takes the shape as it is.
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), len(tensor.data), tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in self.tensors.values():
            writer.write_tensor_data(np.frombuffer(tensor.data, np.uint8))
        writer.close()
        return path
