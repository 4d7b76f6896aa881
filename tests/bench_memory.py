"""Memory and time of conversions with --max-memory, on models of random weights: `make bench-memory`.

Each model is converted with some of its blocks, and with all of them where --whole names it.
The figures of every phase are kept in build/memory: a run that was interrupted goes on from there, as the
conversion itself does. What did not run is computed, and marked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from bench_models import ROOT
from bench_report import Report, machine
from conversion import DEMO
from large_models import LLAMA_1B, LLAMA_3B, LLAMA_8B, Dimensions, plan_dimensions, write_model
from peak_memory import Peaks, convert_watched
from rich.table import Table
from skipcat_converter import memory

from skipcat_edge.errors import UserError
from skipcat_edge.sizes import parse_size
from skipcat_edge.terminal import decimal_bytes, new_table

MODELS = {"Llama-3.2-1B": LLAMA_1B, "Llama-3.2-3B": LLAMA_3B, "Llama-3-8B": LLAMA_8B}
LIGHT: dict[str, Any] = {"quant": "F16", "compensate": False}
"""What is factored in a third of the time."""
ALIKE = ("Converting to GGUF", "Calibrating", "Measuring layers")
"""Phases that do the same in both."""
PHASES = {"Converting to GGUF": "bytes", "Calibrating": "tokens", "Measuring layers": "algebra",
          "Factoring": "algebra"}
EXPLANATION = """\
Random weights of the models' dimensions, converted on {threads} threads with method auto at ratio 0.8, \
two-sided statistics, compensation and Q8_0, from {tokens:,} calibration tokens; *light*: without \
compensation, in F16, which changes factoring alone. *peak*: of what the conversion and its children had \
resident, looked at every 20 ms, and at least what the kernel says of the conversion alone. *m*: measured. \
*c*: computed from the conversion with most blocks by their number, so that embedding and head count more \
than once; where the model was not run at all, times are those of {base} by their share of the work."""
BASE = "Llama-3.2-3B"


def work(model: Dimensions, what: str) -> float:
    """That grows as the time of a block's phase does."""
    shapes = [shape for shape in model.block_shapes().values() if len(shape) == 2]
    if what == "algebra":
        return float(sum(n * n * (n + m) for m, n in shapes))
    return float(sum(m * n for m, n in shapes))


@dataclass(frozen=True)
class Run:
    """A conversion of the first `blocks` blocks of a model."""

    name: str
    blocks: int
    light: bool = False


def convert(what: Run, tokens: int, limit: int, folder: Path, threads: int) -> Peaks | None:
    """Its figures; None where it is refused."""
    name, blocks = what.name, what.blocks
    label = f"{name}-{blocks}-{limit}-{tokens}-{threads}{'-light' * what.light}"
    kept = folder / f"{label}.json"
    known = Peaks(**json.loads(kept.read_text())) if kept.exists() else Peaks()
    if known.finished:
        return known
    source, out = folder / f"{name}-{blocks}", folder / f"{label}.gguf"
    if not (source / "model.safetensors.index.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        click.echo(f"Writing {source} ...")
        write_model(source, replace(MODELS[name], num_hidden_layers=blocks))
    click.echo(f"Converting {label} ...")
    found = convert_watched(
        source, out, threads, known, lambda peaks: kept.write_text(json.dumps(asdict(peaks))),
        calibration=DEMO / "calibration.txt", calib_tokens=tokens, max_memory=limit, force=True,
        **(LIGHT if what.light else {"quant": "Q8_0"}))
    if found.error is not None:
        click.echo(found.error)
        return None
    kept.write_text(json.dumps(asdict(found)))
    out.unlink()
    shutil.rmtree(source)
    return found


def seconds(phase: str, name: str, runs: dict[Run, Peaks]) -> tuple[float, bool] | None:
    """Of the whole model, and whether that was measured."""
    model = MODELS[name]
    own = {run.blocks: peaks.seconds.get(phase, 0.0) for run, peaks in runs.items()
           if run.name == name and (phase in ALIKE or not run.light)}
    if own:
        most = max(own)
        return own[most] * model.num_hidden_layers / most, most == model.num_hidden_layers
    if name == BASE or (base := seconds(phase, BASE, runs)) is None:
        return None
    share = work(model, PHASES[phase]) * model.num_hidden_layers / (
        work(MODELS[BASE], PHASES[phase]) * MODELS[BASE].num_hidden_layers)
    return base[0] * share, False


@click.command(help=__doc__)
@click.option("--models", default="Llama-3.2-1B,Llama-3.2-3B", show_default=True, help="That are run.")
@click.option("--cuts", default="1,3", show_default=True, help="With how many of their blocks.")
@click.option("--whole", default="", help="Those of them that are run with all blocks; a 3B takes hours.")
@click.option("--light", is_flag=True, help="Those without compensation and in F16: a third of the time.")
@click.option("--max-memory", default="4GB", show_default=True)
@click.option("--tokens", default=2048, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "build" / "memory",
              show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as Markdown.")
def main(models: str, cuts: str, whole: str, light: bool, max_memory: str, tokens: int, threads: int,
         folder: Path, out: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit = parse_size(max_memory)
    wanted = [Run(name, count) for name in models.split(",") if name for count in map(int, cuts.split(","))]
    wanted += [Run(name, MODELS[name].num_hidden_layers, light) for name in whole.split(",") if name]
    found = ((each, convert(each, tokens, limit, folder, threads)) for each in wanted)
    runs = {each: peaks for each, peaks in found if peaks is not None}
    report = Report("Memory of conversions", "make bench-memory")
    report.text(machine())
    report.text(EXPLANATION.format(tokens=tokens, threads=threads, base=BASE))
    report.heading(f"Peaks with --max-memory {max_memory}")
    report.table(peaks_table(runs, limit))
    said = {sentence for peaks in runs.values() for sentence in peaks.said}
    for sentence in sorted(said):
        report.text(f"Said: {sentence}")
    report.heading("What is planned")
    report.table(plans_table())
    report.heading("Minutes by phase, of the whole model")
    report.table(times_table(runs))
    if out:
        report.save(out)


def peaks_table(runs: dict[Run, Peaks], limit: int) -> Table:
    table = new_table("model", "blocks", "peak", "of it", *PHASES, left=1)
    for each, peaks in runs.items():
        blocks = f"{each.blocks}{', light' * each.light}"
        cells = [decimal_bytes(peaks.phases.get(phase, 0)) for phase in PHASES]
        table.add_row(each.name, blocks, decimal_bytes(peaks.peak), f"{peaks.peak / limit:.1%}", *cells)
    return table


def plans_table() -> Table:
    """What falls back at which allowance."""
    table = new_table("model", "--max-memory", "batches", "statistics", "compensation", "", left=1)
    wanted = memory.Wanted(statistics=True, gradients=True, compensation=True)
    for name, model in MODELS.items():
        for limit in (2, 4, 8, 16):
            try:
                plan = memory.plan_memory(limit * 10**9, plan_dimensions(model), wanted)
            except UserError as error:
                table.add_row(name, f"{limit}GB", "", "", "", f"refused: {error.message}")
                continue
            table.add_row(name, f"{limit}GB", f"{plan.batch_tokens:,}",
                          "two-sided" if plan.gradients else "one-sided",
                          "yes" if plan.compensation else "no", "")
    return table


def times_table(runs: dict[Run, Peaks]) -> Table:
    table = new_table("model", *PHASES, left=1)
    for name in MODELS:
        table.add_row(name, *cells(name, runs))
    for each, peaks in runs.items():
        if each.light:
            minutes = [f"{peaks.seconds.get(phase, 0.0) / 60:.1f} m" for phase in PHASES]
            table.add_row(f"{each.name}, light", *minutes)
    return table


def cells(name: str, runs: dict[Run, Peaks]) -> Iterator[str]:
    for phase in PHASES:
        found = seconds(phase, name, runs)
        yield "-" if found is None else f"{found[0] / 60:.1f} {'m' if found[1] else 'c'}"


if __name__ == "__main__":
    main()
