"""`skipcat-edge generate`: continue a text."""

from __future__ import annotations

from pathlib import Path

import click

from skipcat_edge.commands.examples import example


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
def command(file: Path, prompt: str, tokens: int, temp: float, seed: int | None, threads: int | None) -> None:
    """Continue a text with the model in FILE.

    The continuation goes to standard output as it is written, its statistics to standard error.
    """
    from skipcat_edge.generation import Sampling, encode, generate, open_for_prompt

    llama, context = open_for_prompt(file, prompt, tokens, threads)
    statistics = generate(
        llama, encode(llama, prompt), max_tokens=tokens, context=context,
        emit=lambda text: click.echo(text, nl=False), sampling=Sampling(temp, seed),
    )
    click.echo()
    click.echo(str(statistics), err=True)
    if statistics.stop == "interrupted":
        raise click.Abort
