"""The whole conversion: model -> statistics -> allocation -> factors -> quantised factors -> file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from skipcat_edge import format as fmt
from skipcat_edge.card import Conversion, new_card
from skipcat_edge.card_source import source_of_directory
from skipcat_edge.errors import UnreachableError, UserError
from skipcat_edge.extra import Phase
from skipcat_edge.output import check_output

from .allocation import Groups
from .base_gguf import BASE, open_base
from .calibrate import UNFINISHED, CalibrationOptions, checked_layers, load_model, obtain_statistics
from .calibration import BATCH_TOKENS, DEFAULT_SEQ_LEN, load_calibration, require_calibration
from .candidates import bits
from .compensation import Compensation, open_compensation
from .compression import Compressor, Weights
from .executor import open_executor
from .factorize import Method
from .job import Job, open_job
from .job_blocks import has_stored
from .job_settings import THREADS, job_settings, source_digest
from .layers import LayerMap, map_layers
from .memory import (
    KEPT_PLAN,
    MemoryPlan,
    Wanted,
    check_memory_of_base,
    dimensions,
    giving_back,
    kept_plan,
    plan_memory,
)
from .metadata import calibration_keys, metadata
from .options import ConvertOptions, ConvertResult, LevelResult
from .plan import Plan, plan_from_json, plan_to_json, plan_uniform
from .planning import Budget, kept_share, make_level_plan, make_plan, measure_groups
from .quantized import Rounding
from .source_model import SourceModel
from .stages import level_weights
from .statistics import FIRST_STATES
from .statistics_file import Statistics
from .threads import Threads
from .writer import base_metadata_bytes, make_layout, metadata_bytes, write_file

# Artifacts of the job.
_PLAN, _OUTPUT, _CARD = "plan.json", "output", "card"

# Those that are soon made again; the unfinished statistics are empty until there are more states.
_CHEAP = (BASE, KEPT_PLAN, UNFINISHED, FIRST_STATES)

Measured = dict[tuple[GGMLQuantizationType, Method, Rounding], Groups]
"""What the layers' alternatives lose, by what was asked; all from the same statistics."""


def convert(
    options: ConvertOptions, phase: Phase, measured: Measured | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ConvertResult:
    """Convert, and write `options.output` and its card whole or not at all.

    What is finished is kept in a job directory beside the output until the end: where the process was
    killed, or the disk was full, the same call goes on from there. `measured` is read and added to: another
    ratio from the same statistics then need not measure the layers again. `say` hears what an earlier run
    had finished. Raises UnreachableError where the type's grid of ranks does not reach the ratio, and
    UserError for other bad input; see each stage.
    """
    torch.manual_seed(options.seed or 0)
    if options.allocation == "flrc" and not (options.gradients and options.method.whiten):
        raise UserError("--allocation flrc weighs projections by gradients of the calibration text; "
                        "leave out --no-grad, and choose a --method other than svd.")
    if not options.gradients:
        options = options.one_sided()
    if options.executor != "local" and options.device != "cpu":
        raise UserError(f"--executor {options.executor} computes on the CPUs of its machines; leave out "
                        "--device.")
    if options.max_memory is not None and (options.device_map or options.executor != "local"):
        raise UserError("--max-memory streams the model block by block, in one process; leave out "
                        "--device-map and --executor.")
    executor = open_executor(options.executor)
    check_output(options.output, force=True)
    with phase("Reading the model", 1) as advance:
        digest = source_digest(options)
        settings = job_settings(options, digest)
        advance(1)
    with (open_job(options.output, settings, options.restart, adopted=[THREADS], cheap=_CHEAP) as job,
          _threads_of(job, say).used()):
        outs = [options.output] if options.card is None else [options.card, options.output]
        for out in outs:
            check_output(out, options.force or job.is_placing)
        result = ConvertResult()
        if options.max_memory is not None:
            phase = giving_back(phase)
        model = _load_early(options, phase)
        if options.max_memory is not None and options.base is None:
            check_memory_of_base(options.max_memory, options.source)
        reader = open_base(options.base, options.source, job, options.types.linear, options.tree, phase,
                           options.source_name, options.allow_pickle)
        memory = None
        if options.max_memory is not None:
            memory = kept_plan(job, _plan_memory, options.max_memory, options, reader, model)
            options = options.within(memory, say)
        statistics = _statistics(options, reader, job, digest, phase, model, say, memory)
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
                                layers.groups, job=job, executor=executor)
        plan = Plan([], {}) if options.dense else _kept_plan(
            options, reader, layers, compressor, phase, measured)
        result.dense = {} if options.dense else {**layers.dense, **plan.dense}
        last = max(0, len(options.levels) - 1)
        result.kept = kept_share(layers.members, plan, last)
        if plan.level_losses:
            read = (kept_share(layers.members, plan, level, options.types)
                    for level in range(len(options.levels)))
            result.levels = tuple(LevelResult(*level) for level in zip(
                options.levels, read, plan.level_losses, strict=True))
            compressor.level_weights = level_weights(
                plan.level_losses, bits(options.types.correction) < bits(options.types.linear))
        if statistics is not None and options.method.compensate and options.compensate:
            result.not_compensated = "no --calibration was given"
        if options.compensated and layers.groups:
            result.not_compensated = _compensate(options, layers, compressor, model, phase, memory)
        finished = sum(has_stored(job, block) for block in compressor.blocks)
        if finished:
            say(f"Resuming: {finished} of {len(compressor.blocks)} blocks are done.")
        with job.artifact(_OUTPUT) as partial:
            _write(options, reader, layers, plan, compressor, partial, phase)
        partial = job.path(_OUTPUT)
        result.owners, result.damped = compressor.reports, compressor.damped
        result.output_bytes = partial.stat().st_size
        if options.budget is not None and result.output_bytes > options.budget:
            raise UnreachableError(f"The file needs {result.output_bytes:,} bytes, more than its budget of "
                                   f"{options.budget:,}; raise it a little.")
        if options.card is not None:
            with job.artifact(_CARD) as card:
                card.write_text(_card(options, partial, result), "utf-8")
        job.place([_OUTPUT] if options.card is None else [_CARD, _OUTPUT], outs)
    return result


def _threads_of(job: Job, say: Callable[[str], None]) -> Threads:
    """As many as the job was begun with: its blocks would not be the same with others."""
    try:
        threads = Threads.told(job.settings[THREADS])
    except (KeyError, TypeError, ValueError):
        raise job.damaged_settings() from None
    here = Threads.here()
    if threads != here:
        say(f"Resuming with {threads} instead of {here}: it was begun so, and with others the file would not "
            "be the same to the byte.")
    return threads


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
    return load_model(options.source, options.calibration_device, phase, options.allow_pickle,
                      options.max_memory is not None)


def _plan_memory(
    limit: int, options: ConvertOptions, reader: GGUFReader, model: SourceModel | None
) -> MemoryPlan:
    taken = (options.calibrated and options.method.whiten
             and not (options.stats is not None and options.stats.exists()))
    return plan_memory(limit, dimensions(reader, model is not None and model.is_encoder), Wanted(
        taken, taken and options.takes_gradients, options.compensated,
        max(1, len(options.levels)), options.seq_len or DEFAULT_SEQ_LEN))


def _statistics(
    options: ConvertOptions, reader: GGUFReader, job: Job, digest: str, phase: Phase,
    model: SourceModel | None, say: Callable[[str], None], memory: MemoryPlan | None,
) -> Statistics | None:
    if not options.calibrated or not options.method.whiten:
        return None
    calibration = CalibrationOptions(options.calibration, options.calib_tokens, options.seq_len,
                                     options.takes_gradients, options.calibration_device, options.seed,
                                     options.allow_pickle, memory)
    path = options.stats or job.path("statistics.safetensors")
    return obtain_statistics(options.source, reader, options.tree, calibration, path, phase, model, job,
                             digest, say)


def _compensate(
    options: ConvertOptions, layers: LayerMap, compressor: Compressor, model: SourceModel | None,
    phase: Phase, memory: MemoryPlan | None,
) -> str:
    """Give the compressor the flows of every level, or say why there are none."""
    assert options.calibration is not None and model is not None
    start = compressor.first_open
    if start is None or start == compressor.blocks[0]:
        start = 0
    flows: list[Compensation] = []
    levels = compressor.level_weights.levels
    with phase("Reading the text", levels) as advance:
        calibration = load_calibration(options.calibration, model, options.calib_tokens, options.seq_len,
                                       BATCH_TOKENS if memory is None else memory.batch_tokens)
        weights = compressor.weights.block(layers.groups[0][0].index)
        for level in range(levels):
            found = open_compensation(model, layers, calibration, weights, compressor.job, f"level-{level}",
                                      start, math.inf if memory is None else memory.spilled_from)
            if isinstance(found, str):
                return found
            flows.append(found)
            advance(1)
    compressor.compensation = flows
    return ""


def _kept_plan(
    options: ConvertOptions, reader: GGUFReader, layers: LayerMap, compressor: Compressor, phase: Phase,
    measured: Measured | None,
) -> Plan:
    """The plan, or that of an earlier run of the job."""
    job = compressor.job
    assert job is not None
    if job.has(_PLAN):
        with job.reading(_PLAN):
            return plan_from_json(job.read_json(_PLAN))
    plan = _plan(options, reader, layers, compressor, phase, measured)
    job.write_json(_PLAN, plan_to_json(plan))
    return plan


def _plan(
    options: ConvertOptions, reader: GGUFReader, layers: LayerMap, compressor: Compressor, phase: Phase,
    measured: Measured | None,
) -> Plan:
    type_, method = options.types.linear, options.method
    allocation = options.allocation or method.allocation
    narrowest = min((layer.n for layer in layers.members), default=1)
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
                                        options.rounding, lambda: advance(1), compressor.job,
                                        compressor.executor)
            known[type_, metric, options.rounding] = groups
        if options.levels:
            plan = make_level_plan(groups, method, options.levels, options.level_overhead,
                                   _fixed_tensors(options, reader, layers)
                                   + base_metadata_bytes(reader, layers), options.types, grid)
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
    """Of the file: all but the linear layers that can be factored, at most."""
    return _fixed_tensors(options, reader, layers) + metadata_bytes(reader, layers)


def _fixed_tensors(options: ConvertOptions, reader: GGUFReader, layers: LayerMap) -> int:
    factored = {layer.tensor for layer in layers.members}
    slots = make_layout(reader, [], options.types).slots()
    return sum(slot.padded_bytes(reader.alignment) for slot in slots if slot.name not in factored)


def _write(
    options: ConvertOptions, reader: GGUFReader, layers: LayerMap, plan: Plan, compressor: Compressor,
    partial: Path, phase: Phase,
) -> None:
    layout = make_layout(reader, plan.owners, options.types, compressor.calibrated, plan.dense_from)
    if plan.owners:
        # what was asked; what came out where bytes were asked for
        by_ratio = options.budget is None and options.bpw is None
        ratio = options.ratio if by_ratio else kept_share(layers.members, plan, 0)
        keys = metadata(options, layers, compressor.statistics, ratio, plan.level_losses)
    else:
        architecture = str(fmt.field_value(reader, fmt.KEY_ARCHITECTURE))
        keys = {fmt.KEY_ARCHITECTURE: (architecture, GGUFValueType.STRING)}
        if compressor.statistics is not None:
            keys |= calibration_keys(compressor.statistics)
    total = sum(slot.nbytes for slot in layout.slots())
    with phase("Factoring" if plan.owners else "Writing", total) as advance:
        write_file(partial, reader, layout, keys, compressor.compress(layout), advance=advance)
