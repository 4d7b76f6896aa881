"""How much of the ideal speed-up low-rank models reach on this machine: `make bench-speed`.

For each type, one dense and some low-rank random-weight models are written to build/bench/ and
measured by `skipcat-edge bench` in one run, which alternates between them with the same threads.

Decoding a token reads every weight once, so its ideal speed-up is dense bytes over low-rank
bytes: all tensors but an embedding table of its own (a tied one is read as the head). A prompt
is bound by arithmetic, so its ideal is dense over low-rank multiplications: those of the linear
layers for every token and of the head for the last one, the only one that gets logits.
Attention's products of activations are left out: with 128 tokens they are 0.4 % of Llama-3.2-1B's
multiplications. So is that the last block's feed-forward runs for the last token only, which
changes the ratio by 0.0001. Efficiency is measured over ideal speed-up. The targets are marks to
compare with, not tests: on a busy machine they are missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from skipcat_edge.synth_plan import Plan, model_dimensions, plan
from skipcat_edge.terminal import new_table, stdout_console
from skipcat_edge.weight_types import weight_type

DECODE_TARGET = 0.93
PROMPT_TARGET = 0.95
CACHE = Path(__file__).resolve().parent.parent / "build" / "bench"
SEED = 0


@dataclass(frozen=True)
class Comparison:
    """One low-rank model against the dense one of the same type."""

    low_rank: Plan
    dense: Plan
    measured: dict[str, Any]
    measured_dense: dict[str, Any]

    def speedup(self, key: str) -> float:
        """Ratio of the median tokens per second; `key`: prompt_tps or decode_tps."""
        return float(self.measured[key]["median"] / self.measured_dense[key]["median"])

    @property
    def byte_ratio(self) -> float:
        """Low-rank over dense bytes read per decoded token."""
        return self.low_rank.bytes_per_token / self.dense.bytes_per_token

    def multiplication_ratio(self, prompt_tokens: int) -> float:
        """Low-rank over dense multiplications of a prompt."""
        return multiplications(self.low_rank, prompt_tokens) / multiplications(self.dense, prompt_tokens)


def multiplications(model: Plan, prompt_tokens: int) -> int:
    """Multiplications by weights of a prompt whose last token alone gets logits."""
    head = model.model.n_vocab * model.model.n_embd
    return prompt_tokens * model.linear_parameters + head


def edge(*arguments: str) -> str:
    """Standard output of a skipcat-edge command; its progress goes to the terminal."""
    command = [sys.executable, "-c", "from skipcat_edge.cli import main; main()", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)
    return result.stdout


def cached(model: Plan) -> Path:
    """Where the model's file is kept."""
    return CACHE / f"{model.model.name}-{model.type.name}-{model.ratio:g}.gguf"


def write_model(model: Plan, source: str | None) -> Path:
    """Write the model's file if it is not there."""
    path = cached(model)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        options = ["--quant", model.type.name, "--ratio", str(model.ratio), "--seed", str(model.seed)]
        edge("synth", model.model.name, "-o", str(path), *options, *(["--source", source] if source else []))
    return path


def measure(plans: Sequence[Plan], source: str | None, options: Sequence[str]) -> list[dict[str, Any]]:
    """One object of `skipcat-edge bench --json` per plan, in the order of `plans`."""
    files = [write_model(model, source) for model in plans]
    results = json.loads(edge("bench", *map(str, files), *options, "--json"))
    by_name = {Path(entry["file"]).name: entry for entry in results}
    return [by_name[file.name] for file in files]


def tokens_per_second(entry: dict[str, Any], key: str) -> str:
    """`median (min to max)` tokens per second."""
    return "{median:.1f} ({min:.1f} to {max:.1f})".format(**entry[key])


def print_measured(plans: Sequence[Plan], entries: Sequence[dict[str, Any]]) -> None:
    """What was measured, with its spread."""
    table = new_table("type", "ratio", "GB", "threads", "prompt tok/s", "decode tok/s", left=1)
    for model, entry in zip(plans, entries, strict=True):
        table.add_row(
            model.type.name, f"{model.ratio:g}", f"{model.nbytes / 1e9:.2f}", str(entry["threads"]),
            tokens_per_second(entry, "prompt_tps"), tokens_per_second(entry, "decode_tps"),
        )  # fmt: skip
    stdout_console().print(table)


def print_comparisons(comparisons: Sequence[Comparison], prompt_tokens: int) -> None:
    """Speed-ups against their ideals and the targets."""
    table = new_table(
        "type", "ratio", "bytes", "decode", "efficiency", f"target {DECODE_TARGET}",
        "multiplications", "prompt", "efficiency", f"target {PROMPT_TARGET}",
    )  # fmt: skip
    for comparison in comparisons:
        multiplied = comparison.multiplication_ratio(prompt_tokens)
        decode, prompt = comparison.speedup("decode_tps"), comparison.speedup("prompt_tps")
        decode_efficiency, prompt_efficiency = decode * comparison.byte_ratio, prompt * multiplied
        table.add_row(
            comparison.low_rank.type.name, f"{comparison.low_rank.ratio:g}",
            f"{comparison.byte_ratio:.3f}", f"{decode:.2f}x", f"{decode_efficiency:.3f}",
            "met" if decode_efficiency >= DECODE_TARGET else "not met",
            f"{multiplied:.3f}", f"{prompt:.2f}x", f"{prompt_efficiency:.3f}",
            "met" if prompt_efficiency >= PROMPT_TARGET else "not met",
        )  # fmt: skip
    stdout_console().print(table)


@click.command(help=__doc__)
@click.option("--model", default="llama-3.2-1b", show_default=True)
@click.option("--types", default="Q4_0,Q8_0", show_default=True, help="ggml types, separated by commas.")
@click.option("--ratios", default="0.8,0.6", show_default=True)
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--gen-tokens", default=32, show_default=True)
@click.option("--repetitions", default=5, show_default=True)
@click.option("--threads", type=int, help="Default: skipcat-edge bench's.")
@click.option("--source", help="Pinned source archive or directory, for skipcat-edge synth.")
@click.option("--keep", is_flag=True, help="Keep the models, 5 GB, in build/bench/ for the next run.")
def main(model: str, types: str, ratios: str, prompt_tokens: int, gen_tokens: int, repetitions: int,
         threads: int | None, source: str | None, keep: bool) -> None:
    dimensions = model_dimensions(model)
    options = ["--prompt-tokens", str(prompt_tokens), "--gen-tokens", str(gen_tokens),
               "--repetitions", str(repetitions), *(["--threads", str(threads)] if threads else [])]
    kept_ratios = [1.0, *map(float, ratios.split(","))]
    comparisons = []
    for name in types.split(","):
        plans = [plan(dimensions, weight_type(name), ratio, SEED) for ratio in kept_ratios]
        try:
            entries = measure(plans, source, options)
        finally:
            if not keep:
                for planned in plans:
                    cached(planned).unlink(missing_ok=True)
        print_measured(plans, entries)
        comparisons += [
            Comparison(planned, plans[0], entry, entries[0])
            for planned, entry in zip(plans[1:], entries[1:], strict=True)
        ]
    click.echo()
    print_comparisons(comparisons, prompt_tokens)


if __name__ == "__main__":
    main()
