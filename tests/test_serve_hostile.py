"""Clients of `serve` that mean harm: they are refused or cut off, and others get their answers."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import CHAT, COMPLETIONS, MODELS, Local, ask, chat_body, local_server, open_request, wait_until

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("llama_cpp", reason="the runtime is not installed")

from skipcat_edge.serve import connection, guard

pytestmark = pytest.mark.runtime

KEY = {"Authorization": "Bearer secret"}
PATIENCE = 0.5


@pytest.fixture(scope="module")
def server(demo_dense_gguf: Path) -> Iterator[Local]:
    with local_server(demo_dense_gguf, api_key="secret") as local:
        yield local


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SECONDS_FOR_HEADERS", PATIENCE)
    monkeypatch.setattr(connection, "SECONDS_FOR_BODY", PATIENCE)


def connect(server: Local, content: bytes = b"") -> socket.socket:
    address = urlsplit(server.url)
    assert address.hostname is not None and address.port is not None
    client = socket.create_connection((address.hostname, address.port), timeout=20)
    client.sendall(content)
    return client


def head(server: Local, method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {urlsplit(server.url).netloc}", *headers, "",
                        ""]).encode("latin-1")


def is_cut_off(client: socket.socket, seconds: float, trickle: bytes = b"x") -> bool:
    """Whether the server ends the connection within `seconds`, in which a byte is sent now and then."""
    client.settimeout(0.05)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if not client.recv(4096):
                return True
        except TimeoutError:
            pass
        except OSError:
            return True
        try:
            client.sendall(trickle)
        except OSError:
            return True
    return False


def assert_alive(server: Local) -> None:
    assert ask(server.url, MODELS, headers=KEY)[0] == 200


SLOW = {
    "nothing": (None, b""), "half a line": (b"GET / HT", b"x"),
    "headers": (b"GET / HTTP/1.1\r\n", b"a: b\r\n"),
    "body": ("POST", b" "), "refused body": ("POST without key", b" "),
}


def slow_client(server: Local, begin: Any) -> socket.socket:
    if isinstance(begin, str):
        key = [] if "without" in begin else ["Authorization: Bearer secret"]
        begin = head(server, "POST", CHAT, "Content-Length: 1000000", "Content-Type: application/json", *key)
    return connect(server, begin or b"")


@pytest.mark.parametrize("begin, trickle", SLOW.values(), ids=SLOW)
def test_a_slow_client_waits_where_nobody_counts(begin: Any, trickle: bytes, server: Local) -> None:
    with slow_client(server, begin) as client:
        assert not is_cut_off(client, 3 * PATIENCE, trickle)


@pytest.mark.parametrize("begin, trickle", SLOW.values(), ids=SLOW)
def test_a_slow_client_is_cut_off(begin: Any, trickle: bytes, server: Local, impatient: None,
                                  capfd: pytest.CaptureFixture[str]) -> None:
    with slow_client(server, begin) as client:
        assert is_cut_off(client, 20, trickle)
    assert_alive(server)
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_does_not_read(server: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SECONDS_TO_READ", PATIENCE)
    ask_for_the_page = head(server, "GET", "/")
    with connect(server) as client:
        client.settimeout(5)  # not cut off, it would wait for the server to read on
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(100_000):
                client.sendall(ask_for_the_page)
    assert_alive(server)


def test_a_long_answer_is_not(server: Local, impatient: None) -> None:
    server.delay = 4 * PATIENCE / 8
    status, content = ask(server.url, COMPLETIONS, {"prompt": "Once", "max_tokens": 8, "temperature": 0}, KEY)
    server.delay = 0
    assert status == 200 and content["usage"]["completion_tokens"] == 8


def test_two_requests_on_one_connection(server: Local, impatient: None) -> None:
    http, response = open_request(server.url, MODELS, headers=KEY)
    response.read()
    time.sleep(2 * PATIENCE)
    http.request("GET", MODELS, headers=KEY)
    assert http.getresponse().status == 200
    http.close()


def test_connections_beyond_the_most_are_refused(server: Local, monkeypatch: pytest.MonkeyPatch,
                                                 impatient: None) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 8)
    monkeypatch.setattr(connection, "SECONDS_FOR_HEADERS", 2)
    clients = [connect(server) for _ in range(30)]
    ended = sum(is_cut_off(client, 0.2, b"") for client in clients[8:])
    assert ended >= 20
    for client in clients:
        client.close()
    wait_until(lambda: _answers(server), "an answer after the crowd")


def _answers(server: Local) -> bool:
    try:
        return ask(server.url, MODELS, headers=KEY)[0] == 200
    except OSError:
        return False


def test_bodies_have_a_largest_sum(server: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_LARGEST_BODIES", 10_000)
    begin = head(server, "POST", CHAT, "Content-Length: 9000", "Content-Type: application/json",
                 "Authorization: Bearer secret")
    long = chat_body("x" * 2000, max_tokens=1)
    with connect(server, begin):
        wait_until(lambda: ask(server.url, CHAT, long, KEY)[0] == 503, "a refusal")
    wait_until(lambda: ask(server.url, CHAT, chat_body("x", max_tokens=1), KEY)[0] == 200, "an answer")


@pytest.mark.parametrize("path", [
    "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page.html",
    "/static/..%2f..%2fapp.py",
    "/v1/../../etc/passwd", "/docs", "/openapi.json", "/%00", "/v1/models/%0d%0aX-Mine:%20yes",
])
def test_no_file_is_served(path: str, server: Local) -> None:
    request = head(server, "GET", path, "Connection: close", "Authorization: Bearer secret")
    with connect(server, request) as client:
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 404 ") and b"root:" not in answer and b"X-Mine" not in answer


@pytest.mark.parametrize("content", [
    b"\x00" * 100, b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", b"GET " + b"/" * 200_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"a: " + b"b" * 200_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000,
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
])
def test_what_is_no_request(content: bytes, server: Local, capfd: pytest.CaptureFixture[str]) -> None:
    with connect(server) as client:
        try:
            client.sendall(content)
            answer = client.recv(4096)
        except OSError:  # cut off while it still sent
            answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert_alive(server)
    assert "Traceback" not in capfd.readouterr().err


def test_noise(server: Local, capfd: pytest.CaptureFixture[str]) -> None:
    noise = random.Random(0)
    for _ in range(50):
        with connect(server, head(server, "POST", CHAT, *KEY_HEADER)[: noise.randrange(20, 120)]) as client:
            client.sendall(noise.randbytes(noise.randrange(200)))
    assert_alive(server)
    assert "Traceback" not in capfd.readouterr().err


KEY_HEADER = ("Authorization: Bearer secret", "Content-Length: 100", "Content-Type: application/json")


@pytest.mark.parametrize("change, part", [
    ({"n": 10**30}, "n"), ({"stop": ["x"] * 10_000}, "stop at"), ({"max_tokens": -1}, "max_tokens"),
    ({"response_format": {"type": "json_object", "schema": {"enum": ["x" * 20] * 10_000}}}, "schema"),
    ({"response_format": {"type": "json_object", "schema": {"$ref": "https://localhost:1/a"}}}, "schema"),
])
def test_requests_that_ask_too_much(change: dict[str, Any], part: str, server: Local) -> None:
    start = time.monotonic()
    status, content = ask(server.url, CHAT, chat_body("hello") | change, KEY)
    assert status == 400 and part in content["error"]["message"]
    assert time.monotonic() - start < 30
    assert_alive(server)


def test_more_tokens_than_there_are(server: Local) -> None:
    status, content = ask(server.url, COMPLETIONS, {"prompt": "Once", "max_tokens": 10**30}, KEY)
    assert status in (200, 400), content
    assert_alive(server)
