"""`skipcat-edge chat`: talk to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.commands.level_options import dial_options, wish_of
from skipcat_edge.commands.rpc_option import rpc_option
from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from skipcat_edge.chat_input import Message
    from skipcat_edge.conversation import Conversation
    from skipcat_edge.levels import Schedule

_HELP = """\
/clear          forget the conversation
/system TEXT    tell the model something before all turns, and start anew; without TEXT: nothing
/exit           leave; so does Ctrl-D
Ctrl-C stops a reply; before its first word, or while you type, it forgets the message.
A line that ends in \\ goes on in the next one; all lines between two \""" are one message."""


@click.command(short_help="Chat with a model.",
               epilog=example("chat llama.gguf --system 'Answer in one sentence.'"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--system", help="What the model is told before the conversation.")
@click.option("-n", "--tokens", default=512, show_default=True, type=click.IntRange(min=1),
              help="Most tokens of one reply.")
@click.option("--context", default=4096, show_default=True, type=click.IntRange(min=64),
              help="Tokens of the whole conversation, never more than the model was trained for.")
@click.option("--temp", default=0.7, show_default=True, type=click.FloatRange(min=0),
              help="Temperature; 0 always takes the likeliest token.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), help="Makes a temperature above 0 repeatable.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@dial_options
@rpc_option
def command(file: Path, system: str | None, tokens: int, context: int, temp: float, seed: int | None,
            threads: int | None, rank_level: float | str | None, target_tps: float | None,
            max_temp: float | None, progressive: Schedule | None, rpc: tuple[str, ...]) -> None:
    """Chat with the model in FILE.

    A line is a message; /help tells how to write longer ones, and what else there is. Ctrl-C stops a reply,
    Ctrl-D leaves. Replies go to standard output and everything else to standard error, so it works in a pipe
    too.
    """
    from skipcat_edge.chat_input import line_reader, read_message
    from skipcat_edge.conversation import Conversation
    from skipcat_edge.generation import Sampling
    from skipcat_edge.level_control import check_wish, new_control
    from skipcat_edge.rpc import connect
    from skipcat_edge.session import model_info, open_generative

    wish = wish_of(rank_level, target_tps, max_temp, progressive)
    checked = None if wish is None else check_wish(file, wish)
    context = min(context, model_info(file).context_length or context)
    connect(rpc)
    llama = open_generative(file, context, threads)
    control = None if checked is None else new_control(llama, *checked)
    conversation = Conversation(llama, context=context, max_tokens=tokens, sampling=Sampling(temp, seed),
                                system=system, control=control)
    if not conversation.has_template:
        click.echo(f"{file.name} has no chat template: what you write is continued.", err=True)
    read = line_reader()
    while True:
        try:
            if not _one_message(read_message(read), conversation):
                return
        except KeyboardInterrupt:  # while nothing is generated, or just before or after
            click.echo("\n(Ctrl-D leaves)", err=True)


def _one_message(message: Message | None, conversation: Conversation) -> bool:
    """Do what `message` asks for; whether the chat goes on."""
    if message is None or (message.command and message.text == "/exit"):
        return False
    if message.command:
        _obey(message.text, conversation)
    elif message.text:
        _answer(conversation, message.text)
    return True


def _obey(message: str, conversation: Conversation) -> None:
    name, _, rest = message.partition(" ")
    if name == "/clear":
        conversation.turns.clear()
    elif name == "/system":
        conversation.system = rest.strip() or None
        conversation.turns.clear()
    else:
        click.echo(_HELP if name == "/help" else f"There is no {name}; /help lists the commands.", err=True)


def _answer(conversation: Conversation, message: str) -> None:
    from skipcat_edge.terminal import echo_generated

    try:
        reply = conversation.reply(message, emit=echo_generated)
    except UserError as error:
        click.echo(error.format_message(), err=True)
        return
    click.echo()
    notes = [str(reply.statistics), *([] if reply.levels is None else [reply.levels])]
    if not reply.statistics.tokens:
        notes.append("the message is forgotten")
    if reply.dropped:
        turns = "turn was" if reply.dropped == 1 else f"{reply.dropped} turns were"
        notes.append(f"context full: the oldest {turns} dropped")
    click.echo(f"({'; '.join(notes)})", err=True)
