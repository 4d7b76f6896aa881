"""The low-rank GGUF format, versions 1 and 2: the only place that knows tensor names and keys.

A linear layer W: [m, n] is stored as y = B' z with z = x_S + T x_R, where S (the skip set)
holds the r inputs whose block of A is the identity and R the other n - r, or, without
Skip, z = A x. Shapes in this module's docstrings are NumPy's (rows first); ggml lists them
the other way round.

    blk.N.<owner>.lr_a.weight    T: [r, n - r], or A: [r, n] without Skip
    blk.N.<owner>.skip_mask      I32 [ceil(n / 32)], bit j set: input j is in S
    blk.N.<member>.lr_b.weight   B': [m, r]

Version 2 has rank levels, one file at several speeds. `skipcat.levels` lists their ratios, ascending; a
level is named by its ratio or by its place from 0, the last one is the whole file. Factors may then carry
the places of the first and the last level that use them (those without are used at all of them):

    blk.N.<owner>.lr_a.FIRST.LAST.weight, .skip_mask.FIRST.LAST, blk.N.<member>.lr_b.FIRST.LAST.weight

At a level, a layer is the sum of its factors that the level uses, each with a skip set of its own, and
of a type of its own; where there are none it is its dense `.weight`, which is there if some level needs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from skipcat_edge.errors import FormatError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

FORMAT_VERSION = 1
RUNTIME_MIN = "skipcat.1"
"""Of files without levels."""
LEVELS_FORMAT_VERSION = 2
LEVELS_RUNTIME_MIN = "skipcat.5"
MAX_LEVELS = 8
ARCHITECTURE_PREFIX = "skipcat-"

KEY_ARCHITECTURE = "general.architecture"
KEY_FORMAT_VERSION = "skipcat.format_version"
KEY_RUNTIME_MIN = "skipcat.runtime_min"
KEY_RATIO = "skipcat.ratio"
KEY_METHOD = "skipcat.method"
KEY_SOURCE_NAME = "skipcat.source.name"
KEY_CALIBRATION_SHA256 = "skipcat.calibration.sha256"
KEY_CALIBRATION_TOKENS = "skipcat.calibration.tokens"
KEY_SEED = "skipcat.seed"
KEY_LEVELS = "skipcat.levels"
"""f32 array: the levels' ratios, ascending; the last is `skipcat.ratio`."""
KEY_LEVELS_LOSS = "skipcat.levels.loss"
"""f32 array: the loss that the converter predicted for each level."""

# Linear layers that read the same input. A layer whose projection is shared is owned by the
# group, any other by itself.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attn_in": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "attn_out": ("attn_output",),
    "ffn_in": ("ffn_gate", "ffn_up"),
    "ffn_out": ("ffn_down",),
}
GROUP_OF: Mapping[str, str] = {member: group for group, members in GROUPS.items() for member in members}

# Layers that llama.cpp's graphs of these architectures multiply without `build_lora_mm`, so
# that no factors can stand in for them, and those whose dense weight a loader looks at first.
# tests/test_pinned_source.py derives the same table from the pinned source.
UNSERVED: Mapping[str, frozenset[str]] = {
    "bailingmoe3": frozenset({"attn_q", "attn_k", "attn_v", "attn_output"}),
    "deepseek2": frozenset({"attn_q"}),
    "glm5-next": frozenset({"attn_q", "attn_k", "attn_v", "attn_output"}),
    "graniteswitch": frozenset({"attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}),
    "jina-bert-v2": frozenset({"ffn_up"}),
    "kimi-k3": frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}),
    "kimi-linear": frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"}),
    "mistral4": frozenset({"attn_q"}),
    "plm": frozenset({"attn_q"}),
}

_TENSOR = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(lr_a|lr_b|skip_mask)(\..*)?$")
_SUFFIX = re.compile(r"(?:\.(\d)\.(\d))?(\.weight)?")

Levels = tuple[int, int]
"""The first and the last level that use some factors, by their places from 0."""
_WEIGHT = re.compile(r"blk\.(\d+)\.([a-z_]+)\.weight")


def weight_name(layer: int, member: str) -> str:
    """Name of a dense weight, for example `blk.3.attn_q.weight`."""
    return f"blk.{layer}.{member}.weight"


def split_block(name: str) -> tuple[int, str] | None:
    """`blk.3.attn_q.weight` -> (3, `attn_q.weight`); None for a tensor outside the blocks."""
    match = re.match(r"blk\.(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else None


def parse_weight_name(name: str) -> tuple[int, str] | None:
    """Layer and member of a dense weight of some group, or None for any other tensor's name."""
    match = _WEIGHT.fullmatch(name)
    return (int(match[1]), match[2]) if match and match[2] in GROUP_OF else None


def lr_a_name(layer: int, owner: str, levels: Levels | None = None) -> str:
    """Name of an owner's T, or of its A without Skip. `levels`: None where all of them use it."""
    return f"blk.{layer}.{owner}.lr_a{_range(levels)}.weight"


def lr_b_name(layer: int, member: str, levels: Levels | None = None) -> str:
    """Name of a member's B'. `levels`: None where all of them use it."""
    return f"blk.{layer}.{member}.lr_b{_range(levels)}.weight"


def skip_mask_name(layer: int, owner: str, levels: Levels | None = None) -> str:
    """Name of an owner's skip mask. `levels`: None where all of them use it."""
    return f"blk.{layer}.{owner}.skip_mask{_range(levels)}"


def _range(levels: Levels | None) -> str:
    return "" if levels is None else f".{levels[0]}.{levels[1]}"


def owner_of(members: Iterable[str]) -> str:
    """The owner's name for `members` of one group: the group if they share, else the member."""
    names = tuple(members)
    return names[0] if len(names) == 1 else GROUP_OF[names[0]]


def pack_skip_mask(skip: np.ndarray) -> np.ndarray:
    """Pack `skip`: bool [n] into I32 words [ceil(n / 32)], bit j % 32 of word j // 32."""
    bits = np.zeros(-(-len(skip) // 32) * 32, dtype=np.uint8)
    bits[: len(skip)] = skip
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32).view(np.int32)


def unpack_skip_mask(words: np.ndarray, n: int) -> np.ndarray:
    """Inverse of `pack_skip_mask`: bool [n]. Raises ValueError on a wrong length or stray bits."""
    if words.shape != (-(-n // 32),):
        raise ValueError(f"expected {-(-n // 32)} words for {n} inputs, got {list(words.shape)}")
    bits = np.unpackbits(words.view(np.uint32).astype("<u4").view(np.uint8), bitorder="little")
    if bits[n:].any():
        raise ValueError(f"a bit past input {n - 1} is set")
    return bits[:n].astype(bool)


def block_size(type_: GGMLQuantizationType) -> int:
    """Elements of one quantisation block (1 for F32, F16 and BF16)."""
    from gguf import GGML_QUANT_SIZES

    return int(GGML_QUANT_SIZES[type_][0])


def tensor_bytes(type_: GGMLQuantizationType, rows: int, columns: int) -> int:
    """Bytes of a [rows, columns] tensor of `type_`."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[type_]
    return int(rows * (columns // block) * size)


_GRIDS = (768, 64), (384, 16), (0, 8)
"""Least inputs, and what ranks are multiples of."""


def rank_grid(type_: GGMLQuantizationType, n: int) -> int:
    """Ranks of a model whose narrowest layers have `n` inputs are multiples of this.

    Quantised rows are whole blocks, and Arm cores take two blocks of 32 at a time, a last one alone
    in scalar code. For F32, F16 and BF16, ggml multiplies matrices fast where rows are multiples of
    8, with AVX-512 of 16, and vectors where they are multiples of 64. In a narrow model ranks so
    coarse would cost more quality than the speed is worth.
    """
    return max(block_size(type_), next(grid for least, grid in _GRIDS if n >= least))


def factor_type(type_: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """`type_`, or F16 where rows of `columns` elements are not whole blocks."""
    from gguf import GGMLQuantizationType

    return type_ if columns % block_size(type_) == 0 else GGMLQuantizationType.F16


def factor_parameters(m: int, n: int, rank: int, skip: bool) -> int:
    """Parameters of B': [m, r] and T: [r, n - r] (A: [r, n] without Skip)."""
    return rank * (m + n - rank) if skip else rank * (m + n)


@dataclass(frozen=True)
class Member:
    """One factored linear layer of a file: B': [m, r]."""

    name: str
    m: int
    type: GGMLQuantizationType
    nbytes: int


@dataclass(frozen=True)
class Owner:
    """One shared projection of a file with the layers that read it."""

    layer: int
    name: str
    n: int
    rank: int
    skip: bool
    type: GGMLQuantizationType
    nbytes: int
    """Bytes of T (or A) and of the mask, without the members' B'."""
    members: tuple[Member, ...]
    levels: Levels = (0, 0)
    """The first and the last level that use these factors."""

    def used_at(self, level: int) -> bool:
        """Whether the level at this place uses these factors."""
        return self.levels[0] <= level <= self.levels[1]

    @property
    def m(self) -> int:
        """Outputs of all members."""
        return sum(member.m for member in self.members)

    @property
    def total_bytes(self) -> int:
        """Bytes of everything the owner and its members store."""
        return self.nbytes + sum(member.nbytes for member in self.members)

    @property
    def parameters(self) -> int:
        """Stored parameters (the mask is not counted)."""
        return factor_parameters(self.m, self.n, self.rank, self.skip)

    @property
    def full_rank(self) -> int:
        """The rank that would lose nothing: min(m, n)."""
        return min(self.m, self.n)

    @property
    def ratio(self) -> float:
        """Stored parameters over dense parameters."""
        return self.parameters / (self.m * self.n)


def field_value(reader: GGUFReader, key: str) -> Any:
    """Value of a metadata key, or None if the file does not have it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def is_low_rank(reader: GGUFReader) -> bool:
    """Whether the file's architecture carries this format's prefix."""
    return str(field_value(reader, KEY_ARCHITECTURE) or "").startswith(ARCHITECTURE_PREFIX)


def read_levels(reader: GGUFReader) -> tuple[float, ...]:
    """The ratios of the file's levels, ascending, as the user gave them; one for a file without levels,
    (1.0,) for a plain dense file.

    Raises FormatError, naming the key, where they break the format.
    """
    if not is_low_rank(reader):
        return (1.0,)
    version, levels = field_value(reader, KEY_FORMAT_VERSION), field_value(reader, KEY_LEVELS)
    if version not in (FORMAT_VERSION, LEVELS_FORMAT_VERSION):
        raise FormatError(
            f"{KEY_FORMAT_VERSION} is {version}, but this version reads up to {LEVELS_FORMAT_VERSION}; "
            "update skipcat-edge, or convert the model again."
        )
    if version == FORMAT_VERSION:
        ratio = field_value(reader, KEY_RATIO)
        return (_shortest(ratio) if isinstance(ratio, float) else 1.0,)
    if (not isinstance(levels, list) or not 2 <= len(levels) <= MAX_LEVELS
            or not all(isinstance(ratio, float) and 0 < ratio <= 1 for ratio in levels)
            or any(low >= high for low, high in pairwise(levels))):
        raise FormatError(f"{KEY_LEVELS} is not a list of 2 to {MAX_LEVELS} rising ratios between 0 and 1.")
    return tuple(_shortest(ratio) for ratio in levels)


def _shortest(ratio: float) -> float:
    """0.8 for the float32 nearest to it."""
    return float(str(np.float32(ratio)))


def read_owners(reader: GGUFReader) -> list[Owner]:
    """All owners of a file, by layer and first level; [] for a plain dense file.

    Raises FormatError, naming the tensor or key, where the file breaks the format.
    """
    if not is_low_rank(reader):
        return []
    count = len(read_levels(reader))
    found: dict[str, dict[_Key, Any]] = {"lr_a": {}, "lr_b": {}, "skip_mask": {}}
    dense = set()
    for tensor in reader.tensors:
        match = _TENSOR.match(tensor.name)
        if match is None:
            dense.add(tensor.name)
            continue
        key = _Key(int(match[1]), match[2], _levels_of(tensor.name, match[3], match[4] or "", count))
        _check_layout(tensor, match[3])
        found[match[3]][key] = tensor

    members: dict[_Key, list[Member]] = {}
    for key, b in found["lr_b"].items():
        own, shared = key, key._replace(name=GROUP_OF.get(key.name, ""))
        owner = own if own in found["lr_a"] else shared
        if owner not in found["lr_a"]:
            raise FormatError(f"{b.name}: its projection {_name(lr_a_name, own, count)} is missing.")
        member = Member(key.name, int(b.shape[1]), b.tensor_type, int(b.n_bytes))
        members.setdefault(owner, []).append(member)
    stray = sorted(found["skip_mask"].keys() - found["lr_a"].keys())
    if stray:
        raise FormatError(f"{_name(skip_mask_name, stray[0], count)}: its projection is missing.")
    _check_levels(found["lr_b"], dense, count)
    return [
        _read_owner(key, a, found["skip_mask"].get(key), found["lr_b"], members.get(key, []))
        for key, a in sorted(found["lr_a"].items())
    ]


def tensors_at(reader: GGUFReader, level: int) -> set[str]:
    """Names of the tensors that the level of this place uses; -1 is the last.

    Raises FormatError as `read_levels`, and for a name that is none of this format.
    """
    names = {tensor.name for tensor in reader.tensors}
    if not is_low_rank(reader):
        return names
    count = len(read_levels(reader))
    level %= count
    unused = set()
    for name in names:
        if match := _TENSOR.match(name):
            first, last = _levels_of(name, match[3], match[4] or "", count)
            if not first <= level <= last:
                unused.add(name)
            elif match[3] == "lr_b":
                unused.add(weight_name(int(match[1]), match[2]))  # which other levels may need
    return names - unused


class _Key(NamedTuple):
    layer: int
    name: str
    levels: Levels


def _name(of: Callable[[int, str, Levels | None], str], key: _Key, count: int) -> str:
    return of(key.layer, key.name, None if key.levels == (0, count - 1) else key.levels)


def _levels_of(name: str, role: str, suffix: str, count: int) -> Levels:
    match = _SUFFIX.fullmatch(suffix)
    if match is None or (match[3] is None) != (role == "skip_mask") or (match[1] and count == 1):
        version = FORMAT_VERSION if count == 1 else LEVELS_FORMAT_VERSION
        raise FormatError(f"{name}: not a tensor of format version {version}.")
    if match[1] is None:
        return 0, count - 1
    levels = int(match[1]), int(match[2])
    # factors of all levels have one name only
    if not levels[0] <= levels[1] < count or levels == (0, count - 1):
        raise FormatError(f"{name}: the file has the levels 0 to {count - 1}.")
    return levels


def _check_levels(lr_b: Mapping[_Key, Any], dense: Container[str], count: int) -> None:
    """Every level has exactly one meaning for every layer."""
    used: dict[tuple[int, str], set[int]] = {}
    for layer, name, (first, last) in lr_b:
        used.setdefault((layer, name), set()).update(range(first, last + 1))
    for (layer, name), levels in used.items():
        weight = weight_name(layer, name)
        if len(levels) == count and weight in dense:
            raise FormatError(f"{weight}: the layer has factors at every level.")
        if len(levels) < count and weight not in dense:
            raise FormatError(f"{weight} is missing: level {min(set(range(count)) - levels)} needs it.")


def _check_layout(tensor: Any, role: str) -> None:
    dimensions = 1 if role == "skip_mask" else 2
    if len(tensor.shape) != dimensions or not tensor.n_elements:
        raise FormatError(f"{tensor.name}: shape {tensor.shape.tolist()} instead of {dimensions} dimensions.")
    if role == "skip_mask" and tensor.data.dtype != np.int32:
        raise FormatError(f"{tensor.name}: type {tensor.tensor_type.name}, but a mask is I32.")


def _read_owner(key: _Key, a: Any, mask: Any, lr_b: Mapping[_Key, Any], members: list[Member]) -> Owner:
    if not members:
        raise FormatError(f"{a.name}: no layer reads this projection.")
    rank, n = int(a.shape[1]), int(a.shape[0])
    if mask is not None:
        n += rank
        try:
            popcount = int(unpack_skip_mask(np.asarray(mask.data), n).sum())
        except ValueError as error:
            raise FormatError(f"{mask.name}: {error}.") from None
        if popcount != rank:
            raise FormatError(f"{mask.name}: {popcount} inputs are set, but the rank is {rank}.")
    for member in members:
        b = lr_b[key._replace(name=member.name)]
        if int(b.shape[0]) != rank:
            raise FormatError(f"{b.name}: rank {int(b.shape[0])}, but its projection has rank {rank}.")
    nbytes = int(a.n_bytes) + (0 if mask is None else int(mask.n_bytes))
    return Owner(key.layer, key.name, n, rank, mask is not None, a.tensor_type, nbytes, tuple(members),
                 key.levels)
