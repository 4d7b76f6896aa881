"""RPC: the layers of a model on two servers compute what they compute here, and a lost server is an error."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from command_line import run
from level_files import write_levels
from rpc_servers import ALIVE, MAIN, Relay, Server, free_port, hello_answer, impostor

from skipcat_edge import rpc
from skipcat_edge.runtime.pin import patches_dir
from skipcat_edge.runtime.source import stock_tree

pytestmark = pytest.mark.runtime

HELLO, SET_TENSOR = 14, 6  # ggml-rpc.cpp
GENERATE = ("-p", "Once upon a time", "-n", "40", "--threads", "1")


@pytest.fixture(scope="module")
def two() -> Iterator[str]:
    with Server() as first, Server() as second:
        yield f"{first.address},{second.address}"


@pytest.fixture(scope="module")
def leveled(tmp_path_factory: pytest.TempPathFactory, demo_dense_gguf: Path) -> Path:
    return write_levels(demo_dense_gguf, tmp_path_factory.mktemp("levels") / "levels.gguf")


def start(*arguments: object) -> subprocess.Popen[str]:
    """A command in a process of its own: servers belong to a process."""
    return subprocess.Popen([sys.executable, "-c", MAIN, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def output_of(*arguments: object) -> str:
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def test_factors_and_masks_on_two_servers(demo_low_rank_gguf: Path, two: str) -> None:
    here = output_of("generate", demo_low_rank_gguf, *GENERATE)
    assert len(here) > 80
    assert output_of("generate", demo_low_rank_gguf, *GENERATE, "--rpc", two) == here


def test_layers_are_on_both_servers(demo_low_rank_gguf: Path, two: str) -> None:
    found = output_of("bench", demo_low_rank_gguf, "--repetitions", 1, "--gen-tokens", 4, "--no-bandwidth",
                      "--json", "--rpc", two)
    sizes = {server: re.search(rf'"model RPC\d\[{re.escape(server)}\]": (\d+)', found)
             for server in two.split(",")}
    total = sum(int(size[1]) for size in sizes.values() if size)
    assert all(size and int(size[1]) > total // 10 for size in sizes.values()), found
    # all but the embeddings and the norms beside them
    assert total > 0.6 * demo_low_rank_gguf.stat().st_size


@pytest.mark.parametrize("options", [["--rank-level", "0.6"], ["--progressive", "0:0.8,8:0.6,20:0.8"]])
def test_levels_on_two_servers(leveled: Path, two: str, options: list[str]) -> None:
    here = output_of("generate", leveled, *GENERATE, *options)
    assert output_of("generate", leveled, *GENERATE, *options, "--rpc", two) == here


def test_perplexity_on_two_servers(demo_low_rank_gguf: Path, demo_dense_gguf: Path, two: str,
                                   tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a little girl. She had a red ball. " * 20)
    options = ("--text", text, "--window", 64, "--reference", demo_dense_gguf, "--no-cache", "--json")
    figures = [re.findall(r"[\d.]+", output_of("eval", demo_low_rank_gguf, *options, *more))
               for more in ([], ["--rpc", two])]
    assert len(figures[0]) >= 4
    assert [*map(float, figures[1])] == pytest.approx([*map(float, figures[0])], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("lost", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize(("number", "after"), [
    (signal.SIGKILL, 40), (signal.SIGKILL, 200), (signal.SIGKILL, 20_000),
    (signal.SIGSTOP, 200), (signal.SIGSTOP, 20_000),
])
def test_lost_server(
    demo_low_rank_gguf: Path, number: signal.Signals, after: int, lost: tuple[int, ...]
) -> None:
    """While it is asked what it has, while the model is loaded, and while it computes; a stopped one is as
    silent as one behind a broken switch, which may take several, and takes no connection."""
    with Server() as first, Server() as second, ExitStack() as connections:
        servers = [first, second]

        def lose(_: socket.socket) -> None:
            for each in lost:
                servers[each].send(number)
                if number == signal.SIGSTOP:
                    connections.enter_context(servers[each].full())

        relay = Relay(servers[lost[-1]].port, after, lose)
        addresses = [server.address for server in servers]
        addresses[lost[-1]] = relay.address
        client = start("generate", demo_low_rank_gguf, "--rpc", ",".join(addresses), "-p", "Once", "-n", 400)
        assert relay.done.wait(30)
        began = time.monotonic()
        out, err = client.communicate(timeout=30)
        assert time.monotonic() - began < 10
        assert len(out) < 400
        assert client.returncode == 1, err
        gone = "|".join(re.escape(addresses[each]) for each in lost)
        assert err.count("\n") == 1 and re.match(rf"Error: The RPC server ({gone}) was lost", err), err


def test_server_that_computes_for_long(demo_low_rank_gguf: Path) -> None:
    """Twelve seconds of nothing but signs of life, which is longer than a server may be silent."""
    def compute(client: socket.socket) -> None:
        for _ in range(6):
            time.sleep(2)
            client.sendall(ALIVE)

    here = output_of("generate", demo_low_rank_gguf, *GENERATE)
    with Server() as server:
        relay = Relay(server.port, 20_000, compute)
        assert output_of("generate", demo_low_rank_gguf, *GENERATE, "--rpc", relay.address) == here
        assert relay.done.is_set()


def test_server_that_takes_in_weights_for_long() -> None:
    """It says that it is alive while a tensor, which has no answer, is on its way."""
    with Server() as server, socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(struct.pack("<BQ24x", HELLO, 24))
        # recv of a socket with a time limit may return less
        stream = client.makefile("rb")
        answer = stream.read(8 + 28)
        assert answer[:9] == struct.pack("<QB", 28, rpc.PROTOCOL_MAJOR)
        client.sendall(bytes([SET_TENSOR]))
        assert stream.read(8) == ALIVE


def test_signs_of_life_are_told_from_a_response(tmp_path: Path) -> None:
    """A sender takes in signs of life and nothing else; a receiver leaves all to be read."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("neither g++ nor clang++ is installed")
    overlay = patches_dir() / "overlay" / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-rpc"
    ggml = stock_tree() / "vendor" / "llama.cpp" / "ggml"
    source = Path(__file__).parent / "cpp" / "signs_of_life.cpp"
    folders = [f"-I{folder}" for folder in (overlay, ggml / "include", ggml / "src")]
    # what the file does not call needs no ggml to be linked
    flags = ("-std=c++17", "-O1", "-pthread", "-ffunction-sections", "-Wl,--gc-sections")
    subprocess.run([compiler, *flags, *folders, source, "-o", tmp_path / "program"], check=True)
    run = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True)
    silence = "lost 0"
    sends = [silence, "again 0", "again 16", "lost 16"]
    receives = [silence, "again 16", "again 32", "again 16"]
    assert run.stdout.splitlines() == [*sends, *receives, "again 0", "5000", "less"]


def test_no_server(demo_low_rank_gguf: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    result = run("generate", demo_low_rank_gguf, *GENERATE, "--rpc", address)
    assert result.exit_code == 2
    assert result.stderr == (f"Error: The RPC server {address} cannot be reached (Connection refused); "
                             "start it there with `skipcat-edge rpc-server`.\n")


@pytest.mark.parametrize(("answer", "said"), [
    (hello_answer(7, 0, 0), "version 7.0.0 of the protocol, not 107.0"),
    (hello_answer(107, 1, 0), "version 107.1.0 of the protocol, not 107.0"),
    (b"\3\0\0\0\0\0\0\0\2\0\0", "version 2.0.0 of the protocol, not 107.0"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "another protocol, not 107.0"),
    (b"", "another protocol, not 107.0"),
])
def test_server_of_another_version(demo_low_rank_gguf: Path, answer: bytes, said: str) -> None:
    result = run("generate", demo_low_rank_gguf, *GENERATE, "--rpc", impostor(answer))
    assert result.exit_code == 2
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_busy_server(demo_low_rank_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "SILENCE_S", 0.5)
    with Server() as server, socket.create_connection(("127.0.0.1", server.port)):
        result = run("generate", demo_low_rank_gguf, *GENERATE, "--rpc", server.address)
        assert result.exit_code == 2
        assert "serves one client at a time" in result.stderr


@pytest.mark.parametrize("servers", ["", "nonsense", "host:", ":1", "host:0", "host:65536", "::1:1", "a:1,b"])
def test_addresses_that_are_none(demo_low_rank_gguf: Path, servers: str) -> None:
    result = run("generate", demo_low_rank_gguf, "--rpc", servers)
    assert result.exit_code == 2 and "HOST:PORT" in result.stderr


def test_server_stays_on_this_machine() -> None:
    result = run("rpc-server", "--host", "0.0.0.0")
    assert result.exit_code == 2 and "--trust-network" in result.stderr


def test_port_in_use(two: str) -> None:
    result = run("rpc-server", "--port", two.rpartition(":")[2])
    assert result.exit_code == 2 and "Address already in use" in result.stderr


def test_one_file_at_a_time(demo_low_rank_gguf: Path, demo_dense_gguf: Path, two: str) -> None:
    result = run("bench", demo_low_rank_gguf, demo_dense_gguf, "--rpc", two)
    assert result.exit_code == 2 and "one file after another" in result.stderr


def test_version_is_that_of_the_patches() -> None:
    patches = "".join(path.read_text("utf-8") for path in sorted((patches_dir() / "patches").glob("*.patch")))
    assert f"+#define RPC_PROTO_MAJOR_VERSION    {rpc.PROTOCOL_MAJOR}\n" in patches
    assert f" #define RPC_PROTO_MINOR_VERSION    {rpc.PROTOCOL_MINOR}\n" in patches
