"""Listening, and ending without leaving anybody waiting."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from skipcat_edge.errors import UserError
from skipcat_edge.serve.connection import Connection
from skipcat_edge.serve.engine import Engine

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_SECONDS_TO_LEAVE = 5


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port`, 0 for any free one. Raises UserError if they are not to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name of a host
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot listen at {host}, port {port}: {reason}; choose another --port or "
                        "--host.") from None
    return listener


def url(host: str, listener: socket.socket) -> str:
    """The address for a browser."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"


class _Server(uvicorn.Server):
    """A server that ends the answers under way when it is asked to end, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, engine: Engine, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine = engine
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.stop()
        super().handle_exit(sig, frame)


def configuration(app: ASGIApp) -> uvicorn.Config:
    """uvicorn's settings: quiet, and in pure Python, which needs no compiler anywhere."""
    config = uvicorn.Config(app, loop="asyncio", http=Connection, ws="none", lifespan="off",
                            log_level="error", access_log=False, server_header=False,
                            timeout_graceful_shutdown=_SECONDS_TO_LEAVE)
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    return config


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Not a traceback of a request that was still going on when the server ended."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def run(app: ASGIApp, engine: Engine, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve `app` until Ctrl-C or SIGTERM; `ready` is called when it answers."""
    try:
        _Server(configuration(app), engine, ready).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn passes it on after a clean end
        pass
    finally:
        engine.close()
