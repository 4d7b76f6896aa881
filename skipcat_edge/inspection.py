"""What a GGUF file stores: its low-rank owners, dense layers, sizes and provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge import format as fmt
from skipcat_edge.errors import FormatError
from skipcat_edge.gguf_file import open_gguf

if TYPE_CHECKING:
    from gguf import GGUFReader

_PROVENANCE = (
    fmt.KEY_FORMAT_VERSION, fmt.KEY_RUNTIME_MIN, fmt.KEY_RATIO, fmt.KEY_METHOD, fmt.KEY_SOURCE_NAME,
    fmt.KEY_CALIBRATION_SHA256, fmt.KEY_CALIBRATION_TOKENS, fmt.KEY_SEED,
)


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer stored as one matrix W: [m, n]."""

    layer: int
    name: str
    m: int
    n: int
    type: str
    nbytes: int

    @property
    def parameters(self) -> int:
        """m n."""
        return self.m * self.n


@dataclass(frozen=True)
class Totals:
    """Sums over a file; parameters count the linear layers of all blocks, bytes the tensors."""

    dense_parameters: int
    """Before compression."""
    stored_parameters: int
    ratio: float
    """Stored over dense; 1.0 for a dense file."""
    low_rank_bytes: int
    dense_layer_bytes: int
    other_bytes: int
    """Embeddings, output head, norms, biases, experts."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.low_rank_bytes + self.dense_layer_bytes + self.other_bytes


@dataclass(frozen=True)
class Inspection:
    """Everything `skipcat-edge inspect` shows of one file."""

    file: str
    file_bytes: int
    architecture: str
    keys: dict[str, Any]
    """The format and provenance keys that the file has."""
    owners: tuple[fmt.Owner, ...]
    dense_layers: tuple[DenseLayer, ...]
    totals: Totals

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, types by name, for --json."""
        return {
            "file": self.file,
            "file_bytes": self.file_bytes,
            "architecture": self.architecture,
            "keys": self.keys,
            "owners": [_owner_json(owner) for owner in self.owners],
            "dense_layers": [_renamed(asdict(layer)) for layer in self.dense_layers],
            "totals": {**asdict(self.totals), "tensor_bytes": self.totals.tensor_bytes},
        }


def inspect(path: str | Path) -> Inspection:
    """Read `path`, a GGUF file, without llama.cpp.

    Raises UserError if it is missing, not GGUF, cut short or damaged, and FormatError, with the
    file's and the tensor's name, where it breaks the low-rank format.
    """
    path = Path(path)
    reader = open_gguf(path)
    try:
        owners = tuple(fmt.read_owners(reader))
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}") from None
    dense = _dense_layers(reader)
    return Inspection(
        file=str(path),
        file_bytes=path.stat().st_size,
        architecture=str(fmt.field_value(reader, fmt.KEY_ARCHITECTURE) or "unknown"),
        keys=_keys(reader),
        owners=owners,
        dense_layers=dense,
        totals=_totals(reader, owners, dense),
    )


def _keys(reader: GGUFReader) -> dict[str, Any]:
    found = {key: fmt.field_value(reader, key) for key in _PROVENANCE}
    # GGUF's floats have 32 bits: 0.8 would read 0.800000011920929.
    return {key: float(f"{value:.7g}") if isinstance(value, float) else value
            for key, value in found.items() if value is not None}


def _dense_layers(reader: GGUFReader) -> tuple[DenseLayer, ...]:
    found = ((fmt.parse_weight_name(tensor.name), tensor) for tensor in reader.tensors)
    return tuple(
        DenseLayer(*place, int(w.shape[1]), int(w.shape[0]), w.tensor_type.name, int(w.n_bytes))
        for place, w in found
        if place is not None and len(w.shape) == 2
    )


def _totals(reader: GGUFReader, owners: Sequence[fmt.Owner], dense: Sequence[DenseLayer]) -> Totals:
    dense_layer_parameters = sum(layer.parameters for layer in dense)
    before = dense_layer_parameters + sum(owner.m * owner.n for owner in owners)
    stored = dense_layer_parameters + sum(owner.parameters for owner in owners)
    low_rank_bytes = sum(owner.total_bytes for owner in owners)
    dense_bytes = sum(layer.nbytes for layer in dense)
    everything = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    return Totals(
        dense_parameters=before,
        stored_parameters=stored,
        ratio=stored / before if before else 1.0,
        low_rank_bytes=low_rank_bytes,
        dense_layer_bytes=dense_bytes,
        other_bytes=everything - low_rank_bytes - dense_bytes,
    )


def _owner_json(owner: fmt.Owner) -> dict[str, Any]:
    return {
        "layer": owner.layer,
        "owner": owner.name,
        "members": [
            {"name": member.name, "m": member.m, "type": member.type.name, "bytes": member.nbytes}
            for member in owner.members
        ],
        "m": owner.m,
        "n": owner.n,
        "rank": owner.rank,
        "full_rank": owner.full_rank,
        "skip": owner.skip,
        "ratio": owner.ratio,
        "type": owner.type.name,
        "bytes": owner.total_bytes,
    }


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    return {"bytes" if key == "nbytes" else key: value for key, value in values.items()}
