"""What the levels of one file lose beside files of their own: `make bench-levels-quality`.

Every level is measured beside a single-level file that reads as many parameters for a token, both from the
same statistics. Needs ../shared.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import click
from bench_quality import LOW_RANK, ROOT, SHARED, WINDOW, Bench, Job, Scale, opened
from bench_report import Report
from conversion import quiet
from skipcat_converter.pipeline import convert

from skipcat_edge import divergence, embedding_eval
from skipcat_edge.levels import set_level
from skipcat_edge.perplexity import text_chunks
from skipcat_edge.terminal import new_progress, new_table

TARGETS = (1.15, 1.10)
"""Of the loss of a lower level, and of the last one, over that of a file of its own."""
FILE_TARGET = 1.10
EXPLANATION = """\
*loss*: KL divergence from the dense F16 file in nats per token; of MiniLM 1 less the mean cosine between \
sentence embeddings. *alone*: of a single-level file of that ratio. *added*: the type of what the upper \
level adds to the lower one's factors, first the usual one. *reads*: of the linear layers, over what they \
take where they are dense. *file*: bytes over those of the single-level file of the last ratio."""


def measure(bench: Bench, path: Path, level: float | None) -> float:
    """The loss of `path` at `level`, or of a file without levels."""
    text = bench.evaluation.read_text(encoding="utf-8")
    pair = (embedding_eval.open_pair(path, bench.dense) if bench.encoder
            else divergence.open_pair(path, bench.dense, WINDOW))
    with opened(pair) as (model, dense):
        if level is not None:
            set_level(model, level)
        if bench.encoder:
            return 1 - embedding_eval.compare(model, dense, embedding_eval.lines_of(text)).cosine_mean
        chunks = text_chunks(model, text, WINDOW, bench.scale.eval_tokens)
        return divergence.compare(model, dense, chunks)[1].kl


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=("demo", "MiniLM"), show_default=True)
@click.option("--types", default="F16,Q8_0,Q4_0", show_default=True)
@click.option("--levels", default="0.6,0.8", show_default=True)
@click.option("--quick", is_flag=True, help="Short texts: a smoke test.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as Markdown.")
def main(models: tuple[str, ...], types: str, levels: str, quick: bool, out: Path | None) -> None:
    if not SHARED.exists():
        raise click.ClickException(f"{SHARED} is missing; the shared data is needed.")
    ratios = tuple(float(level) for level in levels.split(","))
    scale = Scale(4_000, 1_000, 24, True) if quick else Scale(40_000, 10_000, 500)
    report = Report("Quality of levels", "make bench-levels-quality")
    report.text(f"{scale.calib_tokens:,} calibration tokens, {scale.eval_tokens:,} held-out ones (MiniLM: "
                f"1,200 sentences and {scale.lines} held-out ones), one file with the levels {levels}.")
    report.text(EXPLANATION)
    cache = ROOT / "build" / ("levels-quality-quick" if quick else "levels-quality")
    jobs = [(model, name) for model in models for name in types.split(",")]
    with new_progress() as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("levels", total=len(jobs) * (len(ratios) + 2))
        for model in models:
            bench = Bench(model, cache, scale)
            bench.prepare()
            table = new_table("type", "added", "level", "reads", "loss", "alone", "loss/alone", "", "file",
                              "", left=2)
            for name in types.split(","):
                alone, sizes = [], []
                for ratio in ratios:
                    progress.update(task, description=f"{model} {name} {ratio:g}")
                    path = Path(folder) / "alone.gguf"
                    convert(bench.options(path, Job(model, LOW_RANK, "auto", name, ratio)), quiet)
                    alone.append(measure(bench, path, None))
                    sizes.append(path.stat().st_size)
                    progress.advance(task)
                path = Path(folder) / "levels.gguf"
                options = bench.options(path, Job(model, LOW_RANK, "auto", name, ratios[-1]))
                # what is usual, and the file's own type
                for added in dict.fromkeys((options.types.correction, options.types.linear)):
                    progress.update(task, description=f"{model} {name} levels")
                    written = convert(replace(options, levels=ratios,
                                              types=replace(options.types, added=added)), quiet)
                    size = path.stat().st_size / sizes[-1]
                    for place, (level, own) in enumerate(zip(written.levels, alone, strict=True)):
                        last = place == len(ratios) - 1
                        loss = measure(bench, path, level.ratio)
                        met = loss / own <= TARGETS[last]
                        table.add_row(name, added.name, f"{level.ratio:g}", f"{level.read:.3f}",
                                      f"{loss:.5f}", f"{own:.5f}",
                                      f"{loss / own:.3f}", "met" if met else "not met",
                                      f"{size:.3f}" if last else "",
                                      ("met" if size <= FILE_TARGET else "not met") if last else "")
                    progress.advance(task)
            report.heading(model)
            report.table(table)
    if out:
        report.save(out)


if __name__ == "__main__":
    main()
