"""Who may use the server: by address, origin and API key, before anything of a request is read."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from skipcat_edge.serve.errors import JSON, RequestError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_LARGEST_BODY = 16 * 2**20
# Of all requests under way, each of which waits in memory for its turn.
_LARGEST_BODIES = 128 * 2**20


class Guard:
    """An application that lets through to `app` only what is allowed."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str] | None, api_key: str | None) -> None:
        """`hosts`: names by which it may be reached, None for any; `api_key`: of all below /v1."""
        self._app = app
        self._hosts = hosts
        self._authorization = f"Bearer {api_key}".encode() if api_key else None
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
            await JSON(refusal.body(), refusal.status, headers)(scope, receive, send)
            return
        length = _length(scope)  # what does not POST is not read
        self._held += length
        try:
            await self._app(scope, receive, send)
        finally:
            self._held -= length

    def _refusal(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        # A name that someone else lets point to this machine: DNS rebinding.
        if self._hosts is not None and _name(host) not in self._hosts:
            return RequestError(421, "This server answers only to its own address; it was started without "
                                     "another --host.")
        # A page of another site, whose requests a browser sends without asking.
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return RequestError(403, "Pages of other origins may not use this server.")
        if scope["path"].startswith("/v1/") and self._authorization is not None and not hmac.compare_digest(
            headers.get("authorization", "").encode("latin-1"), self._authorization
        ):
            return RequestError(401, "The API key is missing or wrong; send `Authorization: Bearer KEY`.")
        if scope["method"] == "POST":
            length = headers.get("content-length")
            if length is None or "transfer-encoding" in headers:  # h11 believes the latter
                return RequestError(411, "The request does not say how long it is; send Content-Length.")
            if int(length) > _LARGEST_BODY:  # h11 has seen that it is a number
                return RequestError(413, f"The request is longer than {_LARGEST_BODY} bytes; shorten it.")
            if self._held + int(length) > _LARGEST_BODIES:
                return RequestError(503, "Requests of other clients fill the memory that they have; ask "
                                         "again later.")
        return None


def _length(scope: Scope) -> int:
    """Bytes of the request's body."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return 0
    return int(Headers(scope=scope)["content-length"])


def _name(host: str) -> str:
    """A Host header without its port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower()
