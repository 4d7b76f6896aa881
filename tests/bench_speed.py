"""Speed of low-rank models beside stock llama.cpp on dense ones: `make bench-speed`.

For each model and type, a dense and some low-rank random-weight files are written to build/bench/.
llama-bench measures them in turns, the stock one (dense) and the patched one (dense and low-rank),
built from the same archive with the same flags, with the same threads; figures are medians of
all turns, ratios those of medians in the same turns.

Decoding a token reads every weight once, and the keys and values of all tokens before it: its ideal
speed-up is dense over low-rank bytes (all tensors but an embedding table of its own; a tied one is
read as the head). A prompt is bound by arithmetic: its ideal is dense over low-rank
multiplications, of the linear layers and attention for every token and of the head for the last one.
Efficiency is measured over ideal speed-up. The targets are marks to compare with, not tests: on
a busy machine they are missed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from skipcat_edge.bandwidth import read_bandwidth
from skipcat_edge.errors import UserError
from skipcat_edge.synth_plan import Plan, model_dimensions, plan
from skipcat_edge.terminal import new_progress, new_table, stdout_console
from skipcat_edge.weight_types import weight_type

TARGET, STOCK_TARGET, BANDWIDTH_TARGET = 0.97, 0.98, 0.85
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "bench"
NATIVE = ROOT / "build" / "native"
SEED = 0


@dataclass(frozen=True)
class Test:
    """One of llama-bench's: a prompt of `prompt` tokens, or `generated` tokens after `depth` others."""

    prompt: int
    generated: int
    depth: int

    def __str__(self) -> str:
        return f"prompt {self.prompt}" if self.prompt else f"decode at {self.depth}"


@dataclass
class Subject:
    """A file, and the program that runs it."""

    plan: Plan
    kind: str
    """`stock` or `patched`."""
    rates: dict[Test, list[float]] = field(default_factory=dict)
    """Tokens per second, one of each turn."""

    @property
    def path(self) -> Path:
        return cached(self.plan)

    def rate(self, test: Test) -> float:
        return statistics.median(self.rates[test])


def kv_bytes(model: Plan, depth: int) -> int:
    """Bytes of keys and values, F16, that decoding a token after `depth` others reads."""
    dimensions = model.model
    return 2 * 2 * dimensions.n_head_kv * dimensions.head_dim * dimensions.n_layer * depth


def bytes_read(model: Plan, test: Test) -> float:
    """Bytes that one decoded token reads, on average over the test."""
    return model.bytes_per_token + kv_bytes(model, 1) * (test.depth + (test.generated + 1) / 2)


def multiplications(model: Plan, test: Test) -> float:
    """Of a prompt whose last token alone gets logits; a token attends to itself and all before it."""
    dimensions, tokens = model.model, test.prompt
    attention = 2 * dimensions.n_layer * dimensions.n_head * dimensions.head_dim * tokens * (tokens + 1) / 2
    return tokens * model.linear_parameters + attention + dimensions.n_vocab * dimensions.n_embd


def ideal(low_rank: Plan, dense: Plan, test: Test) -> float:
    """The speed-up that the work allows."""
    work = multiplications if test.prompt else bytes_read
    return work(dense, test) / work(low_rank, test)


def cached(model: Plan) -> Path:
    """Where the model's file is kept."""
    return CACHE / f"{model.model.name}-{model.type.name}-{model.ratio:g}.gguf"


def write_model(model: Plan, source: str | None) -> None:
    """Write the model's file if it is not there."""
    path = cached(model)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    options = ["--quant", model.type.name, "--ratio", str(model.ratio), "--seed", str(model.seed)]
    command = [sys.executable, "-c", "from skipcat_edge.cli import main; main()", "synth", model.model.name,
               "-o", str(path), *options, *(["--source", source] if source else [])]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit(1)


def run(subject: Subject, tests: Sequence[Test], threads: int) -> None:
    """One turn of `subject`."""
    prompts = [test.prompt for test in tests if test.prompt]
    decodes = [test for test in tests if test.generated]
    calls = [["-p", ",".join(map(str, prompts)), "-n", "0"]] if prompts else []
    if decodes:
        depths = ",".join(str(test.depth) for test in decodes)
        calls.append(["-p", "0", "-n", str(decodes[0].generated), "-d", depths])
    for arguments in calls:
        command = [str(NATIVE / subject.kind / "bin" / "llama-bench"), "-m", str(subject.path), *arguments,
                   "-t", str(threads), "-r", "1", "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"llama-bench failed: {done.stderr.strip().splitlines()[-1]}")
        for row in json.loads(done.stdout):
            test = Test(row["n_prompt"], row["n_gen"], row["n_depth"])
            subject.rates.setdefault(test, []).append(row["avg_ts"])


def speedup(fast: Subject, slow: Subject, test: Test) -> float:
    """Median over the turns of how much faster `fast` was in the same turn."""
    return statistics.median(a / b for a, b in zip(fast.rates[test], slow.rates[test], strict=True))


def print_rates(subjects: Sequence[Subject], tests: Sequence[Test], bandwidth: float) -> None:
    """What was measured, with its spread, and the share of the read bandwidth that decoding uses."""
    table = new_table("type", "ratio", "llama.cpp", "test", "tokens/s", "min", "max", "GB/s", "of bandwidth",
                      left=4)
    for subject in subjects:
        for test in tests:
            rates = subject.rates[test]
            cells = ["", ""]
            if test.generated:
                used = bytes_read(subject.plan, test) * subject.rate(test)
                cells = [f"{used / 1e9:.1f}", f"{used / bandwidth:.2f}"]
            table.add_row(subject.plan.type.name, f"{subject.plan.ratio:g}", subject.kind, str(test),
                          f"{subject.rate(test):.1f}", f"{min(rates):.1f}", f"{max(rates):.1f}", *cells)
    stdout_console().print(table)


def comparisons(subjects: Sequence[Subject], tests: Sequence[Test]) -> Iterator[tuple[str, ...]]:
    """Cells of each low-rank file and of the patched dense one against stock llama.cpp."""
    stock, *patched = subjects
    for subject in patched:
        for test in tests:
            found = speedup(subject, stock, test)
            possible = ideal(subject.plan, stock.plan, test)
            target = TARGET if subject.plan.low_rank else STOCK_TARGET
            yield (subject.plan.type.name, f"{subject.plan.ratio:g}", str(test), f"{possible:.3f}",
                   f"{found:.3f}", f"{found / possible:.3f}", f"{target}",
                   "met" if found / possible >= target else "not met")


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=("llama-3.2-1b", "qwen2.5-0.5b"), show_default=True)
@click.option("--types", default="Q4_0,Q8_0,F16,Q4_K", show_default=True, help="Separated by commas.")
@click.option("--ratios", default="0.8,0.6", show_default=True)
@click.option("--prompts", default="32,128,512", show_default=True, help="Tokens.")
@click.option("--depths", default="0,2048", show_default=True, help="Tokens before the decoded ones.")
@click.option("--gen-tokens", default=32, show_default=True)
@click.option("--repetitions", default=5, show_default=True, help="Turns.")
@click.option("--threads", default=2, show_default=True)
@click.option("--source", help="Pinned source archive or directory, for skipcat-edge synth.")
@click.option("--keep", is_flag=True, help="Keep the models in build/bench/ for the next run.")
def main(models: tuple[str, ...], types: str, ratios: str, prompts: str, depths: str, gen_tokens: int,
         repetitions: int, threads: int, source: str | None, keep: bool) -> None:
    for kind in ("stock", "patched"):
        if not (NATIVE / kind / "bin" / "llama-bench").exists():
            raise click.ClickException("llama-bench is missing; run make native-tools.")
    tests = [Test(int(tokens), 0, 0) for tokens in prompts.split(",") if tokens]
    tests += [Test(0, gen_tokens, int(depth)) for depth in depths.split(",") if depth]
    bandwidth = read_bandwidth(threads)
    click.echo(f"{threads} threads read {bandwidth / 1e9:.1f} GB/s; decoding should reach "
               f"{BANDWIDTH_TARGET:.0%} of it")
    rows: list[tuple[str, ...]] = []
    for model in models:
        for name in types.split(","):
            found = measure(model, name, ratios, tests, repetitions, threads, source, bandwidth, keep)
            rows += [(model, *row) for row in found]
    table = new_table("model", "type", "ratio", "test", "ideal", "speed-up", "efficiency", "target", "",
                      left=4)
    for row in rows:
        table.add_row(*row)
    click.echo()
    stdout_console().print(table)
    low_rank = [float(row[5]) for row in rows if row[2] != "1"]
    if low_rank:
        click.echo(f"geometric mean of the low-rank speed-ups: {statistics.geometric_mean(low_rank):.3f}")


def measure(model: str, type_name: str, ratios: str, tests: Sequence[Test], repetitions: int, threads: int,
            source: str | None, bandwidth: float, keep: bool) -> list[tuple[str, ...]]:
    """All files of one model and type, in turns; an empty list where the type's block does not fit."""
    type_ = weight_type(type_name)
    dimensions = model_dimensions(model)
    plans: list[Plan] = []
    for ratio in (1.0, *map(float, ratios.split(","))):
        try:
            planned = plan(dimensions, type_, ratio, SEED)
        except UserError as error:  # a ratio that the type's grid of ranks does not reach
            click.echo(f"{model} {type_name} {ratio:g}: left out: {error}")
            continue
        if any(tensor.name.startswith("blk.") for tensor in planned.fallbacks):
            click.echo(f"{model} {type_name} {ratio:g}: left out: rows are no whole blocks")
            continue
        plans.append(planned)
    if not plans or plans[0].low_rank:
        return []
    subjects = [Subject(plans[0], "stock"), *(Subject(planned, "patched") for planned in plans)]
    try:
        for planned in plans:
            write_model(planned, source)
        with new_progress() as progress:
            task = progress.add_task(f"{model} {type_name}", total=repetitions * len(subjects))
            for _ in range(repetitions):
                for subject in subjects:
                    run(subject, tests, threads)
                    progress.advance(task)
    finally:
        if not keep:
            for planned in plans:
                cached(planned).unlink(missing_ok=True)
    print_rates(subjects, tests, bandwidth)
    return list(comparisons(subjects, tests))


if __name__ == "__main__":
    main()
