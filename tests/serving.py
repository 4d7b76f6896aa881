"""Servers for tests: the command in a process of its own, or one in this process that can be slowed down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
_MAIN = "from skipcat_edge.cli import main; main()"


@dataclass(frozen=True)
class Process:
    """`skipcat-edge serve` and its address."""

    url: str
    process: subprocess.Popen[str]


@contextmanager
def serving(file: Path, *options: object, environment: dict[str, str] | None = None) -> Iterator[Process]:
    """`skipcat-edge serve FILE OPTIONS` with one thread at a free port, killed at the end."""
    command = [sys.executable, "-c", _MAIN, "serve", file, "--port", 0, "--threads", 1, *options]
    process = subprocess.Popen([str(word) for word in command], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | (environment or {}))
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert " is served at " in line, line + process.stderr.read()
        yield Process(line.split(" is served at ")[1].split()[0], process)
    finally:
        process.kill()
        process.communicate()


def open_request(url: str, path: str, body: Any = None, headers: dict[str, str] | None = None,
                 timeout: float = 120) -> tuple[HTTPConnection, HTTPResponse]:
    """Send `body` as JSON, or GET where it is None; the caller closes the connection."""
    address = urlsplit(url)
    assert address.hostname is not None
    connection = HTTPConnection(address.hostname, address.port, timeout=timeout)
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
    connection.request(method, path, content, {"Content-Type": "application/json"} | (headers or {}))
    return connection, connection.getresponse()


def ask(url: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer that is no stream."""
    connection, response = open_request(url, path, body, headers)
    status, content = response.status, json.loads(response.read())
    connection.close()
    return status, content


def events(response: HTTPResponse) -> Iterator[Any]:
    """The objects of a stream, which must end as one should."""
    for line in response:
        if line.startswith(b"data: "):
            if line == b"data: [DONE]\n":
                return
            yield json.loads(line[6:])
    raise AssertionError("the stream ended without [DONE]")


def chat_body(text: str, **options: Any) -> dict[str, Any]:
    """A greedy chat of one message."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **options}


def chat(url: str, text: str, *, headers: dict[str, str] | None = None, **options: Any) -> str:
    """The greedy answer to `text`, streamed or not, which must be one."""
    connection, response = open_request(url, CHAT, chat_body(text, **options), headers)
    assert response.status == 200, response.read()
    if options.get("stream"):
        chunks = [event["choices"][0]["delta"] for event in events(response) if event["choices"]]
        answer = "".join(delta.get("content", "") for delta in chunks)
    else:
        answer = json.loads(response.read())["choices"][0]["message"]["content"]
    connection.close()
    return answer


@dataclass
class Local:
    """A server in this process, whose model can be watched and slowed down."""

    url: str = ""
    engine: Any = None
    delay: float = 0.0
    """Seconds that each token, and each batch of a prompt, takes longer."""
    begun: list[list[int]] = field(default_factory=list)
    """Prompts of the answers that were begun."""
    computed: list[int] = field(default_factory=list)
    """Tokens of each batch."""

    def watch(self, llama: Any) -> None:
        plain_decode, plain_generate = llama._ctx.decode, llama.generate

        def decode(batch: Any) -> None:
            time.sleep(self.delay)
            self.computed.append(batch.n_tokens())
            plain_decode(batch)

        def generate(tokens: Sequence[int], **options: Any) -> Iterator[int]:
            self.begun.append(list(tokens))
            return plain_generate(tokens, **options)

        llama._ctx.decode, llama.generate = decode, generate


@contextmanager
def local_server(file: Path, *, context: int = 512, api_key: str | None = None,
                 embedding: bool = False) -> Iterator[Local]:
    """Serve `file` by a thread of this process; `embedding`: as an embedding model, whatever it is."""
    import uvicorn

    from skipcat_edge.level_control import new_control
    from skipcat_edge.levels import file_levels
    from skipcat_edge.serve.app import create_app
    from skipcat_edge.serve.engine import Engine
    from skipcat_edge.serve.guard import Guard
    from skipcat_edge.serve.model import open_served
    from skipcat_edge.serve.server import configuration, listen, url
    from skipcat_edge.session import model_info

    local = Local()
    info = model_info(file)
    if embedding:
        info = replace(info, embedding=True)
    llama = open_served(file, info, context, 1)
    local.watch(llama)
    local.engine = Engine(llama)
    levels = file_levels(file)
    control = new_control(llama, levels[-1], levels) if len(levels) > 1 else None
    app = create_app(local.engine, ["local"], embedding=info.embedding, context=context, levels=levels,
                     control=control)
    with listen("127.0.0.1", 0) as listener:
        local.url = url("127.0.0.1", listener)
        server = uvicorn.Server(configuration(Guard(app, hosts=frozenset({"127.0.0.1"}), api_key=api_key)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield local
        finally:
            local.delay = 0
            local.engine.stop()
            server.should_exit = True
            thread.join()
            local.engine.close()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.005)
