"""`skipcat-edge runtime`: build and check the patched llama-cpp-python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from skipcat_edge.runtime.selftest import Outcome

_SOURCE = click.option(
    "--source", type=click.Path(exists=True, path_type=Path), metavar="ARCHIVE_OR_DIR",
    help="The pinned source archive, instead of fetching it; needs no network.",
)


@click.group(name="runtime", epilog=example("runtime build --install"))
def command() -> None:
    """Build and check the patched llama-cpp-python."""


@command.command(epilog=example("runtime build --device rpi5"))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("dist"),
              show_default=True, help="Directory for the wheel.")
@click.option(
    "--source", type=click.Path(exists=True, path_type=Path), metavar="ARCHIVE_OR_DIR",
    help="The pinned source archive, or an unpacked tree (copied, never changed), instead of "
         "fetching it; needs no network.",
)
@click.option("--device", help="Build for this device (`skipcat-edge devices` lists them) and all others of "
                               "its architecture, instead of for this very machine.")
@click.option("--install/--no-install", default=False, help="Install the wheel into this environment.")
def build(out: Path, source: Path | None, device: str | None, install: bool) -> None:
    """Build the wheel of the patched llama-cpp-python."""
    from skipcat_edge.runtime.build import build_wheel, install_wheel

    target = None
    if device is not None:
        from skipcat_edge.device import load_device
        from skipcat_edge.runtime.target import Target

        preset = load_device(device)
        if preset.build.android:
            raise UserError(f"{preset.title} runs no wheel for glibc; build its programs with "
                            f"`skipcat-edge runtime phone --device {device}`.")
        target = Target(preset.architecture)
        if install and not target.is_this_machine:
            raise UserError(f"A wheel for {target.architecture} cannot be installed on this machine; leave "
                            "out --install, and copy the wheel to the device.")
    wheel = build_wheel(out, source, target)
    click.echo(wheel)
    if install:
        install_wheel(wheel)
        click.echo("Installed; `skipcat-edge runtime check` shows it.")
    else:
        here = target is None or target.is_this_machine
        click.echo(f"To install it: {'' if here else 'copy it to the device, and there '}pip install "
                   f"{wheel if here else wheel.name}", err=True)


@command.command(epilog=example("runtime check"))
@click.pass_context
def check(ctx: click.Context) -> None:
    """Show which llama_cpp is imported; exit with 1 if it is not the patched one."""
    from skipcat_edge.runtime.check import BUILD_COMMAND, runtime_status

    status = runtime_status()
    rows = {
        "llama_cpp": status.path or "-",
        "version": status.version or "-",
        "wanted": status.wanted,
        "patched": status.patched or "no",
        "format versions": "none" if status.format_version is None
        else ", ".join(map(str, range(1, status.format_version + 1))),
        "CPU features": " ".join(status.cpu_features) or "-",
        "CPU variant": status.cpu_variant or "only one",
        "RPC": "yes" if status.rpc else "no",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")
    if status.problem:
        click.echo(f"Not ready: {status.problem}; run `{BUILD_COMMAND}`.", err=True)
        ctx.exit(1)


@command.command(epilog=example("runtime selftest"))
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@click.option("--json", "as_json", is_flag=True, help="Print a list with one object per model.")
@click.pass_context
def selftest(ctx: click.Context, threads: int | None, as_json: bool) -> None:
    """Compare what this build computes with stored logits; exit with 1 if it differs.

    Tiny models that are installed with skipcat-edge, one for each type, run a prompt in one batch and
    some of its tokens one by one. Errors are relative, of the worst token; "allowed" is twice what
    llama.cpp's rounding makes of them. "tokens" counts greedy next tokens that are right, of those
    with a clear lead.
    """
    from skipcat_edge.runtime.selftest import ADVICE
    from skipcat_edge.runtime.selftest import selftest as run
    from skipcat_edge.session import default_threads

    outcomes = run(threads or default_threads())
    if as_json:
        click.echo(json.dumps([outcome.to_json() for outcome in outcomes], indent=2))
    else:
        _print_outcomes(outcomes)
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    if problems:
        for line in (*problems, ADVICE):
            click.echo(line, err=True)
        ctx.exit(1)


def _print_outcomes(outcomes: list[Outcome]) -> None:
    from skipcat_edge.terminal import new_table, stdout_console

    def number(error: float | None) -> str:
        return "-" if error is None else f"{error:.4f}"

    table = new_table("type", "forms", "prompt error", "decode error", "allowed", "tokens", "verdict", left=2)
    for outcome in outcomes:
        table.add_row(
            outcome.model, ", ".join(outcome.forms), number(outcome.prompt_error),
            number(outcome.decode_error), f"{outcome.tolerance:g}", f"{outcome.tokens_ok}/{outcome.tokens}",
            "FAILED" if outcome.problem else "ok",
        )
    stdout_console().print(table)


@command.command("native-tools", epilog=example("runtime native-tools"))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("build/native"),
              show_default=True, help="The programs go to OUT/stock/bin and OUT/patched/bin.")
@click.option("--stock", "kind", flag_value="stock", help="The stock programs only.")
@click.option("--patched", "kind", flag_value="patched", help="The patched programs only.")
@_SOURCE
def native_tools(out: Path, kind: str | None, source: Path | None) -> None:
    """Build llama-bench, llama-perplexity and llama-quantize, stock and patched."""
    from skipcat_edge.runtime.native_tools import KINDS, build_native_tools

    for directory in build_native_tools(out, [kind] if kind else KINDS, source):
        click.echo(directory)


@command.command(epilog=example("runtime phone --device pixel-8"))
@click.option("--device", "name", required=True, metavar="NAME",
              help="What to build for (`skipcat-edge devices` lists them).")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where the programs go.  [default: build/phone/NAME]")
@_SOURCE
def phone(name: str, out: Path | None, source: Path | None) -> None:
    """Build llama-completion, llama-bench and llama-perplexity for a phone: static, without the NDK.

    They run from the phone's /data/local/tmp, where `adb push` puts them; `skipcat-edge bench --adb` does
    so itself.
    """
    from skipcat_edge.adb import phone_device, record_march, tools_folder
    from skipcat_edge.runtime.native_tools import build_phone_tools
    from skipcat_edge.runtime.target import Target

    device = phone_device(name)
    tools = build_phone_tools(out or tools_folder(device), Target(device.architecture), device.build.march,
                              source)
    record_march(tools, device.build.march)
    click.echo(tools)


@command.command(epilog=example("runtime source"))
@_SOURCE
def source(source: Path | None) -> None:
    """Print the path of the unpacked stock source, fetching it if needed."""
    from skipcat_edge.runtime.source import stock_tree

    click.echo(stock_tree(source))
