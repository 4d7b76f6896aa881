"""What `plan` predicts for this machine beside what `bench` then measures: `make bench-plan`.

For each model some candidates are written with random weights and measured, all in turns, right after the
probe. The targets, 15 % for speeds and 5 % for memory, are marks to compare with, not tests: on a busy
machine they are missed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from bench_models import ROOT
from bench_report import Report, machine
from rich.table import Table

from skipcat_edge import bench, plan, synth
from skipcat_edge.benchmark import Result
from skipcat_edge.model_config import read_dimensions
from skipcat_edge.planner import Candidate
from skipcat_edge.runtime.source import stock_tree
from skipcat_edge.synth_plan import plan as plan_model
from skipcat_edge.terminal import new_table
from skipcat_edge.weight_types import weight_type

SPEED_TARGET, MEMORY_TARGET = 0.15, 0.05
PROMPT_TOKENS, GEN_TOKENS = 512, 32
EXPLANATION = """\
*off*: predicted over measured, less one. Speeds are tokens/s, memory is the peak of what was resident. \
Random weights of the models' dimensions."""


def checked(candidate: Candidate, result: Result) -> Iterator[tuple[str, float, float, float]]:
    """What, predicted, measured, target."""
    assert result.decode_tps and candidate.prompt_tps and candidate.decode_tps and result.peak_rss_bytes
    yield "prompt", candidate.prompt_tps, result.prompt_tps.median, SPEED_TARGET
    yield "decode", candidate.decode_tps, result.decode_tps.median, SPEED_TARGET
    yield "memory, MB", candidate.memory.peak / 1e6, result.peak_rss_bytes / 1e6, MEMORY_TARGET


def measured(model: str, candidates: Sequence[Candidate]) -> list[Result]:
    """Of a file for each candidate."""
    dimensions = read_dimensions(model)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        files = []
        for index, candidate in enumerate(candidates):
            files.append(Path(folder) / f"{index}.gguf")
            planned = plan_model(dimensions, weight_type(candidate.type), candidate.ratio, 0)
            synth.write(planned, files[-1], stock_tree(None))
        return bench(files, prompt_tokens=PROMPT_TOKENS, gen_tokens=GEN_TOKENS, repetitions=5)


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=("llama-3.2-1b", "qwen2.5-0.5b"), show_default=True)
@click.option("--types", default="Q8_0,Q4_0", show_default=True)
@click.option("--ratios", default="0.8,0.6", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as Markdown.")
def main(models: tuple[str, ...], types: str, ratios: str, out: Path | None) -> None:
    (ROOT / "build").mkdir(exist_ok=True)
    report = Report("Predictions of plan", "make bench-plan")
    report.text(machine())
    report.text(EXPLANATION)
    for model in models:
        found = plan(model, types=types.split(","), ratios=[float(part) for part in ratios.split(",")],
                     context=PROMPT_TOKENS, prompt_tokens=PROMPT_TOKENS)
        report.heading(model)
        report.table(comparison(found.candidates, measured(model, found.candidates)))
    if out:
        report.save(out)


def comparison(candidates: Sequence[Candidate], results: Sequence[Result]) -> Table:
    table = new_table("type", "ratio", "what", "predicted", "measured", "off", "", left=3)
    for candidate, result in zip(candidates, results, strict=True):
        for what, predicted, real, target in checked(candidate, result):
            off = predicted / real - 1
            table.add_row(candidate.type, f"{candidate.ratio:g}", what, f"{predicted:.1f}", f"{real:.1f}",
                          f"{off:+.1%}", "met" if abs(off) <= target else "not met")
    return table


if __name__ == "__main__":
    main()
