"""Statistics on disk: one safetensors file, written block by block and read lazily.

    <group's first tensor>.H           [n, n], with .H.shrinkage: [1]
    <tensor>.C                         [min(m, n), n], with .C.shrinkage and .C.mean_weight: [1]

The metadata says whose statistics they are: hashes of the model's weights and of the text, what
was read, and which layers of the model stand behind the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from skipcat_edge.errors import UserError, first_line

from .collector import BlockStatistics, InputStatistics, LayerStatistics, OutputStatistics
from .job import Job
from .layers import Layer, LayerMap

_FORMAT = "skipcat-statistics-1"
_SOURCE_FILES = frozenset({".json", ".safetensors", ".bin", ".model", ".txt"})
# Bytes of a model's files that are hashed at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Provenance:
    """What the statistics were taken from; another of any of these gives other statistics."""

    source_sha256: str
    text_sha256: str | None
    tokens: int
    """Calibration tokens, without special ones of a causal model."""
    seq_len: int | None
    calib_tokens: int | None
    """The most that was to be read."""
    gradients: bool
    seed: int | None


_WORDS = {
    "source_sha256": "model", "text_sha256": "calibration text", "seq_len": "--seq-len",
    "calib_tokens": "--calib-tokens", "seed": "--seed",
}


@dataclass(frozen=True)
class Statistics:
    """All statistics of one calibration."""

    path: Path
    provenance: Provenance
    layers: LayerMap

    def block(self, index: int) -> BlockStatistics:
        """Statistics of one block's layers, whose matrices are read from the file when they are asked for."""
        statistics: BlockStatistics = {}
        with safe_open(self.path, framework="pt") as file:
            names = set(file.keys())

            def number(name: str) -> float:
                return float(file.get_tensor(name))

            for group in (group for group in self.layers.groups if group[0].index == index):
                H = f"{group[0].tensor}.H"
                shared = InputStatistics(partial(self._matrix, H), self.provenance.tokens,
                                         number(f"{H}.shrinkage"))
                for layer in group:
                    C, output = f"{layer.tensor}.C", None
                    if C in names:
                        output = OutputStatistics(partial(self._matrix, C), number(f"{C}.mean_weight"),
                                                  number(f"{C}.shrinkage"))
                    statistics[layer.tensor] = LayerStatistics(shared, output)
        return statistics

    def _matrix(self, name: str) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            matrix: torch.Tensor = file.get_tensor(name)
            if not bool(torch.isfinite(matrix).all()):
                raise UserError(f"{self.path}: the statistics of {name.rpartition('.')[0]} are not finite "
                                "numbers; remove the file and calibrate again.")
            double: torch.Tensor = matrix.double()
            return double

    def largest_shrinkage(self) -> float:
        """The most that any of the second moments was moved towards its diagonal, in [0, 1]."""
        with safe_open(self.path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(".shrinkage")]  # noqa: SIM118
            return max(float(file.get_tensor(name)) for name in names)


def write_statistics(
    job: Job, artifact: str, provenance: Provenance, layers: LayerMap, with_output: set[str],
    blocks: Iterable[tuple[int, BlockStatistics]],
) -> None:
    """Write `blocks`, whole groups of some block's layers, to `artifact` as they come, each being on the disk
    before the next one is asked for; what an earlier run wrote stays. `with_output`: the layers that will
    have a C."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group in layers.groups:
        shapes[f"{group[0].tensor}.H"] = (group[0].n, group[0].n)
        shapes[f"{group[0].tensor}.H.shrinkage"] = (1,)
        for layer in group:
            if layer.tensor in with_output:
                shapes[f"{layer.tensor}.C"] = (min(layer.m, layer.n), layer.n)
                shapes.update({f"{layer.tensor}.C.{name}": (1,) for name in ("mean_weight", "shrinkage")})
    header: dict[str, object] = {"__metadata__": {
        "format": _FORMAT,
        "provenance": json.dumps(asdict(provenance)),
        "architecture": layers.architecture,
        "groups": json.dumps([[asdict(layer) for layer in group] for group in layers.groups]),
        "dense": json.dumps(layers.dense),
    }}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    offset = 8 + len(encoded)
    if not job.has(artifact):
        with job.artifact(artifact) as path, path.open("wb") as empty:
            empty.write(len(encoded).to_bytes(8, "little") + encoded)
            empty.truncate(offset + end)
    with job.path(artifact).open("rb+") as file:

        def put(name: str, value: torch.Tensor | float) -> None:
            matrix = value.float().cpu() if isinstance(value, torch.Tensor) else [value]
            array = np.asarray(matrix, dtype="<f4")
            assert array.shape == shapes[name], (name, array.shape)
            place = header[name]
            assert isinstance(place, dict)
            file.seek(offset + place["data_offsets"][0])
            file.write(np.ascontiguousarray(array).data)

        for _, statistics in blocks:
            for group in (group for group in layers.groups if group[0].tensor in statistics):
                shared = statistics[group[0].tensor].input
                put(f"{group[0].tensor}.H", shared.H)
                put(f"{group[0].tensor}.H.shrinkage", shared.shrinkage)
                for layer in group:
                    output = statistics[layer.tensor].output
                    if layer.tensor in with_output:
                        if output is None:
                            raise UserError(f"No gradient reaches {layer.module}; pass --no-grad.")
                        put(f"{layer.tensor}.C", output.C)
                        put(f"{layer.tensor}.C.mean_weight", output.mean_weight)
                        put(f"{layer.tensor}.C.shrinkage", output.shrinkage)
            file.flush()
            os.fsync(file.fileno())


def read_statistics(path: Path, expected: Provenance) -> Statistics:
    """Open the statistics at `path`.

    Raises UserError, naming what differs, unless they were taken from what `expected` says. A field
    of `expected` that is None, and its tokens, may be anything; statistics with gradients serve
    those who need none.
    """
    provenance, metadata = _read_metadata(path)
    try:
        groups = [tuple(Layer(**layer) for layer in group) for group in json.loads(metadata["groups"])]
        layers = LayerMap(metadata["architecture"], groups, dict(json.loads(metadata["dense"])))
        _check_tensors(path, layers)
    except _BROKEN as error:
        raise _no_statistics(path, error) from None
    # only gradients are random
    words = {field: word for field, word in _WORDS.items() if field != "seed" or provenance.gradients}
    for field, word in words.items():
        wanted = getattr(expected, field)
        known = getattr(provenance, field)
        if wanted is not None and known != wanted:
            values = f" ({known}; this conversion: {wanted})" if isinstance(wanted, int) else ""
            raise UserError(f"{path} holds the statistics of another {word}{values}; "
                            "name another file with --stats, or remove this one.")
    if expected.gradients and not provenance.gradients:
        raise UserError(f"{path} holds statistics without gradients; pass --no-grad, "
                        "or remove it so that they are taken.")
    return Statistics(path, provenance, layers)


def read_provenance(path: Path) -> Provenance:
    """What the statistics at `path` were taken from. Raises UserError where there are none."""
    return _read_metadata(path)[0]


_BROKEN = (SafetensorError, ValueError, TypeError, KeyError, OSError)


def _read_metadata(path: Path) -> tuple[Provenance, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError("another kind of file")
        return Provenance(**json.loads(metadata["provenance"])), metadata
    except _BROKEN as error:
        raise _no_statistics(path, error) from None


def _no_statistics(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} does not hold calibration statistics ({first_line(error)}); "
                     "name another file with --stats.")


def _check_tensors(path: Path, layers: LayerMap) -> None:
    """Raise ValueError where a tensor is missing or has another shape than `layers` says."""
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected: dict[str, tuple[int, ...]] = {}
    for group in layers.groups:
        n = group[0].n
        expected |= {f"{group[0].tensor}.H": (n, n), f"{group[0].tensor}.H.shrinkage": (1,)}
        for layer in group:
            name = f"{layer.tensor}.C"
            if name in shapes:
                expected[name] = min(layer.m, n), n
                expected |= {f"{name}.{part}": (1,) for part in ("shrinkage", "mean_weight")}
    wrong = sorted(name for name, shape in expected.items() if shapes.get(name) != shape)
    if wrong:
        raise ValueError(f"{wrong[0]} is missing or has another shape")


def source_sha256(source: Path, statistics: Path | None = None) -> str:
    """Hash of a Hugging Face directory's configuration, tokenizer and weights, without `statistics`,
    which may lie there too."""
    digest = hashlib.sha256()
    own = None if statistics is None else statistics.absolute()
    for file in [*sorted(source.iterdir()), source / "1_Pooling" / "config.json"]:
        if file.is_file() and file.absolute() != own and file.suffix in _SOURCE_FILES:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as data:
                while chunk := data.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()
