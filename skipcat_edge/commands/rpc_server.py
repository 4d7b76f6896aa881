"""`skipcat-edge rpc-server`: compute for a model that another machine runs."""

from __future__ import annotations

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.errors import UserError


@click.command("rpc-server", short_help="Compute layers of a model that another machine runs.",
               epilog=example("rpc-server --host 192.168.1.7 --trust-network"))
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen at; one that other machines reach needs --trust-network.")
@click.option("--port", default=50052, show_default=True, type=click.IntRange(1, 65535))
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@click.option("--trust-network", is_flag=True,
              help="Listen at an address that other machines reach. Whoever reaches it can do what they like "
                   "to this process, and so with this account.")
def command(host: str, port: int, threads: int | None, trust_network: bool) -> None:
    """Lend this machine's CPU and memory to `generate`, `chat`, `serve`, `bench` or `eval` with --rpc
    elsewhere.

    The client sends the weights; no file is needed here. One client is served at a time. The protocol is
    llama.cpp's: it has no password and no encryption, and its server was not written for hostile clients.
    Use it only in a network of your own. Ctrl-C ends it.
    """
    from skipcat_edge.rpc import is_loopback, serve
    from skipcat_edge.session import default_threads

    if not is_loopback(host):
        if not trust_network:
            raise UserError(f"{host} can be reached by other machines, and the protocol knows no password; "
                            "add --trust-network if you trust all of them.")
        click.echo(f"Warning: whoever reaches {host}, port {port}, controls this process.", err=True)
    click.echo(f"Computing for clients of {host}:{port} (Ctrl-C ends it)", err=True)
    serve(host, port, threads or default_threads())
