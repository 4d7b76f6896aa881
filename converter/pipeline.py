"""The whole conversion: model -> statistics -> allocation -> factors -> quantised factors -> file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor

from skipcat_edge import format as fmt
from skipcat_edge.errors import UserError
from skipcat_edge.output import atomic_output

from .base_gguf import write_base
from .calibration import CalibrationSet, load_calibration, require_calibration
from .factorize import Factors, Method, factorize
from .layers import LayerMap, keeps_input_order, map_layers
from .plan import Plan, PlannedOwner, plan_uniform
from .quantized import QuantizedFactors, quantize_factors
from .source_model import SourceModel, load_source
from .statistics import BlockStatistics, block_statistics, split_by_input
from .writer import OutputTypes, make_layout, read_weight, write_file

Phase = Callable[[str, float], AbstractContextManager[Callable[[float], None]]]
"""Opens a progress display (title, total) and gives the function that advances it."""


@dataclass(frozen=True)
class ConvertOptions:
    """What the user asked for."""

    source: Path
    """Hugging Face directory."""
    output: Path
    method: Method
    ratio: float
    types: OutputTypes
    tree: Path
    """The pinned source, with llama.cpp's converter and tensor names."""
    source_name: str | None = None
    """Of a model from the hub; a directory's own name otherwise."""
    base: Path | None = None
    calibration: Path | None = None
    calib_tokens: int | None = None
    seq_len: int | None = None
    device: str = "cpu"
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class OwnerReport:
    """How one owner came out."""

    owner: PlannedOwner
    error: float
    """Predicted relative error of the outputs (squared), before quantisation."""
    largest_t: float
    """Largest |T_ij|."""


@dataclass
class ConvertResult:
    """What was written."""

    output_bytes: int = 0
    owners: list[OwnerReport] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    """Linear layers that stayed dense -> why."""
    calibration_tokens: int = 0


def convert(options: ConvertOptions, phase: Phase) -> ConvertResult:
    """Convert, and write `options.output` whole or not at all.

    Raises UserError for bad input; see each stage.
    """
    torch.manual_seed(options.seed)
    with (
        atomic_output(options.output, options.force) as partial,
        tempfile.TemporaryDirectory(prefix=f".{partial.name}", dir=partial.absolute().parent) as scratch,
    ):
        result = ConvertResult()
        # Before the base file, which takes longer: most of a user's mistakes show here.
        inputs = None if options.ratio == 1.0 else _load_inputs(options, phase)
        reader = GGUFReader(options.base or _make_base(options, Path(scratch), phase))
        _check_base(reader, options.base)
        if inputs is None:
            _write_dense(options, reader, partial, phase)
        else:
            _write_low_rank(options, reader, partial, phase, *inputs, result)
        result.output_bytes = partial.stat().st_size
    return result


def _load_inputs(options: ConvertOptions, phase: Phase) -> tuple[SourceModel, CalibrationSet | None]:
    require_calibration(options.method, options.calibration)
    with phase("Loading the model", 1) as advance:
        model = load_source(options.source, options.device)
        advance(1)
    if options.calibration is None or not options.method.whiten:
        return model, None
    return model, load_calibration(options.calibration, model, options.calib_tokens, options.seq_len)


def _check_base(reader: GGUFReader, path: Path | None) -> None:
    if fmt.is_low_rank(reader):
        raise UserError(f"{path} is low-rank already; give a dense base file.")
    if int(fmt.field_value(reader, "split.count") or 1) > 1:
        raise UserError(f"{path} is one part of a split file; merge the parts with llama-gguf-split first.")


def _make_base(options: ConvertOptions, scratch: Path, phase: Phase) -> Path:
    out = scratch / "base.gguf"
    exact = {GGMLQuantizationType.F32: "f32", GGMLQuantizationType.BF16: "bf16"}
    out_type = exact.get(options.types.linear, "f16")
    with phase("Converting to GGUF", 100) as advance:
        done = 0

        def to(percent: int) -> None:
            nonlocal done
            advance(percent - done)
            done = percent

        write_base(options.source, out, out_type, options.tree, options.source_name, to)
        to(100)
    return out


def _write_dense(options: ConvertOptions, reader: GGUFReader, partial: Path, phase: Phase) -> None:
    layout = make_layout(reader, [], options.types)
    architecture = str(fmt.field_value(reader, fmt.KEY_ARCHITECTURE))
    total = sum(slot.nbytes for slot in layout.slots())
    with phase("Writing", total) as advance:
        metadata = {fmt.KEY_ARCHITECTURE: (architecture, GGUFValueType.STRING)}
        write_file(partial, reader, layout, metadata, iter(()), advance=advance)


def _write_low_rank(
    options: ConvertOptions,
    reader: GGUFReader,
    partial: Path,
    phase: Phase,
    model: SourceModel,
    calibration: CalibrationSet | None,
    result: ConvertResult,
) -> None:
    layers = _checked_layers(reader, map_layers(reader, model.module, options.tree), model)
    if calibration is not None:
        result.calibration_tokens = calibration.tokens
        layers = split_by_input(model, layers, calibration)
    plan = plan_uniform(layers.groups, options.method, options.ratio, options.types.linear)
    result.dense = {**layers.dense, **plan.dense}
    if not plan.owners:
        reasons = Counter(result.dense.values()).most_common(1)
        reason = reasons[0][0] if reasons else "it has no linear layers that the runtime factors"
        hint = "; raise --ratio, or choose a --quant with a smaller block" if plan.dense else ""
        raise UserError(
            f"No layer of {model.name} can be low-rank at ratio {options.ratio:g}: {reason}{hint}."
        )
    layout = make_layout(reader, plan.owners, options.types)
    metadata = _metadata(options, layers, model, calibration)
    with phase("Factoring", len(plan.owners)) as advance:
        factors = _factors(options, reader, model, layers, plan, calibration, phase, advance, result)
        write_file(partial, reader, layout, metadata, factors)


def _checked_layers(reader: GGUFReader, layers: LayerMap, model: SourceModel) -> LayerMap:
    """`layers` without those whose inputs llama.cpp's converter reorders."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    dense = dict(layers.dense)
    groups = []
    for group in layers.groups:
        kept = []
        for layer in group:
            weight = model.module.get_submodule(layer.module).weight
            assert isinstance(weight, torch.Tensor)
            if keeps_input_order(read_weight(tensors[layer.tensor]), weight):
                kept.append(layer)
            else:
                dense[layer.tensor] = "its inputs in the file are not its module's"
        if kept:
            groups.append(tuple(kept))
    return LayerMap(layers.architecture, groups, dense)


def _factors(
    options: ConvertOptions,
    reader: GGUFReader,
    model: SourceModel,
    layers: LayerMap,
    plan: Plan,
    calibration: CalibrationSet | None,
    phase: Phase,
    advance: Callable[[float], None],
    result: ConvertResult,
) -> Iterator[tuple[PlannedOwner, QuantizedFactors]]:
    """Factor and quantise owner after owner, with one block's statistics at a time."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for block, statistics in _statistics(model, layers, calibration, phase):
        owners = [owner for owner in plan.owners if owner.block == block]
        for owner in _in_file_order(owners, tensors):
            H = statistics[owner.members[0].tensor].H if statistics else None
            factors = _factor_owner(owner, tensors, H, options)
            result.owners.append(OwnerReport(owner, factors.error, float(factors.T.abs().max())))
            yield owner, quantize_factors(factors, H, owner.outputs, options.types.linear)
            advance(1)


def _statistics(
    model: SourceModel, layers: LayerMap, calibration: CalibrationSet | None, phase: Phase
) -> Iterator[tuple[int, BlockStatistics]]:
    blocks = sorted({group[0].index for group in layers.groups})
    if calibration is None:
        yield from ((block, {}) for block in blocks)
        return
    with phase("Calibrating", (blocks[-1] + 1) * len(calibration.batches)) as advance:
        yield from block_statistics(model, layers, calibration, lambda: advance(1))


def _in_file_order(owners: list[PlannedOwner], tensors: dict[str, ReaderTensor]) -> list[PlannedOwner]:
    position = {name: index for index, name in enumerate(tensors)}
    return sorted(owners, key=lambda owner: min(position[layer.tensor] for layer in owner.members))


def _factor_owner(
    owner: PlannedOwner, tensors: dict[str, ReaderTensor], H: torch.Tensor | None, options: ConvertOptions
) -> Factors:
    W = torch.from_numpy(np.concatenate([read_weight(tensors[layer.tensor]) for layer in owner.members]))
    try:
        return factorize(W.to(options.device), H, owner.rank, owner.skip)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{owner.members[0].tensor} cannot be factored: {error}; "
                        "use more calibration tokens or a lower ratio.") from None


def _metadata(
    options: ConvertOptions, layers: LayerMap, model: SourceModel, calibration: CalibrationSet | None
) -> dict[str, tuple[Any, GGUFValueType]]:
    return {
        fmt.KEY_ARCHITECTURE: (fmt.ARCHITECTURE_PREFIX + layers.architecture, GGUFValueType.STRING),
        fmt.KEY_FORMAT_VERSION: (fmt.FORMAT_VERSION, GGUFValueType.UINT32),
        fmt.KEY_RUNTIME_MIN: (fmt.RUNTIME_MIN, GGUFValueType.STRING),
        fmt.KEY_RATIO: (options.ratio, GGUFValueType.FLOAT32),
        fmt.KEY_METHOD: (options.method.name, GGUFValueType.STRING),
        fmt.KEY_SOURCE_NAME: (options.source_name or model.name, GGUFValueType.STRING),
        fmt.KEY_CALIBRATION_SHA256: (calibration.sha256 if calibration else "", GGUFValueType.STRING),
        fmt.KEY_CALIBRATION_TOKENS: (calibration.tokens if calibration else 0, GGUFValueType.UINT32),
        fmt.KEY_SEED: (options.seed, GGUFValueType.UINT32),
    }
