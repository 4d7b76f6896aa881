"""`skipcat-edge serve`: a model for other programs, and a page to chat with it."""

from __future__ import annotations

import re
from pathlib import Path

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.commands.level_options import aim_options, wish_of
from skipcat_edge.commands.rpc_option import rpc_option
from skipcat_edge.errors import UserError


@click.command(short_help="Serve a model to OpenAI clients and browsers.",
               epilog=example("serve llama.gguf"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen at; one that other machines reach needs an API key.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535),
              help="0 takes any free one.")
@click.option("--api-key", envvar="SKIPCAT_API_KEY", show_envvar=True,
              help="Key that clients must send; given here, other users of this machine see it.")
@click.option("--context", default=4096, show_default=True, type=click.IntRange(min=64),
              help="Tokens of a whole conversation, never more than the model was trained for.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@aim_options
@rpc_option
@click.option("--alias", multiple=True,
              help="Name of the model in answers; may be given several times.  [default: the file's]")
def command(file: Path, host: str, port: int, api_key: str | None, context: int, threads: int | None,
            rank_level: float | str | None, target_tps: float | None, max_temp: float | None,
            alias: tuple[str, ...], rpc: tuple[str, ...]) -> None:
    """Serve the model in FILE over HTTP, as OpenAI's API and as a page to chat with it.

    Requests are answered one after another, in the order in which they come. An embedding model has
    /v1/embeddings, every other one /v1/chat/completions and /v1/completions. Ctrl-C ends it.

    A request may choose its own level of a file that has several, with "rank_level": 0.6 or
    "progressive": "0:0.8,32:0.6" beside OpenAI's fields.
    """
    from skipcat_edge.extra import require_packages

    require_packages("Serving needs", "serve", "fastapi", "uvicorn")
    from skipcat_edge.level_control import check_wish, new_control
    from skipcat_edge.levels import file_levels
    from skipcat_edge.rpc import connect
    from skipcat_edge.session import import_llama_cpp, model_info

    info = model_info(file)
    wish = wish_of(rank_level, target_tps, max_temp)
    wish, known = (None, file_levels(file)) if wish is None else check_wish(file, wish)
    if wish is None and len(known) > 1:
        wish = known[-1]  # a request with another level must not leave it to the next one
    import_llama_cpp()
    from skipcat_edge.serve.app import create_app
    from skipcat_edge.serve.engine import Engine
    from skipcat_edge.serve.guard import Guard
    from skipcat_edge.serve.model import open_served
    from skipcat_edge.serve.server import is_loopback, listen, run, url

    if not is_loopback(host) and not api_key:
        raise UserError(f"{host} can be reached by other machines; give an API key with --api-key or "
                        "SKIPCAT_API_KEY.")
    if api_key and not re.fullmatch("[!-~]+", api_key):
        raise UserError("The API key has spaces or characters that are not ASCII, which clients cannot send; "
                        "choose another one.")
    context = min(context, info.context_length or context)
    with listen(host, port) as listener:
        connect(rpc)
        engine = Engine(open_served(file, info, context, threads))
        control = None if wish is None else new_control(engine.llama, wish, known)
        app = create_app(engine, alias or (file.stem,), embedding=info.embedding, context=context,
                         levels=known, control=control)
        hosts = frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if is_loopback(host) else None
        address = url(host, listener)
        run(Guard(app, hosts=hosts, api_key=api_key), engine, listener,
            ready=lambda: click.echo(f"{file.name} is served at {address} (Ctrl-C ends it)"))
