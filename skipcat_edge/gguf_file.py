"""Opening GGUF files for reading, without llama.cpp and with errors a person can use."""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.errors import UserError, first_line

if TYPE_CHECKING:
    from gguf import GGUFReader

_MAGIC = b"GGUF"
_SHORT_ARRAY = 256


def require_gguf(path: Path) -> None:
    """Raise UserError unless `path` is a readable file that starts with GGUF's magic."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give a GGUF file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if magic != _MAGIC:
        raise UserError(f"{path} is not a GGUF file; write one with `skipcat-edge convert`.")


def open_gguf(path: Path) -> GGUFReader:
    """Tensors and metadata of `path`; arrays of more than 256 elements read as [].

    Raises UserError if the file is missing, not GGUF, cut short or damaged.
    """
    import numpy as np

    require_gguf(path)
    try:
        with np.errstate(over="raise"):  # offsets and shapes that no file has
            reader = _reader_class()(path)
        for field in reader.fields.values():
            field.contents()  # strings that are not UTF-8 fail here rather than later
    except (ValueError, IndexError, KeyError, ArithmeticError, MemoryError, struct.error) as error:
        raise UserError(
            f"{path} is cut short or damaged ({first_line(error)}); copy or convert it again."
        ) from None
    return reader


@lru_cache(maxsize=1)
def _reader_class() -> type[GGUFReader]:
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):  # type: ignore[misc]
        """GGUFReader that steps over long arrays.

        GGUFReader makes NumPy views for each of a vocabulary's 400,000 strings, which costs
        seconds and more memory than a small device has.
        """

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            if count <= _SHORT_ARRAY or item == GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            end = orig_offs + 12
            if item == GGUFValueType.STRING:
                length = struct.Struct("=Q" if self.byte_order == "I" else ">Q")
                buffer = memoryview(self.data)
                for _ in range(count):
                    end += length.size + length.unpack_from(buffer, end)[0]
            else:
                end += count * np.dtype(self.gguf_scalar_to_np[item]).itemsize
            if end > len(self.data):
                raise ValueError(f"an array of {count} elements passes the end of the file")
            return end - orig_offs, [], [], [GGUFValueType.ARRAY, item]

    return Reader
