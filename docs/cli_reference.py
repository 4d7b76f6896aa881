"""Writes docs/cli.md from the commands' own help: `make docs`. With --check, fails where it is another."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from skipcat_edge.cli import main

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100


def helps(command: click.Command, name: str,
          parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """(name, help) of `command` and of all below it."""
    with click.Context(command, info_name=name, parent=parent, max_content_width=WIDTH, terminal_width=WIDTH,
                       **command.context_settings) as context:
        yield context.command_path, command.get_help(context)
        if isinstance(command, click.Group):
            for below in command.list_commands(context):
                found = command.get_command(context, below)
                assert found is not None
                yield from helps(found, below, context)


def page() -> str:
    parts = ["# The command line", "Made by `make docs` from each command's `--help`."]
    for name, text in helps(main, "skipcat-edge"):
        parts += [f"## {name}", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        raise SystemExit("docs/cli.md is not what the commands' --help says; run make docs.")
