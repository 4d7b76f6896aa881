"""The command line as a whole: help, lazy imports, errors in one sentence."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from skipcat_edge import __version__
from skipcat_edge.cli import COMMANDS, main

HEAVY = ("torch", "transformers", "llama_cpp", "gguf", "numpy", "rich")


def modules_after(statements: str) -> set[str]:
    """The modules of HEAVY that a fresh Python has loaded after `statements`."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert set(COMMANDS) <= listed


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout.split()[-1]) == (0, __version__)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"Usage: main {name}" in result.stdout


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


def test_every_command_has_an_example_that_it_understands() -> None:
    found = dict(commands(main))
    assert len(found) > len(COMMANDS)
    for path, command in found.items():
        with click.Context(command) as context:
            text = command.get_help(context)
        program, *words = shlex.split(text.partition("Example:\n")[2])
        assert program == "skipcat-edge" and tuple(words[: len(path)]) == path, path
        if not isinstance(command, click.Group):
            command.make_context(path[-1], words[len(path):])  # raises where an option or argument is wrong


def test_help_loads_nothing_heavy() -> None:
    show_help = "from skipcat_edge.cli import main\nmain(['--help'], standalone_mode=False)"
    assert modules_after("import skipcat_edge.cli") == set()
    assert modules_after(show_help) == set()


@pytest.mark.parametrize("name", ["inspect", "generate", "chat", "bench", "eval"])
def test_importing_a_device_command_loads_nothing_heavy(name: str) -> None:
    assert modules_after(f"import skipcat_edge.commands.{name}") == set()


def test_what_the_device_commands_use_never_loads_torch() -> None:
    modules = "benchmark bench_worker conversation embedding_eval generation inspection perplexity session"
    imports = "; ".join(f"import skipcat_edge.{module}" for module in modules.split())
    assert modules_after(imports).isdisjoint({"torch", "transformers", "llama_cpp"})


def test_unknown_command() -> None:
    result = CliRunner().invoke(main, ["frobnicate"])
    assert result.exit_code == 2
    assert "frobnicate" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{file}"],
        ["generate", "{file}", "-p", "x", "-n", "1"],
        ["chat", "{file}"],
        ["bench", "{file}"],
        ["eval", "{file}", "--text", "{file}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_file_that_is_no_model(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a model\n")
    result = CliRunner().invoke(main, [argument.format(file=path) for argument in arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"Error: {path} is not a GGUF file; write one with `skipcat-edge convert`.\n"
