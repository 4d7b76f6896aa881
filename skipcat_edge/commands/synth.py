"""`skipcat-edge synth`: write a random-weight model."""

from __future__ import annotations

from pathlib import Path

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.model_table import MODELS


@click.command(epilog=example("synth llama-3.2-1b -o random.gguf --quant Q4_0 --ratio 0.8",
                              f"Known models: {', '.join(MODELS)}."))
@click.argument("name")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="GGUF file to write.")
@click.option("--ratio", default=1.0, show_default=True,
              help="Kept share of the linear layers' parameters, above 0; 1 is a plain dense model.")
@click.option("--levels", metavar="RATIOS",
              help="Rising ratios of one file whose speed is changed while it runs, for example 0.6,0.8; the "
                   "last is the whole file's, instead of --ratio.")
@click.option("--quant", default="Q8_0", show_default=True,
              help="ggml type of all weights, embeddings and head included. Weights whose rows are not "
                   "whole blocks of the type are stored as F16.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1),
              help="Seed of the weights and skip sets.")
@click.option("--source", type=click.Path(exists=True, path_type=Path),
              help="Pinned llama-cpp-python source, archive or directory, to take the vocabulary from.  "
                   "[default: fetch it]")
@click.option("--force", is_flag=True, help="Replace the output file.")
def command(name: str, output: Path, ratio: float, levels: str | None, quant: str, seed: int,
            source: Path | None, force: bool) -> None:
    """Write a random-weight model with the dimensions of NAME.

    It tells how fast a model would be on this device, dense or low-rank, without downloading it.
    """
    from skipcat_edge.errors import UserError
    from skipcat_edge.output import check_output
    from skipcat_edge.ranks import parse_ratios
    from skipcat_edge.runtime.source import stock_tree
    from skipcat_edge.synth import write
    from skipcat_edge.synth_plan import model_dimensions, plan
    from skipcat_edge.terminal import decimal_bytes, new_progress
    from skipcat_edge.weight_types import weight_type

    rising = () if levels is None else tuple(parse_ratios(levels, "--levels")[::-1])
    if rising and ratio not in (1, rising[-1]):
        raise UserError("The last of --levels is the whole file's ratio; leave out --ratio.")
    planned = plan(model_dimensions(name), weight_type(quant), rising[-1] if rising else ratio, seed, rising)
    check_output(output, force)
    tree = source if source is not None and source.is_dir() else stock_tree(source)
    megabyte = 1e6
    with new_progress() as progress:
        task = progress.add_task("Writing (MB)", total=planned.nbytes / megabyte)
        write(planned, output, tree, force=force,
              advance=lambda nbytes: progress.advance(task, nbytes / megabyte))
    click.echo(
        f"{output}: {planned.parameters / 1e9:.2f} B parameters, {planned.type.name}, "
        f"{decimal_bytes(output.stat().st_size)}"
        + (f", linear layers at ratio {planned.kept:.3f}" if planned.low_rank else "")
        + "".join(f", level {level:g} at {planned.kept_at(place):.3f}"
                  for place, level in enumerate(planned.levels)) + "."
    )
    if fallbacks := planned.fallbacks:
        click.echo(
            f"{len(fallbacks)} weights are F16 because their rows are not whole blocks of "
            f"{planned.type.name}, {fallbacks[0].name} for one."
        )
