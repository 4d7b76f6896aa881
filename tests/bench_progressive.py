"""Progressive decoding beside one level throughout, at equal bytes per token: `make bench-progressive`.

The prompts, the reference and what is measured are those of `eval --progressive`. Everything is made
anew. Needs ../shared.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click
from bench_quality import LOW_RANK, ROOT, SHARED, Bench, Job, Scale
from bench_report import Report, machine
from conversion import quiet
from rich.table import Table
from skipcat_converter.pipeline import convert

from skipcat_edge import evaluate
from skipcat_edge.levels import parse_schedule
from skipcat_edge.progressive_eval import ProgressiveEvaluation, Span
from skipcat_edge.samples import PROMPT_TOKENS
from skipcat_edge.terminal import decimal_bytes, new_table

LEVELS = (0.6, 0.7, 0.8)
TOKENS = 64
FALLING, RISING, CONSTANT = "0:0.8,22:0.7,43:0.6", "0:0.6,22:0.7,43:0.8", "0:0.7"
THIRDS = ((1, 21), (22, 42), (43, 63))
"""Tokens that a schedule computes at one level."""
AVERAGE = 0.7
"""What each schedule reads on average, as a ratio: 21 decoded tokens at each level."""
UNIFORM, FLRC, STEADY, DOWN, UP = "uniform", "FLRC's ranks", "constant", "falling", "rising"
MODELS = (("demo", "Q8_0"), ("babyllama361", "F16"))
EXPLANATION = f"""\
After each prompt of {PROMPT_TOKENS} tokens {TOKENS} are computed one by one, and all rows of a model read \
about the same bytes of weights for them on average. *{UNIFORM}*: a file of one level, ratio {AVERAGE:g}, \
whose ranks follow the predicted loss. *{FLRC}*: the same with FLRC's allocation. The others are one file \
with the levels {", ".join(f"{level:g}" for level in LEVELS)}: *{STEADY}* runs it at {AVERAGE:g}, *{DOWN}* \
by the schedule `{FALLING}` (progressive decoding as FLRC has it) and *{UP}* by `{RISING}`.

Prompts have a file's full level, and so has token 0, which comes out of them: {LEVELS[-1]:g} in the file \
with levels, {AVERAGE:g} in the others. KL is in nats per token from the dense F16 file, which is fed the \
same tokens of the text; its thirds are the tokens that a schedule computes at one level. ROUGE-L is the \
F-measure with what the dense file writes after the prompts. ± is one standard error over the prompts; \
*within the error* are figures no farther apart than two of their errors together."""


@dataclass(frozen=True)
class Size:
    """How much is read and measured."""

    calib_tokens: int = 40_000
    prompts: int = 300


def files(name: str, type_: str, size: Size, folder: Path) -> tuple[Bench, dict[str, Path]]:
    """The files that are compared: by ratio, by FLRC's allocation, and with levels."""
    bench = Bench(name, folder, Scale(calib_tokens=size.calib_tokens))
    bench.prepare()
    made = {}
    for kind in (UNIFORM, FLRC, "levels"):
        made[kind] = bench.folder / f"{len(made)}.gguf"
        ratio = LEVELS[-1] if kind == "levels" else AVERAGE
        options = bench.options(made[kind], Job(name, LOW_RANK, "auto", type_, ratio))
        options = replace(options, levels=LEVELS if kind == "levels" else (),
                          allocation="flrc" if kind == FLRC else None)
        convert(options, quiet)
    return bench, made


def measured(bench: Bench, made: Mapping[str, Path], size: Size) -> dict[str, ProgressiveEvaluation]:
    """By row of the table."""
    text = bench.evaluation.read_text(encoding="utf-8")
    rows = {UNIFORM: (made[UNIFORM], CONSTANT), FLRC: (made[FLRC], CONSTANT),
            STEADY: (made["levels"], CONSTANT), DOWN: (made["levels"], FALLING), UP: (made["levels"], RISING)}
    found = {}
    for row, (file, schedule) in rows.items():
        progressive = evaluate(
            file, text, reference=bench.dense, window=1 + PROMPT_TOKENS + TOKENS, cache=False,
            progressive=parse_schedule(schedule), prompts=size.prompts,
            threads=1).progressive  # models so small have no work for more
        assert progressive is not None and progressive.tokens == TOKENS
        found[row] = progressive
    return found


def table_of(found: Mapping[str, ProgressiveEvaluation]) -> Table:
    spans = [f"KL {first}-{last}" for first, last in THIRDS]
    table = new_table("", "MB per token", "KL", *spans, "top-1 %", "ROUGE-L")
    for row, each in found.items():
        kl = each.divergence
        table.add_row(row, f"{each.bytes_per_token / 1e6:.3f}", f"{kl.kl:.4f} ± {kl.kl_se:.4f}",
                      *(f"{third(each, *span):.4f}" for span in THIRDS),
                      f"{100 * kl.top1:.2f} ± {100 * kl.top1_se:.2f}",
                      f"{each.rouge_l:.3f} ± {each.rouge_l_se:.3f}")
    return table


def third(found: ProgressiveEvaluation, first: int, last: int) -> float:
    """Mean KL of the tokens from `first` to `last`."""
    spans: tuple[Span, ...] = found.positions[first : last + 1]
    return statistics.fmean(span.kl for span in spans)


def verdict(found: Mapping[str, ProgressiveEvaluation]) -> Iterator[str]:
    """What the table says of a model, and why, in its own figures."""
    down, steady, uniform = (found[row] for row in (DOWN, STEADY, UNIFORM))
    yield f"- The falling schedule against the file of one level: {_against(down, uniform)}."
    yield (f"- Of that, the price of having levels, constant against uniform: {_against(steady, uniform)}; "
           f"the schedule itself, falling against constant: {_against(down, steady)}.")
    yield f"- Falling against rising: {_against(down, found[UP])}."
    low, high = (statistics.fmean((third(down, *THIRDS[-place]), third(found[UP], *THIRDS[place - 1])))
                 for place in (1, len(THIRDS)))
    first, last = third(steady, *THIRDS[0]), third(steady, *THIRDS[-1])
    middle = (first + last) / 2
    yield (f"- In its first and last third the KL is {low:.4f} at {LEVELS[0]:g}, {middle:.4f} at {AVERAGE:g} "
           f"and {high:.4f} at {LEVELS[-1]:g}: going down costs {low - middle:.4f} where going up saves "
           f"{middle - high:.4f}{_convex(low - middle, middle - high)}")
    yield (f"- At a constant level the KL of the last third is {last / first:.2f} times that of the first: "
           + ("early tokens are the harder ones, where a falling schedule spends." if last < 0.9 * first
              else "later tokens are the harder ones, where a falling schedule saves." if last > 1.1 * first
              else "neither early nor late tokens are much harder, so their order matters little."))


def _convex(lost: float, saved: float) -> str:
    return "." if lost <= saved else (", so that a schedule loses to the level between, unless the order of "
                                      "its levels makes up for it.")


def _against(ours: ProgressiveEvaluation, other: ProgressiveEvaluation) -> str:
    """Both figures of both, and what they amount to."""
    kl, theirs = ours.divergence, other.divergence
    rouge = _compared(ours.rouge_l, ours.rouge_l_se, other.rouge_l, other.rouge_l_se)
    return (f"KL {kl.kl:.4f} against {theirs.kl:.4f}, {_compared(kl.kl, kl.kl_se, theirs.kl, theirs.kl_se)}; "
            f"ROUGE-L {ours.rouge_l:.3f} against {other.rouge_l:.3f}, {rouge}")


def _compared(ours: float, error: float, other: float, other_error: float) -> str:
    if abs(ours - other) <= 2 * math.hypot(error, other_error):
        return "within the error"
    return f"{abs(ours / other - 1):.0%} {'lower' if ours < other else 'higher'}"


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice([name for name, _ in MODELS]),
              help="May be given several times.  [default: all]")
@click.option("--quick", is_flag=True, help="One model, few prompts: a smoke test, whose page goes to build.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path),
              help="Default: docs/progressive.md, or build/progressive.md with --quick.")
def main(models: tuple[str, ...], quick: bool, out: Path | None) -> None:
    if not (SHARED / "text").exists():
        raise click.ClickException(f"{SHARED / 'text'} is missing; the shared data is needed.")
    size = Size(calib_tokens=8_000, prompts=20) if quick else Size()
    chosen = [each for each in (MODELS[1:] if quick else MODELS) if not models or each[0] in models]
    command = "".join(f" --model {name}" for name in models)
    report = Report("Progressive decoding", f"tests/bench_progressive.py{command}" if models
                    else "make bench-progressive")
    if quick:
        report.text("A smoke test: these figures mean nothing.")
    report.text(machine())
    report.text(f"Calibrated with {size.calib_tokens:,} tokens of TinyStories, measured on {size.prompts} "
                "prompts of other stories.")
    report.text(EXPLANATION)
    (ROOT / "build").mkdir(exist_ok=True)
    for name, type_ in chosen:
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
            started = time.monotonic()
            bench, made = files(name, type_, size, Path(folder))
            found = measured(bench, made, size)
            few = {each.prompts for each in found.values()}
            assert few == {size.prompts}, few  # the texts are long enough
            report.heading(f"{name}, {type_}")
            report.table(table_of(found))
            report.text("\n".join(verdict(found)))
            sizes = ", ".join(f"{kind} {decimal_bytes(path.stat().st_size)}" for kind, path in made.items())
            report.text(f"Files: {sizes}.")
            click.echo(f"{name}: {time.monotonic() - started:.0f} s", err=True)
    report.save(out or ROOT / ("build" if quick else "docs") / "progressive.md")


if __name__ == "__main__":
    main()
