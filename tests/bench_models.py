"""The random-weight models that the benchmarks run, what work they are, and their files in build/bench/."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from skipcat_edge.errors import UserError
from skipcat_edge.synth_plan import Plan, model_dimensions, plan
from skipcat_edge.weight_types import weight_type

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "bench"
SEED = 0


@dataclass(frozen=True)
class Test:
    """One of llama-bench's: a prompt of `prompt` tokens, or `generated` tokens after `depth` others."""

    prompt: int
    generated: int
    depth: int

    def __str__(self) -> str:
        return f"prompt {self.prompt}" if self.prompt else f"decode at {self.depth}"


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
    """Where the model's file is kept; other ranks at the same ratio are another file."""
    ratios = "-".join(f"{ratio:g}" for ratio in model.levels or (model.ratio,))
    return CACHE / f"{model.model.name}-{model.type.name}-{ratios}-{model.linear_parameters}.gguf"


def write_model(model: Plan, source: str | None) -> None:
    """Write the model's file if it is not there."""
    path = cached(model)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    ratio = (["--levels", ",".join(map(str, model.levels))] if model.levels
             else ["--ratio", str(model.ratio)])
    options = ["--quant", model.type.name, *ratio, "--seed", str(model.seed)]
    command = [sys.executable, "-c", "from skipcat_edge.cli import main; main()", "synth", model.model.name,
               "-o", str(path), *options, *(["--source", source] if source else [])]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit(1)


def planned_models(model: str, type_name: str, ratios: str) -> list[Plan]:
    """The dense model and one for each of `ratios` (separated by commas) that the grid of ranks reaches;
    none where the dense one's rows are no whole blocks of the type. Says what it leaves out."""
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
    return [] if not plans or plans[0].low_rank else plans


def read_anew(path: Path) -> None:
    """Have the system cache the file as one that it reads from disk, in huge pages. As it was written it lies
    in small ones, and decoding with weights that are used in place takes longer, up to 12 % and by chance."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 24):
            pass


@contextmanager
def written(models: Sequence[Plan], source: str | None, keep: bool) -> Iterator[None]:
    """Within, the models' files are there; `keep` leaves them for the next run."""
    try:
        for model in models:
            write_model(model, source)
            read_anew(cached(model))
        yield
    finally:
        if not keep:
            for model in models:
                cached(model).unlink(missing_ok=True)
