"""RPC servers on this machine, and a way to them that listens in."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType

MAIN = "from skipcat_edge.cli import main; main()"
ALIVE = b"\xff" * 8


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`skipcat-edge rpc-server` in a process of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "rpc-server", "--port", str(self.port), "--threads", "1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        self._wait()

    def _wait(self) -> None:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            time.sleep(0.1)
        raise TimeoutError(self.address)

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        os.kill(self.process.pid, number)

    @contextmanager
    def full(self) -> Iterator[None]:
        """As many connections as a server takes that accepts none: further ones wait."""
        with ExitStack() as connections:
            for _ in range(100):
                try:
                    connection = socket.create_connection(("127.0.0.1", self.port), timeout=0.2)
                except TimeoutError:
                    break
                connections.enter_context(connection)
            else:
                raise AssertionError("no end of connections")
            yield

    def __enter__(self) -> Server:
        return self

    def __exit__(self, _type: type[BaseException] | None, _value: BaseException | None,
                 _traceback: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()


class Relay:
    """Passes messages between clients and the server at `port`; calls `then`, with the client's end, once the
    server has sent `after` bytes, and passes on the last message when it returns."""

    def __init__(self, port: int, after: int, then: Callable[[socket.socket], object]) -> None:
        self._server, self._after, self._then = ("127.0.0.1", port), after, then
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.done = threading.Event()
        """`then` was called."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with suppress(ConnectionRefusedError, ConnectionResetError):
                server = socket.create_connection(self._server)
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for pass_on in (self._pass_requests, self._pass_answers):
                    threading.Thread(target=pass_on, args=(client, server), daemon=True).start()
                continue
            client.close()

    def _pass_requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        _end(client, server)

    def _pass_answers(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while size := _exactly(server, 8):
                message = size + (b"" if size == ALIVE else _exactly(server, *struct.unpack("<Q", size)))
                self._count(len(message), client)
                client.sendall(message)
        _end(client, server)

    def _count(self, size: int, client: socket.socket) -> None:
        with self._lock:
            self._after -= size
            if self._after <= 0 and not self.done.is_set():
                self._then(client)
                self.done.set()


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := source.recv(size - len(data))):
        data += more
    return data


def _end(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def impostor(answer: bytes) -> str:
    """The address of a server that answers a hello with `answer`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer_all() -> None:
        while True:
            client, _ = listener.accept()
            client.recv(64)
            client.sendall(answer)
            client.close()

    threading.Thread(target=answer_all, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def hello_answer(major: int, minor: int, patch: int) -> bytes:
    """What a server of this version of the protocol answers."""
    return struct.pack("<QBBBx24x", 28, major, minor, patch)
