"""What a GGUF file stores: its low-rank owners, dense layers, sizes and provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge import format as fmt
from skipcat_edge.errors import FormatError
from skipcat_edge.gguf_file import open_gguf
from skipcat_edge.traffic import read_per_token

if TYPE_CHECKING:
    from gguf import GGUFReader

_PROVENANCE: dict[str, type] = {
    fmt.KEY_FORMAT_VERSION: int, fmt.KEY_RUNTIME_MIN: str, fmt.KEY_RATIO: float, fmt.KEY_METHOD: str,
    fmt.KEY_SOURCE_NAME: str, fmt.KEY_CALIBRATION_SHA256: str, fmt.KEY_CALIBRATION_TOKENS: int,
    fmt.KEY_SEED: int,
}


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
class Level:
    """One speed of a file that has several."""

    ratio: float
    """Its name: what was asked for."""
    kept: float
    """Parameters of the linear layers that it uses, over those before compression."""
    bytes_per_token: int
    """Weights that decoding a token reads."""
    share: float
    """The same over that of the full level."""
    loss: float | None
    """What the converter predicted; None where it said nothing."""


@dataclass(frozen=True)
class Totals:
    """Sums over a file; parameters count the linear layers of all blocks, bytes the tensors."""

    dense_parameters: int
    """Before compression; a layer counts once, however many levels store it."""
    stored_parameters: int
    """Of all levels."""
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
    levels: tuple[Level, ...] = ()
    """Of a file that has several, ascending."""

    @property
    def kept(self) -> float:
        """The share of the linear layers' parameters that the full level uses."""
        return self.levels[-1].kept if self.levels else self.totals.ratio

    def levels_of(self, part: fmt.Owner | DenseLayer) -> list[float]:
        """Ratios of the levels that use an owner or a dense layer."""
        return [level.ratio for place, level in enumerate(self.levels) if _uses(place, part, self.owners)]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, types by name, for --json; `levels` only where there are several."""
        def levels(part: fmt.Owner | DenseLayer) -> dict[str, Any]:
            return {"levels": self.levels_of(part)} if self.levels else {}

        return {
            "file": self.file,
            "file_bytes": self.file_bytes,
            "architecture": self.architecture,
            "keys": self.keys,
            **({"levels": [asdict(level) for level in self.levels]} if self.levels else {}),
            "owners": [_owner_json(owner) | levels(owner) for owner in self.owners],
            "dense_layers": [_renamed(asdict(layer)) | levels(layer) for layer in self.dense_layers],
            "totals": {**asdict(self.totals), "tensor_bytes": self.totals.tensor_bytes},
        }


def full_level(inspection: Inspection) -> tuple[list[fmt.Owner], list[DenseLayer]]:
    """The owners and dense layers that the full level uses: all of a file without levels."""
    full = max(len(inspection.levels) - 1, 0)
    return ([owner for owner in inspection.owners if owner.used_at(full)],
            [layer for layer in inspection.dense_layers if _uses(full, layer, inspection.owners)])


def _uses(place: int, part: fmt.Owner | DenseLayer, owners: Sequence[fmt.Owner]) -> bool:
    if isinstance(part, fmt.Owner):
        return part.used_at(place)
    return not any(owner.layer == part.layer and owner.used_at(place)
                   and any(member.name == part.name for member in owner.members) for owner in owners)


def inspect(path: str | Path) -> Inspection:
    """Read `path`, a GGUF file, without llama.cpp.

    Raises UserError if it is missing, not GGUF, cut short or damaged, and FormatError, with the
    file's and the tensor's name, where it breaks the low-rank format.
    """
    path = Path(path)
    reader = open_gguf(path)
    try:
        owners = tuple(fmt.read_owners(reader))
        ratios = fmt.read_levels(reader)
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}") from None
    dense = _dense_layers(reader)
    totals = _totals(reader, owners, dense)
    return Inspection(
        file=str(path),
        file_bytes=path.stat().st_size,
        architecture=str(fmt.field_value(reader, fmt.KEY_ARCHITECTURE) or "unknown"),
        keys=_keys(reader, path),
        owners=owners,
        dense_layers=dense,
        totals=totals,
        levels=_levels(reader, ratios, owners, dense, totals) if len(ratios) > 1 else (),
    )


def _levels(reader: GGUFReader, ratios: Sequence[float], owners: Sequence[fmt.Owner],
            dense: Sequence[DenseLayer], totals: Totals) -> tuple[Level, ...]:
    losses = fmt.field_value(reader, fmt.KEY_LEVELS_LOSS)
    if not isinstance(losses, list) or len(losses) != len(ratios):
        losses = [None] * len(ratios)
    nbytes = [read_per_token(reader, place) for place in range(len(ratios))]
    parts: list[fmt.Owner | DenseLayer] = [*owners, *dense]
    used = [sum(part.parameters for part in parts if _uses(place, part, owners))
            for place in range(len(ratios))]
    return tuple(
        Level(ratio, used[place] / totals.dense_parameters, nbytes[place], nbytes[place] / nbytes[-1],
              None if loss is None else float(f"{loss:.7g}"))
        for place, (ratio, loss) in enumerate(zip(ratios, losses, strict=True))
    )


def _keys(reader: GGUFReader, path: Path) -> dict[str, Any]:
    found = {key: fmt.field_value(reader, key) for key in _PROVENANCE}
    for key, value in found.items():
        if value is not None and type(value) is not _PROVENANCE[key]:
            raise FormatError(f"{path}: {key} is no {_PROVENANCE[key].__name__}; convert the model again.")
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
    layers = {(layer.layer, layer.name): layer.parameters for layer in dense}
    layers |= {(owner.layer, member.name): member.m * owner.n for owner in owners for member in owner.members}
    before = sum(layers.values())
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
