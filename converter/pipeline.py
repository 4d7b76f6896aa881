"""The whole conversion: model -> statistics -> allocation -> factors -> quantised factors -> file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from skipcat_edge import format as fmt
from skipcat_edge.card import Conversion, new_card
from skipcat_edge.card_source import source_of_directory
from skipcat_edge.errors import UnreachableError, UserError
from skipcat_edge.extra import Phase
from skipcat_edge.output import atomic_outputs

from .allocation import Groups
from .base_gguf import open_base
from .calibrate import CalibrationOptions, checked_layers, load_model, obtain_statistics
from .calibration import load_calibration, require_calibration
from .compensation import Compensation, open_compensation
from .compression import Compressor, OwnerReport, Weights
from .factorize import Method
from .layers import LayerMap, map_layers
from .plan import Plan, plan_uniform
from .planning import Budget, make_level_plan, make_plan, measure_groups
from .quantized import Rounding
from .source_model import SourceModel
from .stages import level_weights
from .statistics_file import Statistics
from .writer import OutputTypes, make_layout, metadata_bytes, write_file


@dataclass(frozen=True)
class ConvertOptions:
    """What the user asked for."""

    source: Path
    """Hugging Face directory."""
    output: Path
    method: Method
    types: OutputTypes
    tree: Path
    """The pinned source, with llama.cpp's converter and tensor names."""
    ratio: float = 0.8
    """Unless one of the next two is given."""
    budget: int | None = None
    """Bytes of the whole file."""
    bpw: float | None = None
    """Bits per dense weight of the linear layers."""
    levels: tuple[float, ...] = ()
    """Ratios of the file's levels, rising; `ratio` is the last. None for a file without levels."""
    level_overhead: float = 0.1
    """How much larger the file may be than one of its last level alone, as a share."""
    allocation: str | None = None
    """None: the method's own."""
    grid: int | None = None
    """Ranks are its multiples; None: what the type needs."""
    rounding: Rounding = field(default_factory=Rounding)
    source_name: str | None = None
    """Of a model from the hub; a directory's own name otherwise."""
    base: Path | None = None
    calibration: Path | None = None
    stats: Path | None = None
    """Where statistics are kept."""
    gradients: bool = True
    compensate: bool = True
    calib_tokens: int | None = None
    seq_len: int | None = None
    device: str = "cpu"
    seed: int | None = None
    """Of gradients; None: 0, or that of the statistics that are there."""
    card: Path | None = None
    """Where the model card goes; None: there is none."""
    force: bool = False

    @property
    def dense(self) -> bool:
        """A plain GGUF was asked for."""
        return self.budget is None and self.bpw is None and self.ratio == 1.0

    @property
    def compensated(self) -> bool:
        """Later layers make up for earlier ones; that runs the model on the text."""
        return self.compensate and self.calibration is not None and self.method.compensate

    @property
    def two_sided(self) -> bool:
        """Gradients say what matters."""
        return self.method.two_sided or self.allocation == "flrc"

    @property
    def calibrated(self) -> bool:
        """There are statistics to convert by."""
        return self.calibration is not None or self.stats is not None


@dataclass(frozen=True)
class LevelResult:
    """One level of what was written."""

    ratio: float
    """Asked for; the level's name."""
    kept: float
    """What it reads of the layers that could be factored, over their dense parameters."""
    loss: float
    """Predicted, before compensation, in the unit of the statistics."""


@dataclass
class ConvertResult:
    """What was written."""

    output_bytes: int = 0
    owners: list[OwnerReport] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    """Linear layers that stayed dense -> why."""
    kept: float = 1.0
    """Stored over dense parameters of the layers that could be factored; of the last level, where there are
    levels."""
    levels: tuple[LevelResult, ...] = ()
    calibration_tokens: int = 0
    calibration_sha256: str | None = None
    """Of the text; None where it is not known."""
    not_compensated: str = ""
    """Why errors could not be compensated across layers, where that was asked for."""
    shrinkage: float = 0.0
    """The most that any second moments were moved towards their diagonal, in [0, 1]."""
    damped: dict[str, float] = field(default_factory=dict)
    """Tensors whose H needed more damping than usual -> how much of its mean diagonal."""


Measured = dict[tuple[GGMLQuantizationType, Method, Rounding], Groups]
"""What the layers' alternatives lose, by what was asked; all from the same statistics."""


def convert(options: ConvertOptions, phase: Phase, measured: Measured | None = None) -> ConvertResult:
    """Convert, and write `options.output` and its card whole or not at all.

    `measured` is read and added to: another ratio from the same statistics then need not measure the
    layers again. Raises UnreachableError where the type's grid of ranks does not reach the ratio, and
    UserError for other bad input; see each stage.
    """
    torch.manual_seed(options.seed or 0)
    if options.allocation == "flrc" and not (options.gradients and options.method.whiten):
        raise UserError("--allocation flrc weighs projections by gradients of the calibration text; "
                        "leave out --no-grad, and choose a --method other than svd.")
    if not options.gradients:
        # gradients that kept statistics may hold are not looked at either
        one_sided = replace(options.method, two_sided=False, allocation="uniform")
        options = replace(options, method=one_sided)
    with (
        atomic_outputs([options.output] if options.card is None else [options.card, options.output],
                       options.force) as (*cards, partial),
        tempfile.TemporaryDirectory(prefix=f".{partial.name}", dir=partial.absolute().parent) as scratch,
    ):
        result = ConvertResult()
        model = _load_early(options, phase)
        reader = open_base(options.base, options.source, Path(scratch), options.types.linear, options.tree,
                           phase, options.source_name)
        statistics = _statistics(options, reader, Path(scratch), phase, model)
        if statistics is not None:
            layers = statistics.layers
            result.calibration_tokens = statistics.provenance.tokens
            result.calibration_sha256 = statistics.provenance.text_sha256
            result.shrinkage = statistics.largest_shrinkage()
        elif model is not None:
            layers = checked_layers(reader, map_layers(reader, model.module, options.tree), model)
        else:
            layers = LayerMap(str(fmt.field_value(reader, fmt.KEY_ARCHITECTURE)), [], {})
        weights = Weights.of(reader, layers.groups, options.device)
        compressor = Compressor(weights, statistics, options.method, options.types, options.rounding,
                                layers.groups)
        plan = Plan([], {}) if options.dense else _plan(options, reader, layers, compressor, phase, measured)
        result.dense = {} if options.dense else {**layers.dense, **plan.dense}
        last = max(0, len(options.levels) - 1)
        result.kept = _kept(layers, plan, last)
        if plan.level_losses:
            result.levels = tuple(
                LevelResult(ratio, _kept(layers, plan, level), loss) for level, (ratio, loss)
                in enumerate(zip(options.levels, plan.level_losses, strict=True)))
            compressor.level_weights = level_weights(plan.level_losses)
        if statistics is not None and options.method.compensate and options.compensate:
            result.not_compensated = "no --calibration was given"
        if options.compensated and layers.groups:
            compressor.compensation, result.not_compensated = _compensation(
                options, layers, weights.block(layers.groups[0][0].index), model, phase,
                len(compressor.level_weights))
        _write(options, reader, layers, plan, compressor, partial, phase)
        result.owners, result.damped = compressor.reports, compressor.damped
        result.output_bytes = partial.stat().st_size
        if options.budget is not None and result.output_bytes > options.budget:
            raise UserError(f"The file needs {result.output_bytes:,} bytes, more than its budget of "
                            f"{options.budget:,}; raise it a little.")
        for card in cards:
            card.write_text(_card(options, partial, result), "utf-8")
    return result


def _card(options: ConvertOptions, file: Path, result: ConvertResult) -> str:
    source = source_of_directory(options.source, options.source_name)
    feedback = options.rounding.feedback and result.calibration_tokens > 0
    return new_card(file, source, name=options.output.name,
                    conversion=Conversion(options.method.name, feedback))


def _load_early(options: ConvertOptions, phase: Phase) -> SourceModel | None:
    """The source model where it will be needed, before the base file, which takes longer: most of a
    user's mistakes show here."""
    if (options.stats is not None and options.stats.exists() and options.method.whiten
            and not options.compensated):
        return None
    if options.dense and not (options.calibration is not None and options.method.whiten):
        return None
    if not options.dense:
        require_calibration(options.method, options.calibration)
    return load_model(options.source, options.device, phase)


def _statistics(
    options: ConvertOptions, reader: GGUFReader, scratch: Path, phase: Phase, model: SourceModel | None
) -> Statistics | None:
    if not options.calibrated or not options.method.whiten:
        return None
    # statistics that are kept should serve the next conversion, whatever its method
    kept = options.stats is not None and not options.stats.exists()
    gradients = options.gradients and (kept or (options.two_sided and not options.dense))
    calibration = CalibrationOptions(options.calibration, options.calib_tokens, options.seq_len, gradients,
                                     options.device, options.seed)
    path = options.stats or scratch / "statistics.safetensors"
    return obtain_statistics(options.source, reader, options.tree, calibration, path, phase, model)


def _compensation(
    options: ConvertOptions, layers: LayerMap, weights: dict[str, torch.Tensor],
    model: SourceModel | None, phase: Phase, levels: int,
) -> tuple[list[Compensation], str]:
    """The flows of every level, or why there are none."""
    assert options.calibration is not None and model is not None
    flows: list[Compensation] = []
    with phase("Reading the text", levels) as advance:
        calibration = load_calibration(options.calibration, model, options.calib_tokens, options.seq_len)
        for _ in range(levels):
            found = open_compensation(model, layers, calibration, weights)
            if isinstance(found, str):
                return [], found
            flows.append(found)
            advance(1)
    return flows, ""


def _plan(
    options: ConvertOptions, reader: GGUFReader, layers: LayerMap, compressor: Compressor, phase: Phase,
    measured: Measured | None,
) -> Plan:
    type_, method = options.types.linear, options.method
    allocation = options.allocation or method.allocation
    narrowest = min((layer.n for group in layers.groups for layer in group), default=1)
    grid = options.grid or fmt.rank_grid(type_, narrowest)
    by_ratio = options.budget is None and options.bpw is None
    if allocation == "uniform" and by_ratio and method.share is not None and method.skip is not None:
        # the papers' rule; it needs no spectra
        plan = plan_uniform(layers.groups, method, options.ratio, grid)
    else:
        metric = replace(method, two_sided=options.two_sided)
        known = {} if measured is None else measured
        groups = known.get((type_, metric, options.rounding))
        if groups is None:
            with phase("Measuring layers", len(layers.groups)) as advance:
                groups = measure_groups(layers, compressor.weights.block, compressor.entries, type_, metric,
                                        options.rounding, lambda: advance(1))
            known[type_, metric, options.rounding] = groups
        if options.levels:
            plan = make_level_plan(groups, method, options.levels, options.level_overhead,
                                   _fixed_bytes(options, reader, layers), type_, grid)
        else:
            plan = make_plan(groups, method, allocation, _budget(options, reader, layers), type_, grid)
    if not plan.owners and by_ratio:
        reasons = Counter({**layers.dense, **plan.dense}.values()).most_common(1)
        reason = reasons[0][0] if reasons else "it has no linear layers that the runtime factors"
        hint = "; raise --ratio, or choose a --quant with a smaller block" if plan.dense else ""
        raise UnreachableError(
            f"No layer of {options.source.name} can be low-rank at ratio {options.ratio:g}: {reason}{hint}."
        )
    return plan


def _budget(options: ConvertOptions, reader: GGUFReader, layers: LayerMap) -> Budget:
    if options.bpw is not None:
        return Budget("bpw", options.bpw)
    if options.budget is None:
        return Budget("ratio", options.ratio)
    return Budget("file", options.budget, _fixed_bytes(options, reader, layers))


def _fixed_bytes(options: ConvertOptions, reader: GGUFReader, layers: LayerMap) -> int:
    """Of the file: all but the linear layers that can be factored."""
    factored = {layer.tensor for group in layers.groups for layer in group}
    slots = make_layout(reader, [], options.types).slots()
    fixed = sum(slot.padded_bytes(reader.alignment) for slot in slots if slot.name not in factored)
    return fixed + metadata_bytes(reader, layers)


def _kept(layers: LayerMap, plan: Plan, level: int) -> float:
    """What the level reads, over the dense parameters."""
    wanted = [layer for group in layers.groups for layer in group]
    total = sum(layer.m * layer.n for layer in wanted)
    used = [owner for owner in plan.owners if owner.used_at(level)]
    factored = {layer.tensor for owner in used for layer in owner.members}
    read = sum(owner.parameters for owner in used)
    read += sum(layer.m * layer.n for layer in wanted if layer.tensor not in factored)
    return 1 - (total - read) / total if total else 1.0


def _write(
    options: ConvertOptions, reader: GGUFReader, layers: LayerMap, plan: Plan, compressor: Compressor,
    partial: Path, phase: Phase,
) -> None:
    layout = make_layout(reader, plan.owners, options.types, compressor.calibrated, plan.dense_from)
    if plan.owners:
        # what was asked; what came out where bytes were asked for
        by_ratio = options.budget is None and options.bpw is None
        ratio = options.ratio if by_ratio else _kept(layers, plan, 0)
        metadata = _metadata(options, layers, compressor.statistics, ratio, plan.level_losses)
    else:
        architecture = str(fmt.field_value(reader, fmt.KEY_ARCHITECTURE))
        metadata = {fmt.KEY_ARCHITECTURE: (architecture, GGUFValueType.STRING)}
        if compressor.statistics is not None:
            metadata |= _calibration_keys(compressor.statistics)
    total = sum(slot.nbytes for slot in layout.slots())
    with phase("Factoring" if plan.owners else "Writing", total) as advance:
        write_file(partial, reader, layout, metadata, compressor.compress(layout), advance=advance)


def _metadata(
    options: ConvertOptions, layers: LayerMap, statistics: Statistics | None, ratio: float,
    level_losses: Sequence[float],
) -> dict[str, tuple[Any, GGUFValueType]]:
    known = statistics.provenance if statistics else None
    levels: dict[str, tuple[Any, GGUFValueType]] = {} if not options.levels else {
        fmt.KEY_LEVELS: (list(options.levels), GGUFValueType.FLOAT32),
        fmt.KEY_LEVELS_LOSS: (list(level_losses), GGUFValueType.FLOAT32),
    }
    version, runtime = (
        (fmt.LEVELS_FORMAT_VERSION, fmt.LEVELS_RUNTIME_MIN) if levels else
        (fmt.FORMAT_VERSION, fmt.RUNTIME_MIN))
    return {
        **_calibration_keys(statistics),
        fmt.KEY_ARCHITECTURE: (fmt.ARCHITECTURE_PREFIX + layers.architecture, GGUFValueType.STRING),
        fmt.KEY_FORMAT_VERSION: (version, GGUFValueType.UINT32),
        fmt.KEY_RUNTIME_MIN: (runtime, GGUFValueType.STRING),
        fmt.KEY_RATIO: (ratio, GGUFValueType.FLOAT32),
        fmt.KEY_METHOD: (options.method.name, GGUFValueType.STRING),
        fmt.KEY_SOURCE_NAME: (options.source_name or options.source.resolve().name, GGUFValueType.STRING),
        fmt.KEY_SEED: ((known and known.seed) or options.seed or 0, GGUFValueType.UINT32),
        **levels,
    }


def _calibration_keys(statistics: Statistics | None) -> dict[str, tuple[Any, GGUFValueType]]:
    known = statistics.provenance if statistics else None
    return {
        fmt.KEY_CALIBRATION_SHA256: (known.text_sha256 or "" if known else "", GGUFValueType.STRING),
        fmt.KEY_CALIBRATION_TOKENS: (known.tokens if known else 0, GGUFValueType.UINT32),
    }
