"""The command line. Each command is one file in `commands/`, imported when it is used."""

from __future__ import annotations

from importlib import import_module

import click

from skipcat_edge import __version__

# Command -> one line of help. Kept here so that `--help` imports no command.
COMMANDS = {
    "convert": "Compress a Hugging Face model and write it as GGUF.",
    "plan": "Predict memory and speed of a model's possible files on a device.",
    "sweep": "Predict size and loss at many ratios and types.",
    "compare": "Build a model's files, measure them, and report which are worth having.",
    "inspect": "Show ranks, types, sizes and provenance of a GGUF file.",
    "generate": "Continue a text.",
    "chat": "Chat with a model.",
    "serve": "Serve a model to OpenAI clients and browsers.",
    "rpc-server": "Compute layers of a model that another machine runs.",
    "bench": "Measure prompt and decode speed, load time and memory.",
    "eval": "Measure perplexity, and how close a model is to its dense reference.",
    "push": "Upload GGUF files with their model cards to the Hugging Face hub.",
    "synth": "Write a random-weight model with the dimensions of a known one.",
    "devices": "Show known devices: cores, threads, memory, build settings.",
    "runtime": "Build and check the patched llama-cpp-python.",
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"skipcat_edge.commands.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skipcat-edge")
def main() -> None:
    """Make language models smaller and faster on a Raspberry Pi, a phone or any CPU."""
