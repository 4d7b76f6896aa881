"""Other machines that compute: servers of llama.cpp's RPC backend, for a model too large for one device.

They belong to the process: once connected, each model that is opened after it has all its layers on them, in
shares of their free memory.
"""

from __future__ import annotations

import atexit
import ctypes
import ipaddress
import re
import signal
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from skipcat_edge.errors import UserError

DEFAULT_PORT = 50052
# ggml-rpc.h of the patched source. A stock server has a major version of 7, and none of our ops.
PROTOCOL_MAJOR, PROTOCOL_MINOR = 107, 0
# The bound of skipcat-servers.h, for the first answer too.
SILENCE_S = 5.0

_HELLO = 14
_CAPABILITIES = 24  # bytes; zeros are TCP
_DEVICE_TYPE_CPU = 0
_LOST = re.compile(r"the RPC server (\S+) was lost")

_connected: list[str] = []
_models: WeakSet[Any] = WeakSet()


class LostServerError(UserError):
    """A server that answers no more; whatever it held is gone."""

    exit_code = 1


def parse_servers(text: str) -> tuple[str, ...]:
    """The endpoints in `HOST:PORT,HOST:PORT`. Raises UserError for anything else."""
    servers = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or ":" in host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"{server!r} is no address of an RPC server; write HOST:PORT, for example "
                            f"192.168.1.7:{DEFAULT_PORT}.")
    if not servers:
        raise UserError("--rpc names no server; write HOST:PORT, several with commas.")
    return servers


def connect(servers: Sequence[str]) -> None:
    """Let all models that this process opens from now on be computed by `servers`, as HOST:PORT.

    Raises UserError for one that is not there, is busy, is no server of this runtime, or where the runtime
    has no RPC backend.
    """
    from skipcat_edge.session import import_llama_cpp

    new = [server for server in servers if server not in _connected]
    for server in new:
        check_server(server)
    import_llama_cpp()
    add_server = _function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
    for server in new:
        registered = add_server(server.encode())
        if not registered:
            raise _lost(server)
        _ggml().ggml_backend_register(registered)
        _connected.append(server)


def connected() -> tuple[str, ...]:
    """The servers of this process."""
    return tuple(_connected)


def close_at_exit(llama: Any) -> None:
    """Let `llama`, a llama_cpp.Llama on servers, go before Python ends.

    It talks with them while it is freed, in a thread that logs through Python, which would wait for ever for
    a Python that ends.
    """
    if not _models:
        atexit.register(_close_models)
    _models.add(llama)


def _close_models() -> None:
    for llama in list(_models):
        llama.close()


def lost_server(reason: str) -> LostServerError | None:
    """The error for what llama.cpp said, if it said that a server is lost."""
    found = _LOST.search(reason)
    return None if found is None else _lost(found[1])


def check_server(server: str) -> None:
    """Say hello to `server`, HOST:PORT. Raises UserError unless it is one of this runtime and has time."""
    host, _, port = server.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=SILENCE_S) as connection:
            connection.sendall(struct.pack("<BQ", _HELLO, _CAPABILITIES) + bytes(_CAPABILITIES))
            answer = _receive(connection, 8 + 4 + _CAPABILITIES)
    except TimeoutError:
        raise UserError(f"The RPC server {server} does not answer; it serves one client at a time, so end "
                        "the other one, or start it again.") from None
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name of a host
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The RPC server {server} cannot be reached ({reason}); start it there with "
                        "`skipcat-edge rpc-server`.") from None
    size, major, minor, patch = struct.unpack_from("<QBBB", answer.ljust(12, b"\0"))
    if size != 4 + _CAPABILITIES or major != PROTOCOL_MAJOR or minor > PROTOCOL_MINOR:
        said = f"version {major}.{minor}.{patch} of the protocol" if 3 <= size <= 64 else "another protocol"
        raise UserError(f"The RPC server {server} speaks {said}, not {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}: "
                        "a stock or older one; start the `skipcat-edge rpc-server` of this version there.")


def serve(host: str, port: int, threads: int) -> None:
    """Compute on this machine's CPU for one client after another, until a signal ends the process.

    Whoever reaches `host` and `port` can crash this process and more: the protocol knows no password. Raises
    UserError if they are not to be had.
    """
    from skipcat_edge.session import import_llama_cpp

    try:
        address = socket.gethostbyname(host)  # the library knows numbers of version 4 only
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot listen at {host}, port {port}: {reason}; choose another --port or "
                        "--host.") from None
    import_llama_cpp()
    start = _function("ggml_backend_rpc_start_server", None, ctypes.c_char_p, ctypes.c_char_p,
                      ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))
    devices = (ctypes.c_void_p * 1)(_ggml().ggml_backend_dev_by_type(_DEVICE_TYPE_CPU))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the library never comes back to Python's handler
    start(f"{address}:{port}".encode(), None, threads, 1, devices)
    raise UserError(f"The RPC server at {address}:{port} has ended; see what it said above.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def _lost(server: str) -> LostServerError:
    return LostServerError(f"The RPC server {server} was lost: it ended, or gave no sign of life for "
                           f"{SILENCE_S:g} s; start it again, then this command.")


def _receive(connection: socket.socket, size: int) -> bytes:
    """Up to `size` bytes: less where the other side ends."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
        # an older server's answer is shorter, and nothing follows it
        if len(data) >= 8 and len(data) >= 8 + struct.unpack_from("<Q", data)[0]:
            break
    return data


def _ggml() -> ctypes.CDLL:
    from skipcat_edge.runtime.library import load_library

    library = load_library("ggml")
    library.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    library.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
    library.ggml_backend_register.restype = None
    library.ggml_backend_register.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    library.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
    return library


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the RPC backend, which may be a library of its own."""
    import llama_cpp

    from skipcat_edge.runtime.check import BUILD_COMMAND
    from skipcat_edge.runtime.library import load_library

    # loads the backends that are libraries of their own
    if not llama_cpp.llama_supports_rpc():
        raise UserError(f"llama_cpp {llama_cpp.__version__} has no RPC backend; run `{BUILD_COMMAND}`.")
    base = load_library("ggml-base")
    base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    base.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    address = base.ggml_backend_reg_get_proc_address(_ggml().ggml_backend_reg_by_name(b"RPC"), name.encode())
    return ctypes.CFUNCTYPE(result, *arguments)(address)
