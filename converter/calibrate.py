"""The statistics stage: a model and a text in, a file of statistics out; or the file of another time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gguf import GGUFReader

from skipcat_edge.errors import UserError
from skipcat_edge.extra import Phase
from skipcat_edge.output import atomic_output

from .calibration import DEFAULT_SEQ_LEN, DEFAULT_TOKENS, load_calibration
from .layers import LayerMap, keeps_input_order, linear_weight, map_layers
from .source_model import SourceModel, load_source
from .statistics import block_statistics, split_by_input
from .statistics_file import Provenance, Statistics, read_statistics, source_sha256, write_statistics
from .writer import read_weight


@dataclass(frozen=True)
class CalibrationOptions:
    """What to read, and how much of it."""

    text: Path | None
    """None: only statistics that are there already can be used."""
    tokens: int | None = None
    seq_len: int | None = None
    gradients: bool = True
    device: str = "cpu"
    seed: int | None = None
    """None: 0, or whatever statistics that are there already were taken with."""


def obtain_statistics(
    source: Path, reader: GGUFReader, tree: Path, options: CalibrationOptions, path: Path, phase: Phase,
    model: SourceModel | None = None,
) -> Statistics:
    """The statistics in `path`, or, where it does not exist, new ones that are written there.

    `reader`: the base file; `tree`: the pinned source, with its tensor names; `model`: the source,
    if it is loaded already. Raises UserError where the file holds those of another model or text.
    """
    with phase("Reading the model", 1) as advance:
        digest = source_sha256(source, path)
        advance(1)
    expected = Provenance(digest, None, 0, options.seq_len, options.tokens, options.gradients, options.seed)
    if options.text is not None:
        expected = Provenance(
            digest, _text_sha256(options.text), 0, options.seq_len or DEFAULT_SEQ_LEN,
            DEFAULT_TOKENS if options.tokens is None else options.tokens, options.gradients,
            options.seed or 0)
    if path.exists():
        statistics = read_statistics(path, expected)
        _check_shapes(statistics, reader, path)
        return statistics
    if options.text is None:
        raise UserError(f"{path} does not exist, and there is no text to take statistics from; "
                        "pass --calibration FILE.")
    model = model or load_model(source, options.device, phase)
    calibration = load_calibration(options.text, model, options.tokens, options.seq_len)
    layers = split_by_input(model, checked_layers(reader, map_layers(reader, model.module, tree), model),
                            calibration)
    blocks = sorted({group[0].index for group in layers.groups})
    if not blocks:
        raise UserError(f"{model.name} has no linear layers that the runtime factors.")
    provenance = replace(expected, text_sha256=calibration.sha256, tokens=calibration.tokens)
    with_output = set() if not options.gradients else {
        layer.tensor for group in layers.groups for layer in group
        if linear_weight(model.module.get_submodule(layer.module), layer) is not None
    }
    with (
        atomic_output(path, force=False) as partial,
        phase("Calibrating", 2 * (blocks[-1] + 1) * len(calibration.batches)) as advance,
    ):
        found = block_statistics(model, layers, calibration, lambda: advance(1), options.gradients,
                                 options.seed or 0)
        write_statistics(partial, provenance, layers, with_output, found)
    return Statistics(path, provenance, layers)


def load_model(source: Path, device: str, phase: Phase) -> SourceModel:
    """Load the Hugging Face model at `source`, behind a progress display."""
    with phase("Loading the model", 1) as advance:
        model = load_source(source, device)
        advance(1)
    return model


def checked_layers(reader: GGUFReader, layers: LayerMap, model: SourceModel) -> LayerMap:
    """`layers` without those whose inputs llama.cpp's converter reorders."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    dense = dict(layers.dense)
    groups = []
    for group in layers.groups:
        kept = []
        for layer in group:
            module = model.module.get_submodule(layer.module)
            own = linear_weight(module, layer)
            weight = module.weight if own is None else own
            assert isinstance(weight, torch.Tensor)
            if keeps_input_order(read_weight(tensors[layer.tensor]), weight):
                kept.append(layer)
            else:
                dense[layer.tensor] = "its inputs in the file are not its module's"
        if kept:
            groups.append(tuple(kept))
    return LayerMap(layers.architecture, groups, dense)


def _check_shapes(statistics: Statistics, reader: GGUFReader, path: Path) -> None:
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    for layer in (layer for group in statistics.layers.groups for layer in group):
        if shapes.get(layer.tensor) != (layer.n, layer.m):
            raise UserError(f"{path} has statistics for {layer.tensor} of {layer.m} x {layer.n}, which the "
                            "base file does not have; give the base file of the same model.")


def _text_sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"Calibration text {path} cannot be read: {error.strerror}.") from None
