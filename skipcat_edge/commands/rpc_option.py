"""The option that says which other machines compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


def rpc_option(command: _Command) -> _Command:
    """--rpc: endpoints, none by default, for `rpc.connect`."""
    def parse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...]:
        if value is None:
            return ()
        from skipcat_edge.rpc import parse_servers

        return parse_servers(value)

    return click.option(
        "--rpc", callback=parse, metavar="HOST:PORT,...",
        help="Spread the layers over these machines, where `skipcat-edge rpc-server` runs.",
    )(command)
