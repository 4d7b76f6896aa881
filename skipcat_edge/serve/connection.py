"""A connection that waits for its client, but not forever, and of which there are only so many."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 256
SECONDS_FOR_HEADERS = 10
SECONDS_FOR_BODY = 60
SECONDS_TO_READ = 60


class Connection(H11Protocol):
    """uvicorn's, which by itself waits as long as a client sends a byte now and then, or does not read its
    answer, and takes any number of clients: who does so on purpose would leave no connection to others."""

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _awaited: type | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(SECONDS_TO_READ, self._end)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        """Give the client its time for what it has to send next."""
        state = self.conn.their_state
        if state is self._awaited:
            return
        self._stop()
        seconds = {h11.IDLE: SECONDS_FOR_HEADERS, h11.SEND_BODY: SECONDS_FOR_BODY}.get(state)
        if seconds is not None:
            self._awaited, self._timer = state, self.loop.call_later(seconds, self._end)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._awaited = None

    def _end(self) -> None:
        # Between two requests uvicorn's own time counts, which is shorter.
        if not self.transport.is_closing():
            self.transport.abort()
