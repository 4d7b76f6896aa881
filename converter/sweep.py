"""Many ratios and types from one calibration: what each would store, and what it would lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from skipcat_edge.errors import UserError
from skipcat_edge.extra import Phase

from .base_gguf import open_base
from .calibrate import CalibrationOptions, obtain_statistics
from .compression import Weights
from .factorize import Method
from .job import temporary_job
from .planning import Budget, dense_plan, make_plan, measure_groups, plan_bytes
from .quantized import Rounding
from .statistics_file import read_provenance
from .writer import OutputTypes


@dataclass(frozen=True)
class SweepRow:
    """One choice of type and ratio; of all, the linear layers that can be factored."""

    type: str
    ratio: float
    nbytes: int
    bits_per_weight: float
    loss: float
    """Predicted, to second order: of a language model the KL divergence from the dense one, in nats per
    token; of an encoder in a unit of its own. Without compensation, which lowers it."""
    dense: int
    """Layers that stay dense."""
    layers: int


@dataclass(frozen=True)
class Impossible:
    """A choice that cannot be had."""

    type: str
    ratio: float
    reason: str


def sweep(
    source: Path, base: Path | None, stats: Path, tree: Path, method: Method,
    types: Sequence[GGMLQuantizationType], ratios: Sequence[float], phase: Phase, name: str | None = None,
) -> tuple[list[SweepRow], list[Impossible]]:
    """A row for each of `types` and `ratios` from the statistics in `stats`, the model not being run; and
    what the types' grids of ranks do not reach.

    Raises UserError where the statistics are another model's, or were taken without gradients.
    """
    _check_gradients(stats)
    rows, impossible = [], []
    # a large base file should not go where memory may be the disk
    with temporary_job(stats) as job:
        reader = open_base(base, source, job, GGMLQuantizationType.F16, tree, phase, name)
        statistics = obtain_statistics(source, reader, tree, CalibrationOptions(None, gradients=False), stats,
                                       phase)
        layers = statistics.layers
        weights = Weights.of(reader, layers.groups, "cpu")
        elements = sum(layer.m * layer.n for layer in layers.members)
        with phase("Measuring layers", len(types) * len(layers.groups)) as advance:
            for type_ in types:
                groups = measure_groups(layers, weights.block, statistics.block, type_, method, Rounding(),
                                        lambda: advance(1))
                for ratio in sorted(ratios, reverse=True):
                    try:
                        plan = dense_plan(groups) if ratio == 1 else make_plan(
                            groups, method, "loss", Budget("ratio", ratio), type_)
                    except UserError as error:
                        impossible.append(Impossible(type_.name, ratio, str(error)))
                        continue
                    assert plan.loss is not None
                    nbytes = plan_bytes(plan, groups, OutputTypes(type_, None))
                    rows.append(SweepRow(type_.name, ratio, nbytes, 8 * nbytes / elements, plan.loss / 2,
                                         len(plan.dense), len(weights.layers)))
    return rows, impossible


def _check_gradients(stats: Path) -> None:
    """Before anything that takes long. Raises UserError."""
    if not stats.exists():
        raise UserError(f"{stats} does not exist; `skipcat-edge convert --calibration TEXT --stats {stats}` "
                        "takes statistics.")
    if not read_provenance(stats).gradients:
        raise UserError(f"{stats} holds statistics without gradients, which predict no model's loss; "
                        "calibrate again without --no-grad.")
