"""`skipcat-edge inspect`: what a GGUF file stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skipcat_edge.commands.examples import example

if TYPE_CHECKING:
    from rich.table import Table

    from skipcat_edge.format import Owner
    from skipcat_edge.inspection import DenseLayer, Inspection


@click.command(short_help="Show ranks, types, sizes and provenance of a GGUF file.",
               epilog=example("inspect skipcat.gguf --plot ranks.png"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--plot", type=click.Path(path_type=Path),
              help="Also draw the ranks, a row for each layer and a column for each block, into this picture "
                   "(.png, .pdf, .svg, ...).")
@click.option("--force", is_flag=True, help="Replace the picture of --plot.")
def command(file: Path, as_json: bool, plot: Path | None, force: bool) -> None:
    """Show what FILE stores, layer by layer, low-rank or dense; llama.cpp is not needed.

    The ratio is stored parameters over those of the dense layers that they replace. Of a file with levels it
    also tells which of them use each part, and what each reads to decode a token.
    """
    from skipcat_edge.inspection import inspect

    if plot is not None:
        from skipcat_edge.rank_plot import check_plot, save_plot

        check_plot(plot, force)
    inspection = inspect(file)
    if plot is not None:
        save_plot(inspection, plot, force)
    if as_json:
        click.echo(json.dumps(inspection.to_json(), indent=2))
    else:
        _print(inspection)


def _level_table(inspection: Inspection) -> Table:
    from skipcat_edge.terminal import decimal_bytes, new_table

    losses = any(level.loss is not None for level in inspection.levels)
    table = new_table("level", "parameters kept", "bytes per token", "of the full level",
                      *(["predicted loss"] if losses else []))
    for level in inspection.levels:
        table.add_row(f"{level.ratio:g}", f"{level.kept:.4f}", decimal_bytes(level.bytes_per_token),
                      f"{level.share:.1%}", *([] if level.loss is None else [f"{level.loss:.5f}"]))
    return table


def _short_names(members: list[str]) -> str:
    """`q k v` for attn_q, attn_k and attn_v; nothing for a member that owns its projection."""
    return "" if len(members) == 1 else " ".join(name.partition("_")[2] for name in members)


def _print(inspection: Inspection) -> None:
    from rich.markup import escape

    from skipcat_edge.terminal import decimal_bytes, new_table, stdout_console

    def levels(part: Owner | DenseLayer) -> list[str]:
        ratios = [f"{ratio:g}" for ratio in inspection.levels_of(part)]
        return [] if not inspection.levels else ["all" if len(ratios) == len(inspection.levels)
                                                 else " ".join(ratios)]

    leveled = ["levels"] if inspection.levels else []
    table = new_table("layer", "owner", "members", *leveled, "m x n", "rank", "skip", "ratio", "types",
                      "bytes", left=3 + len(leveled))
    rows: list[tuple[int, str, tuple[str, ...]]] = []
    for owner in inspection.owners:
        types = dict.fromkeys([owner.type.name, *(member.type.name for member in owner.members)])
        rows.append((owner.layer, owner.name, (
            _short_names([member.name for member in owner.members]), *levels(owner), f"{owner.m} x {owner.n}",
            f"{owner.rank}/{owner.full_rank}", "yes" if owner.skip else "no", f"{owner.ratio:.3f}",
            " ".join(types), decimal_bytes(owner.total_bytes),
        )))
    for dense in inspection.dense_layers:
        rows.append((dense.layer, dense.name, (
            "", *levels(dense), f"{dense.m} x {dense.n}", "dense", "", "", dense.type,
            decimal_bytes(dense.nbytes),
        )))
    for layer, name, cells in sorted(rows):
        table.add_row(str(layer), name, *cells)

    totals = inspection.totals
    console = stdout_console()
    size = decimal_bytes(inspection.file_bytes)
    console.print(escape(f"{inspection.file}: {inspection.architecture}, {size}"))
    if inspection.levels:
        console.print()
        console.print(_level_table(inspection))
    if rows:
        console.print()
        console.print(table)
    console.print()
    console.print(
        f"linear layers: {totals.stored_parameters:,} of {totals.dense_parameters:,} parameters stored "
        f"(ratio {totals.ratio:.4f})"
    )
    console.print(
        f"bytes: {totals.low_rank_bytes:,} low-rank, {totals.dense_layer_bytes:,} dense layers, "
        f"{totals.other_bytes:,} other (embeddings, head, norms, biases)"
    )
    for key, value in inspection.keys.items():
        console.print(escape(f"{key}: {value}"))
