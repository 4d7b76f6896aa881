"""`skipcat-edge sweep`: which ratio and type to convert with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skipcat_edge.commands.examples import example

if TYPE_CHECKING:
    from skipcat_converter.sweep import Impossible, SweepRow


@click.command(short_help="Predict size and loss at many ratios and types.",
               epilog=example("sweep ./Llama-3.2-1B --stats statistics"))
@click.argument("source")
@click.option("--stats", required=True, type=click.Path(path_type=Path),
              help="Statistics that `convert --stats` kept.")
@click.option("--quant", multiple=True, default=("F16", "Q8_0", "Q4_0"), show_default=True,
              help="ggml type of the linear layers; may be given several times.")
@click.option("--ratios", default="1,0.9,0.8,0.7,0.6,0.5,0.4,0.3", show_default=True,
              help="Kept shares of the linear layers' parameters; 1 is dense.")
@click.option("--base", type=click.Path(path_type=Path),
              help="Dense GGUF of the same model, instead of converting it here.")
@click.option("--runtime-source", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Pinned llama-cpp-python archive, whose converter is used.  [default: fetch it]")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def command(
    source: str, stats: Path, quant: tuple[str, ...], ratios: str, base: Path | None,
    runtime_source: Path | None, as_json: bool,
) -> None:
    """Predict what SOURCE loses at many ratios and types, from kept statistics; no model is run.

    The prediction is the one that method auto allocates ranks by: it ranks choices well, but takes the
    errors of layers for independent, so that cut ranks may lose two or three times as much. Compensation
    across layers, which convert adds with --calibration, makes up for a part of that.
    """
    from skipcat_edge.extra import phases, require_converter
    from skipcat_edge.gguf_file import open_gguf
    from skipcat_edge.ranks import parse_ratios
    from skipcat_edge.weight_types import weight_type

    shares = parse_ratios(ratios)
    types = [weight_type(name, have_importance=True) for name in dict.fromkeys(quant)]
    require_converter()
    if base is not None:
        open_gguf(base)
    from skipcat_converter.factorize import METHODS
    from skipcat_converter.source_model import resolve_source
    from skipcat_converter.sweep import sweep

    from skipcat_edge.runtime.source import stock_tree

    with phases() as phase:
        rows, impossible = sweep(
            resolve_source(source), base, stats, stock_tree(runtime_source), METHODS["auto"], types, shares,
            phase, None if Path(source).is_dir() else source)
    if as_json:
        answer = {"rows": rows, "impossible": impossible}
        found = {key: [asdict(each) for each in values] for key, values in answer.items()}
        click.echo(json.dumps(found, indent=2))
    else:
        _print(rows, impossible)


def _print(rows: list[SweepRow], impossible: list[Impossible]) -> None:
    from skipcat_edge.terminal import decimal_bytes, new_table, stdout_console

    table = new_table("type", "ratio", "linear layers", "bits per weight", "predicted loss", "dense", "best")
    for row in rows:
        size = (row.nbytes, row.loss)
        beaten = any(other.nbytes <= row.nbytes and other.loss <= row.loss and
                     (other.nbytes, other.loss) != size for other in rows)
        table.add_row(row.type, f"{row.ratio:g}", decimal_bytes(row.nbytes), f"{row.bits_per_weight:.2f}",
                      f"{row.loss:.5f}", f"{row.dense}/{row.layers}", "" if beaten else "*")
    console = stdout_console()
    if rows:
        console.print(table)
        console.print()
    for each in impossible:
        console.print(f"{each.type} at {each.ratio:g} cannot be had: {each.reason}")
    if not rows:
        return
    console.print("predicted loss: of a language model the KL divergence from the dense one, if the errors "
                  "of its layers were independent; rounding to 8 bits or more is not counted")
    console.print("best: no row of as few bytes predicts less")
