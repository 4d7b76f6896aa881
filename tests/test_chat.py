"""`chat` as a person uses it: long messages, commands, a system prompt, and Ctrl-C in a terminal."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run

from skipcat_edge import chat_input
from skipcat_edge.chat_input import Message, read_message
from skipcat_edge.conversation import Conversation, Turn
from skipcat_edge.generation import Sampling


@pytest.mark.parametrize("typed, message", [
    (["hello  "], "hello"),
    (["one \\", "two\\", "three", "next"], "one \ntwo\nthree"),
    (["never ends \\"], "never ends"),
    (['"""one', "", "  two", 'three"""', "next"], "one\n\n  two\nthree"),
    (['"""', "def f():", "    return 1", '"""'], "def f():\n    return 1"),
    (['"""all in one line"""'], "all in one line"),
    (['"""never closed', "at all"], "never closed\nat all"),
    ([], None),
])  # fmt: skip
def test_messages_of_several_lines(typed: list[str], message: str | None) -> None:
    lines = iter(typed)
    read = read_message(lambda prompt: next(lines, None))
    assert read == (None if message is None else Message(message))


@pytest.mark.parametrize("typed, command", [
    (["/exit"], True), (["/system Be brief."], True), (['"""// a comment', '"""'], False),
    (["/a \\", "b"], False),
])  # fmt: skip
def test_only_a_line_that_was_not_quoted_is_a_command(typed: list[str], command: bool) -> None:
    lines = iter(typed)
    read = read_message(lambda prompt: next(lines, None))
    assert read is not None and read.command == command


class _Model:
    """A model without a template that is only asked for its metadata."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}


def test_the_system_prompt_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(_Model(), context=64, max_tokens=8, sampling=Sampling(), system="Be brief.")
    assert conversation._format([Turn("hello", "")]) == "Be brief.\nhello"
    seen: list[list[dict[str, str]]] = []

    class Template:
        def render(self, messages: list[dict[str, str]]) -> str:
            seen.append(messages)
            return ""

    conversation._template = Template()
    conversation._format([Turn("hello", "hi"), Turn("and", "")])
    assert [(each["role"], each["content"]) for each in seen[0]] == [
        ("system", "Be brief."), ("user", "hello"), ("assistant", "hi"), ("user", "and")]


@pytest.mark.runtime
def test_commands_and_speed(demo_dense_gguf: Path) -> None:
    def chat(*lines: str, options: tuple[object, ...] = ()) -> tuple[list[str], str]:
        result = run("chat", demo_dense_gguf, "-n", 6, "--temp", 0, "--threads", 1, *options,
                     stdin="\n".join(lines))
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines(), result.stderr

    first = "Once upon a time"
    replies, notes = chat(first, "/clear", first, "/wrong", "/help")
    assert len(replies) == 2 and replies[0] == replies[1]  # nothing was remembered
    speed = r"^\(\d+ prompt tokens in .*; 6 tokens in .* \([\d.]+ tokens/s\)"
    assert len(re.findall(speed, notes, re.MULTILINE)) == 2
    assert "There is no /wrong" in notes and "/system TEXT" in notes
    told, _ = chat(first, "/system The little dog.", first)
    assert told[1] == chat(first, options=("--system", "The little dog."))[0][0] != told[0]


# `chat` with a model that never ends and takes its time.
_SLOW = """
import time
import llama_cpp
from skipcat_edge import generation
from skipcat_edge.cli import main

llama_cpp.llama_vocab_is_eog = lambda *_: False
piece = generation.piece
generation.piece = lambda *a, **k: (time.sleep(0.01), piece(*a, **k))[1]
main()
"""


@pytest.mark.runtime
def test_ctrl_c_stops_the_reply_and_not_the_program(demo_dense_gguf: Path) -> None:
    options = ["-n", "100000", "--context", "2048", "--temp", "1", "--threads", "1"]
    with subprocess.Popen([sys.executable, "-u", "-c", _SLOW, "chat", demo_dense_gguf, *options],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"Once upon a time\n")
        process.stdin.flush()
        assert process.stdout.read(8)  # the reply has begun
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"The dog\n")
        process.stdin.flush()
        assert process.stderr.readline().rstrip().endswith(b"; interrupted)")
        assert process.stdout.read(8)  # of the second reply
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().rstrip().endswith(b"; interrupted)")
        time.sleep(0.2)  # it waits for a message
        process.send_signal(signal.SIGINT)
        assert not process.stderr.readline().strip()
        assert b"Ctrl-D leaves" in process.stderr.readline()
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=60) == 0


# The command with a model whose nodes say that they are computed, and take their time.
_SLOW_NODES = """
import sys
import time
import llama_cpp
from skipcat_edge.cli import main

callback = llama_cpp.ggml_abort_callback
tell = lambda: (print("node", file=sys.stderr, flush=True), time.sleep(0.02))
llama_cpp.ggml_abort_callback = lambda *ask: callback(*(lambda data: (tell(), f(data))[1] for f in ask))
main()
"""


@pytest.mark.runtime
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_ctrl_c_does_not_wait_for_the_prompt(demo_dense_gguf: Path, command: str) -> None:
    prompt, options = "the dog and " * 100, ["--temp", "0", "-n", "8", "--threads", "1"]
    arguments = [command, str(demo_dense_gguf), *options, *(["-p", prompt] if command == "generate" else [])]
    with subprocess.Popen([sys.executable, "-u", "-c", _SLOW_NODES, *arguments], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stderr is not None
        if command == "chat":
            process.stdin.write(f"{prompt}\n")
            process.stdin.flush()
        while (line := process.stderr.readline()) != "node\n":
            assert line
        process.send_signal(signal.SIGINT)
        nodes = 1
        while (line := process.stderr.readline()) == "node\n":
            nodes += 1
        assert nodes < 60  # of 107
        assert line.startswith(("(" if command == "chat" else "") + "interrupted after ")
        replies, notes = process.communicate("The dog\n" if command == "chat" else None)
        assert process.returncode == (0 if command == "chat" else 1)
        assert "Exception ignored" not in notes
    if command == "chat":
        assert replies == f"\n{run('chat', demo_dense_gguf, *options, stdin='The dog').stdout}"


def test_lines_of_earlier_chats_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setattr(chat_input, "_history_file", lambda: tmp_path / "chat_history")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: readline.add_history("typed before") or "typed before")
    readline.clear_history()
    assert chat_input.line_reader()("> ") == "typed before"
    readline.clear_history()
    chat_input.line_reader()
    assert readline.get_history_item(1) == "typed before"
