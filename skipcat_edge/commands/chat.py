"""`skipcat-edge chat`: talk to a model."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.errors import UserError


@click.command(short_help="Chat with a model.",
               epilog=example("chat llama.gguf"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-n", "--tokens", default=512, show_default=True, type=click.IntRange(min=1),
              help="Most tokens of one reply.")
@click.option("--context", default=4096, show_default=True, type=click.IntRange(min=64),
              help="Tokens of the whole conversation, never more than the model was trained for.")
@click.option("--temp", default=0.7, show_default=True, type=click.FloatRange(min=0),
              help="Temperature; 0 always takes the likeliest token.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), help="Makes a temperature above 0 repeatable.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
def command(file: Path, tokens: int, context: int, temp: float, seed: int | None,
            threads: int | None) -> None:
    """Chat with the model in FILE.

    One line is one message; /exit or Ctrl-D leaves, Ctrl-C cuts a reply short. Replies go to
    standard output and everything else to standard error, so it works in a pipe too.
    """
    from skipcat_edge.conversation import Conversation
    from skipcat_edge.generation import Sampling
    from skipcat_edge.session import model_info, open_generative

    context = min(context, model_info(file).context_length or context)
    conversation = Conversation(open_generative(file, context, threads), context=context, max_tokens=tokens,
                                sampling=Sampling(temp, seed))
    if not conversation.has_template:
        click.echo(f"{file.name} has no chat template: what you write is continued.", err=True)
    while (line := _read_line()) is not None and line != "/exit":
        if not line:
            continue
        try:
            reply = conversation.reply(line, emit=lambda text: click.echo(text, nl=False))
        except UserError as error:
            click.echo(error.message, err=True)
            continue
        click.echo()
        if reply.statistics.stop in ("token limit", "context full"):
            click.echo(f"(cut short: {reply.statistics.stop})", err=True)
        if reply.dropped:
            turns = "turn was" if reply.dropped == 1 else f"{reply.dropped} turns were"
            click.echo(f"(context full: the oldest {turns} dropped)", err=True)


def _read_line() -> str | None:
    """The next line without surrounding space; None at the end of the input or at Ctrl-C."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    import readline  # noqa: F401  (gives input() a history and editing keys)

    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None
