"""`skipcat-edge convert`: compress a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from skipcat_edge.commands.examples import example

if TYPE_CHECKING:
    from skipcat_converter.options import ConvertResult

METHODS = ("auto", "skipcat", "skip", "cat", "svd-llm", "svd")
ALLOCATIONS = ("loss", "uniform", "energy", "flrc")


@click.command(epilog=example("convert ./Llama-3.2-1B -o llama.gguf --quant Q8_0 --calibration text.txt"))
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="GGUF file to write.")
@click.option("--ratio", type=float,
              help="Kept share of the linear layers' parameters, above 0; 1 writes a plain dense file.  "
                   "[default: 0.8]")
@click.option("--budget", metavar="SIZE", help="Size of the whole file instead, for example 480MB.")
@click.option("--bpw", type=click.FloatRange(0, min_open=True),
              help="Bits per dense weight of the linear layers instead, for example 3.6.")
@click.option("--levels", metavar="RATIOS",
              help="Rising ratios of one file whose speed is changed while it runs, for example 0.6,0.8; the "
                   "last is the whole file's.")
@click.option("--level-overhead", default=0.1, show_default=True, metavar="SHARE",
              help="With --levels: how much larger the file may be than one of its last level alone.")
@click.option("--level-quant",
              help="With --levels: ggml type of what a level adds to lower ones.  [default: Q8_0 in F16 and "
                   "BF16, Q4_0 in Q8_0, else as --quant]")
@click.option("--quant", default="Q8_0", show_default=True, help="ggml type of the linear layers.")
@click.option("--head-quant",
              help="ggml type of token embeddings and output head.  [default: as in the base file]")
@click.option("--method", default="auto", show_default=True, type=click.Choice(METHODS),
              help="auto chooses ranks and forms by their predicted loss; the others are published methods.")
@click.option("--allocation", type=click.Choice(ALLOCATIONS),
              help="How ranks are chosen.  [default: loss for auto, uniform for the others]")
@click.option("--rounding", default="feedback", show_default=True, type=click.Choice(["feedback", "plain"]),
              help="Whether quantisation passes its errors on.")
@click.option("--calibration", type=click.Path(path_type=Path),
              help="Text file that shows which inputs matter.")
@click.option("--stats", type=click.Path(path_type=Path),
              help="Keep the calibration's statistics in this file, or use those in it. Without "
                   "--calibration the model is then not run at all.")
@click.option("--no-compensation", is_flag=True,
              help="Do not run the model again to let later layers make up for earlier ones.")
@click.option("--no-grad", is_flag=True, help="Calibrate without gradients: faster, and worse.")
@click.option("--calib-tokens", type=click.IntRange(1), help="Tokens to read.  [default: up to 65,536]")
@click.option("--seq-len", type=click.IntRange(2), help="Tokens per calibration window.  [default: 256]")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--device-map", type=click.Choice(["auto"]),
              help="Spread the model over all GPUs while it is run on the text, instead of --device.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1),
              help="Of the loss whose gradients are taken.  [default: 0]")
@click.option("--max-memory", metavar="SIZE",
              help="Memory that the conversion may take, for example 4GB: the model is read block by block, "
                   "and what does not fit is done in smaller pieces or left out, which is said.")
@click.option("--base", type=click.Path(path_type=Path),
              help="Dense GGUF of the same model, instead of converting it here.")
@click.option("--runtime-source", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Pinned llama-cpp-python archive, whose converter is used.  [default: fetch it]")
@click.option("--allow-pickle", is_flag=True,
              help="Read weights that are pickles (pytorch_model*.bin) where there are no safetensors. A "
                   "pickle is a program: PyTorch reads it so that it can make tensors only, but a flaw there "
                   "would let it do all that you can. Only for models whose author you trust.")
@click.option("--executor", default="local", show_default=True, type=click.Choice(["local", "ray"]),
              help="ray measures layers on the machines of the Ray cluster that RAY_ADDRESS names (unset: a "
                   "new one, of this machine alone), and factors them there with --no-compensation; "
                   "otherwise later layers wait for earlier ones. The file is the same.")
@click.option("--force", is_flag=True, help="Replace the output file and its card.")
@click.option("--restart", is_flag=True, help="Begin anew where an unfinished conversion is there.")
def command(
    source: str,
    output: Path,
    ratio: float | None,
    budget: str | None,
    bpw: float | None,
    levels: str | None,
    level_overhead: float,
    level_quant: str | None,
    quant: str,
    head_quant: str | None,
    method: str,
    allocation: str | None,
    rounding: str,
    calibration: Path | None,
    stats: Path | None,
    no_compensation: bool,
    no_grad: bool,
    calib_tokens: int | None,
    seq_len: int | None,
    device: str,
    seed: int | None,
    max_memory: str | None,
    base: Path | None,
    runtime_source: Path | None,
    allow_pickle: bool,
    device_map: Literal["auto"] | None,
    executor: Literal["local", "ray"],
    force: bool,
    restart: bool,
) -> None:
    """Compress SOURCE, a Hugging Face directory or hub id, and write it as GGUF.

    A model card is written beside it, `llama.md` beside `llama.gguf`: the source and its licence, the
    method, and how to run it. `eval --card` puts figures into it, and `push` uploads both.

    What is finished is kept beside the output until all of it is, in `.llama.gguf.job`: where the process
    was killed, or the disk was full, the same command goes on from there.
    """
    from skipcat_edge.control_characters import visible
    from skipcat_edge.conversion import convert
    from skipcat_edge.extra import phases
    from skipcat_edge.ranks import parse_ratios
    from skipcat_edge.sizes import parse_size

    with phases() as phase:
        result = convert(
            source, output, ratio=ratio, budget=None if budget is None else parse_size(budget), bpw=bpw,
            levels=() if levels is None else parse_ratios(levels, "--levels")[::-1],
            level_overhead=level_overhead, level_quant=level_quant,
            quant=quant, head_quant=head_quant, method=method, allocation=allocation, rounding=rounding,
            calibration=calibration, stats=stats, compensate=not no_compensation, gradients=not no_grad,
            calib_tokens=calib_tokens, seq_len=seq_len, device=device, seed=seed, base=base,
            max_memory=None if max_memory is None else parse_size(max_memory),
            runtime_source=runtime_source, device_map=device_map, executor=executor,
            allow_pickle=allow_pickle, force=force, restart=restart, phase=phase,
            warn=lambda text: click.echo(visible(text), err=True),
        )
    _report(output, result)


def _report(output: Path, result: ConvertResult) -> None:
    from skipcat_edge.card import card_path
    from skipcat_edge.control_characters import visible
    from skipcat_edge.terminal import decimal_bytes

    click.echo(f"{output}: {decimal_bytes(result.output_bytes)}; its card: {card_path(output).name}")
    if result.owners:
        worst = max(result.owners, key=lambda report: report.error)
        click.echo(f"the linear layers keep {result.kept:.4f} of their parameters, in "
                   f"{len(result.owners)} low-rank projections")
        for level in result.levels:
            click.echo(f"level {level.ratio:g} reads {level.read:.4f} of what the dense layers take; "
                       f"predicted loss {level.loss:.4g}")
        click.echo(f"largest relative error of a projection: {worst.error:.4f} "
                   f"(block {worst.owner.block} {worst.owner.name}); "
                   f"largest |T|: {max(report.largest_t for report in result.owners):.2f}")
    elif result.dense:
        click.echo("no layer is low-rank: all of them fit dense")
    if result.calibration_tokens:
        click.echo(f"calibrated on {result.calibration_tokens:,} tokens; second moments moved towards their "
                   f"diagonal by up to {result.shrinkage:.1%}, as their noise asks for")
    for tensor, damping in result.damped.items():
        click.echo(visible(f"{tensor}: its inputs' second moments are singular; damped by {damping:g} of "
                           "their mean"))
    if result.not_compensated:
        click.echo(f"errors are not compensated across layers: {result.not_compensated}")
    by_reason: dict[str, list[str]] = {}
    for tensor, reason in result.dense.items():
        by_reason.setdefault(reason, []).append(tensor)
    for reason, tensors in by_reason.items():
        click.echo(visible(f"stays dense: {', '.join(_compact(tensors))} ({reason})"))


def _compact(tensors: list[str]) -> list[str]:
    """`blk.0.ffn_up.weight`, `blk.1.ffn_up.weight` -> `blk.0-1.ffn_up`."""
    from skipcat_edge.format import split_block
    from skipcat_edge.terminal import ranges

    blocks: dict[str, list[int]] = {}
    for tensor in tensors:
        block, rest = split_block(tensor) or (-1, tensor)
        blocks.setdefault(rest.removesuffix(".weight"), []).append(block)
    return [f"blk.{ranges(found)}.{member}" for member, found in blocks.items()]
