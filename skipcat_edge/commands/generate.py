"""`skipcat-edge generate`: continue a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.commands.level_options import dial_options, wish_of
from skipcat_edge.commands.rpc_option import rpc_option

if TYPE_CHECKING:
    from skipcat_edge.levels import Schedule


@click.command(short_help="Continue a text.",
               epilog=example('generate llama.gguf -p "Once upon a time"'))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", default="", help="Text to continue; without it the model starts one.")
@click.option("-n", "--tokens", default=128, show_default=True, type=click.IntRange(min=1),
              help="Most tokens to write.")
@click.option("--temp", default=0.0, show_default=True, type=click.FloatRange(min=0),
              help="Temperature; 0 always takes the likeliest token.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), help="Makes a temperature above 0 repeatable.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@dial_options
@rpc_option
def command(file: Path, prompt: str, tokens: int, temp: float, seed: int | None, threads: int | None,
            rank_level: float | str | None, target_tps: float | None, max_temp: float | None,
            progressive: Schedule | None, rpc: tuple[str, ...]) -> None:
    """Continue a text with the model in FILE.

    The continuation goes to standard output as it is written, its statistics to standard error.
    """
    from skipcat_edge.generation import Sampling, encode, generate, open_for_prompt
    from skipcat_edge.level_control import check_wish, new_control
    from skipcat_edge.rpc import connect
    from skipcat_edge.terminal import echo_generated

    wish = wish_of(rank_level, target_tps, max_temp, progressive)
    checked = None if wish is None else check_wish(file, wish)
    connect(rpc)
    llama, context = open_for_prompt(file, prompt, tokens, threads)
    control = None if checked is None else new_control(llama, *checked)
    statistics = generate(
        llama, encode(llama, prompt), max_tokens=tokens, context=context,
        emit=echo_generated, sampling=Sampling(temp, seed),
        control=control,
    )
    click.echo()
    click.echo(str(statistics), err=True)
    if control is not None:
        click.echo(control.report(), err=True)
    if statistics.stop == "interrupted":
        raise click.Abort
