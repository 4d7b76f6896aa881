"""Where the fields of a GGUF file are: our own reading of the format, for tests that damage bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass(frozen=True)
class Field:
    """Bytes [begin, end) of a file."""

    kind: str
    """`magic`, `version`, `n_tensors`, `n_keys`; `length`, `name`, `type`, `item`, `count`, `value` of a key;
    `length`, `name`, `n_dims`, `dim`, `type`, `offset` of a tensor; its `data`."""
    owner: str
    """The key's or the tensor's name; `header`."""
    begin: int
    end: int
    is_tensor: bool = False


class Fields:
    """All fields of a sound little-endian file without `general.alignment`, in its order."""

    def __init__(self, data: bytes) -> None:
        self.data, self.pos = data, 0
        self.fields: list[Field] = []
        self._add("magic", "header", 4)
        self._add("version", "header", 4)
        n_tensors = self._number("n_tensors", "header", "<Q")
        n_keys = self._number("n_keys", "header", "<Q")
        for _ in range(n_keys):
            self._key()
        tensors = [self._tensor() for _ in range(n_tensors)]
        self.data_begin = -(-self.pos // ALIGNMENT) * ALIGNMENT
        for name, offset, nbytes in tensors:
            begin = self.data_begin + offset
            self.fields.append(Field("data", name, begin, begin + nbytes, True))

    def of(self, *kinds: str) -> list[Field]:
        """The fields of some kinds."""
        return [field for field in self.fields if field.kind in kinds]

    def _add(self, kind: str, owner: str, size: int, is_tensor: bool = False) -> None:
        self.fields.append(Field(kind, owner, self.pos, self.pos + size, is_tensor))
        self.pos += size

    def _number(self, kind: str, owner: str, format_: str, is_tensor: bool = False) -> int:
        (value,) = struct.unpack_from(format_, self.data, self.pos)
        self._add(kind, owner, struct.calcsize(format_), is_tensor)
        return int(value)

    def _name(self, is_tensor: bool) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.pos)
        name = self.data[self.pos + 8 : self.pos + 8 + length].decode()
        self._add("length", name, 8, is_tensor)
        self._add("name", name, length, is_tensor)
        return name

    def _key(self) -> None:
        key = self._name(False)
        type_ = self._number("type", key, "<I")
        if type_ != ARRAY:
            self._value(key, type_)
            return
        item, count = self._number("item", key, "<I"), self._number("count", key, "<Q")
        for _ in range(count):
            self._value(key, item)

    def _value(self, key: str, type_: int) -> None:
        size = _SIZES.get(type_) or 8 + struct.unpack_from("<Q", self.data, self.pos)[0]
        self._add("value", key, size)

    def _tensor(self) -> tuple[str, int, int]:
        name = self._name(True)
        n_dims = self._number("n_dims", name, "<I", True)
        shape = [self._number("dim", name, "<Q", True) for _ in range(n_dims)]
        block, size = GGML_QUANT_SIZES[Type(self._number("type", name, "<I", True))]
        return name, self._number("offset", name, "<Q", True), int(np.prod(shape)) // block * size
