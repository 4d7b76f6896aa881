"""Some thousands of damaged files, the same ones every time, each with what its refusal may name.

A mutation is `refused` where the damage cannot be missed, else it may also turn out harmless: then the
model must load and decode without a fault. What cannot be missed is derived here from the format, not from
what the loader does. Bytes are damaged here, keys and tensors in hostile_edits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from gguf_edit import GGUF
from gguf_fields import Field, Fields
from hostile_edits import (
    ANY,
    EPSILON,
    REQUIRED,
    additions,
    architectures,
    key_types,
    large_vocabularies,
    levels,
    missing,
    other_keys,
    other_types,
    swapped,
    vocabularies,
)
from hostile_seeds import SEEDS


@dataclass(frozen=True)
class Mutation:
    """One damaged file."""

    kind: str
    """A heading of this module."""
    name: str
    data: bytes
    names: tuple[str, ...]
    """One of these must be in the refusal; `ANY` asks for some name."""
    refused: bool
    """Whether it must be refused at all."""


def every_mutation() -> Iterator[Mutation]:
    """All mutations of all sound files."""
    for name, make in SEEDS.items():
        file = make()
        yield from mutations(name, file, file.to_bytes())


def mutations(name: str, file: GGUF, data: bytes) -> Iterator[Mutation]:
    """All mutations of one sound file; `data` is what it is written as."""
    fields = Fields(data)
    rng = np.random.default_rng(len(data))
    for kind, found in (
        ("truncation", _truncations(fields)),
        ("flipped bits", _flips(fields, rng)),
        ("flipped mask bits", _mask_flips(fields, rng)),
        ("offsets", _offsets(fields)),
        ("dimensions", _dimensions(fields)),
        ("tensor types", _types(fields)),
        ("lengths", _lengths(fields)),
        ("numbers", _numbers(fields)),
        ("duplicates", _duplicates(fields)),
        ("alignments", _alignments(fields)),
        ("hogs", _hogs(fields)),
    ):
        for detail, changed, names, refused in found:
            yield Mutation(kind, f"{name}: {detail}", changed, names, refused)
    for kind, edits in (
        ("missing", missing(file)),
        ("swapped", swapped(file)),
        ("other types", other_types(file)),
        ("hogs", large_vocabularies(file)),
        ("versions and levels", levels(file)),
        ("key types", key_types(file)),
        ("vocabularies", vocabularies(file)),
        ("other keys", other_keys(file)),
        ("additions", additions(file)),
        ("architectures", architectures(file)),
    ):
        for detail, edited, names, refused in edits:
            yield Mutation(kind, f"{name}: {detail}", edited.to_bytes(), names, refused)


_Bytes = Iterator[tuple[str, bytes, tuple[str, ...], bool]]


def _put(data: bytes, begin: int, new: bytes) -> bytes:
    return data[:begin] + new + data[begin + len(new) :]


def _set(fields: Fields, field: Field, format_: str, value: float) -> bytes:
    """The file with another number in a field."""
    return _put(fields.data, field.begin, struct.pack(format_, value))


def _flip(data: bytes, bit: int) -> bytes:
    return _put(data, bit // 8, bytes([data[bit // 8] ^ 1 << bit % 8]))


_ALIGNMENT, _TOKENS = "general.alignment", "tokenizer.ggml.tokens"


# --- truncation at every structural boundary ---


def _truncations(fields: Fields) -> _Bytes:
    ends = {field.owner: field.end for field in fields.of("data")}
    seen: dict[str, int] = {}
    for field in fields.fields:
        if field.kind == "value":  # of a vocabulary, the first strings and every twentieth
            seen[field.owner] = seen.get(field.owner, 0) + 1
            if seen[field.owner] > 3 and seen[field.owner] % 20:
                continue
        if field.kind == "magic":
            continue  # an empty file is no GGUF file at all
        for at in {field.begin, (field.begin + field.end) // 2}:
            if field.kind == "version":
                names: tuple[str, ...] = ("header", "read")
            elif field.owner == "header":
                names = ("header",)
            elif field.kind == "data":
                names = tuple(name for name, end in ends.items() if end > at)
            else:
                # what the header counts does not fit any more, or the file ends here, or before
                names = (field.owner, "header", "key ", "tensor ")
            yield f"cut at {at}, in {field.kind} of {field.owner}", fields.data[:at], names, True
    yield "cut by a byte", fields.data[: max(ends.values()) - 1], tuple(ends), True


# --- flipped bits ---


def _flips(fields: Fields, rng: np.random.Generator) -> _Bytes:
    """Of header, keys and tensor infos, and of weights: some bits of every field."""
    chosen = [field for field in fields.fields if not (field.kind == "value" and "tokenizer" in field.owner)]
    chosen += [field for field in fields.of("value") if "tokenizer" in field.owner][::25]
    for field in chosen:
        if field.kind == "data" and "skip_mask" in field.owner:
            continue
        for bit in sorted(rng.integers(8 * field.begin, 8 * field.end, 2)):
            sure = field.kind in ("offset", "n_dims", "length") and field.is_tensor
            names = ANY if field.kind in ("name", "length") or not sure else (field.owner,)
            yield f"bit {bit}, in {field.kind} of {field.owner}", _flip(fields.data, int(bit)), names, sure


def _mask_flips(fields: Fields, rng: np.random.Generator) -> _Bytes:
    """One bit: the popcount is no longer the rank. Two that keep it: another mask, as good as the first."""
    for field in fields.of("data"):
        if "skip_mask" not in field.owner:
            continue
        bits = range(8 * field.begin, 8 * field.end)
        for bit in bits:
            yield f"bit {bit} of {field.owner}", _flip(fields.data, bit), (field.owner,), True
        words = [bit for bit in bits if fields.data[bit // 8] >> bit % 8 & 1]
        clear = [bit for bit in bits if bit not in words]
        pair = int(rng.choice(words)), clear[0]
        yield (
            f"bits {pair} of {field.owner}",
            _flip(_flip(fields.data, pair[0]), pair[1]),
            (field.owner,),
            False,
        )


# --- numbers of tensor infos ---


def _offsets(fields: Fields) -> _Bytes:
    for field in fields.of("offset"):
        for offset in (1, 2**20, 2**40, 2**63, 2**64 - 32):
            yield f"offset {offset} of {field.owner}", _set(fields, field, "<Q", offset), (field.owner,), True


def _dimensions(fields: Fields) -> _Bytes:
    for field in fields.of("dim"):
        (size,) = struct.unpack_from("<Q", fields.data, field.begin)
        for dim in (0, size + 1, 2**31, 2**32 + size, 2**62, 2**63 - 1, 2**63, 2**64 - 1):
            # the data of the next tensor is then not where it should be, which may be seen first
            names = (field.owner, "offset") if dim <= size + 1 else (field.owner,)
            yield f"dimension {dim} of {field.owner}", _set(fields, field, "<Q", dim), names, True
    for field in fields.of("n_dims"):
        for count in (5, 2**31, 2**32 - 1):
            yield (
                f"{count} dimensions of {field.owner}",
                _set(fields, field, "<I", count),
                (field.owner,),
                True,
            )


def _types(fields: Fields) -> _Bytes:
    for field in (field for field in fields.of("type") if field.is_tensor):
        for type_ in (4, 5, 1000, 2**31, 2**32 - 1):  # 4 and 5 were types once
            yield f"type {type_} of {field.owner}", _set(fields, field, "<I", type_), (field.owner,), True


# --- lengths and counts ---


def _lengths(fields: Fields) -> _Bytes:
    for field in fields.of("length"):
        for length in (0, 2**16, 2**31, 2**63, 2**64 - 1):
            yield (
                f"name of {length} bytes for {field.owner}",
                _set(fields, field, "<Q", length),
                ("tensor ", "key "),
                True,
            )
    for field in fields.of("count"):
        for count in (2**31, 2**60, 2**61 + 1, 2**64 - 1):
            yield f"{count} elements of {field.owner}", _set(fields, field, "<Q", count), (field.owner,), True
    for field in fields.of("n_keys", "n_tensors"):
        for count in (2**31, 2**59, 2**63, 2**64 - 1):
            yield f"{field.kind} {count}", _set(fields, field, "<Q", count), ("header",), True


# --- values of keys ---


def _numbers(fields: Fields) -> _Bytes:
    """Every number of a key set to what no model has, and to what another might."""
    types = {
        field.owner: struct.unpack_from("<I", fields.data, field.begin)[0]
        for field in fields.of("type")
        if not field.is_tensor
    }
    for field in fields.of("value"):
        if types[field.owner] == 4:
            for value in (0, 1, 3, 512, 513, 2**24 + 1, 2**31, 2**32 - 1):
                sure = field.owner.endswith(REQUIRED) and value in (0, 2**31, 2**32 - 1)
                yield (
                    f"{field.owner} = {value}",
                    _set(fields, field, "<I", value),
                    (field.owner,) if sure else ANY,
                    sure,
                )
        if types[field.owner] == 6:
            for value in (0.0, -1.0, 1e38, math.inf, -math.inf, math.nan):
                sure = field.owner.endswith(EPSILON) and not (value >= 0 and math.isfinite(value))
                yield (
                    f"{field.owner} = {value}",
                    _set(fields, field, "<f", value),
                    (field.owner,) if sure else ANY,
                    sure,
                )


def _alignments(fields: Fields) -> _Bytes:
    """`general.alignment` under the name of a key that is as long, and that is missed then at the latest."""
    for name in fields.of("name"):
        if len(name.owner) != len(_ALIGNMENT) or not name.owner.endswith(REQUIRED):
            continue
        (value,) = (field for field in fields.of("value") if field.owner == name.owner)
        renamed = _put(fields.data, name.begin, _ALIGNMENT.encode())
        for alignment in (0, 1, 3, 8, 16, 64, 2**31):
            sure = (_ALIGNMENT,) if alignment < 32 else ANY
            yield (
                f"alignment {alignment}",
                _put(renamed, value.begin, struct.pack("<I", alignment)),
                sure,
                True,
            )


# --- more than a file of its size can ask for ---


def _hogs(fields: Fields) -> _Bytes:
    """A million tokens of no letters, and a hundred thousand tensors of no elements."""
    tokens = [field for field in fields.of("value") if field.owner == _TOKENS]
    (count,) = (field for field in fields.of("count") if field.owner == _TOKENS)
    counted = _put(fields.data, count.begin, struct.pack("<Q", 10**6))
    yield (
        "empty tokens",
        counted[: count.end] + bytes(8 * 10**6) + counted[tokens[-1].end :],
        (_TOKENS,),
        True,
    )
    (n_tensors,) = fields.of("n_tensors")
    infos = b"".join(struct.pack("<Q7sIQIQ", 7, b"x%06d" % i, 1, 0, 0, 0) for i in range(10**5))
    many = _put(fields.data, n_tensors.begin, struct.pack("<Q", 10**5))
    first = next(field for field in fields.of("length") if field.is_tensor).begin
    yield "empty tensors", many[:first] + infos, ("tensor 'x",), True


# --- duplicates ---


def _duplicates(fields: Fields) -> _Bytes:
    """A key or tensor under the name of another one that is as long."""
    by_length: dict[tuple[bool, int], list[Field]] = {}
    for field in fields.of("name"):
        by_length.setdefault((field.is_tensor, field.end - field.begin), []).append(field)
    for same in by_length.values():
        for first, second in pairwise(same):
            yield (
                f"{second.owner} named {first.owner}",
                _put(fields.data, second.begin, first.owner.encode()),
                (first.owner,),
                True,
            )
