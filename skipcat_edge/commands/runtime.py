"""`skipcat-edge runtime`: build and check the patched llama-cpp-python."""

from __future__ import annotations

from pathlib import Path

import click

_SOURCE = click.option(
    "--source", type=click.Path(exists=True, path_type=Path), metavar="ARCHIVE_OR_DIR",
    help="The pinned source archive, instead of fetching it; needs no network.",
)


@click.group(name="runtime")
def command() -> None:
    """Build and check the patched llama-cpp-python."""


@command.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("dist"),
              show_default=True, help="Directory for the wheel.")
@click.option(
    "--source", type=click.Path(exists=True, path_type=Path), metavar="ARCHIVE_OR_DIR",
    help="The pinned source archive, or an unpacked tree (copied, never changed), instead of "
         "fetching it; needs no network.",
)
@click.option("--install/--no-install", default=False, help="Install the wheel into this environment.")
def build(out: Path, source: Path | None, install: bool) -> None:
    """Build the wheel of the patched llama-cpp-python."""
    from skipcat_edge.runtime.build import build_wheel, install_wheel

    wheel = build_wheel(out, source)
    click.echo(wheel)
    if install:
        install_wheel(wheel)
        click.echo("Installed; `skipcat-edge runtime check` shows it.")
    else:
        click.echo(f"To install it: pip install {wheel}", err=True)


@command.command()
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
        "RPC": "yes" if status.rpc else "no",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")
    if status.problem:
        click.echo(f"Not ready: {status.problem}; run `{BUILD_COMMAND}`.", err=True)
        ctx.exit(1)


@command.command("native-tools")
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


@command.command()
@_SOURCE
def source(source: Path | None) -> None:
    """Print the path of the unpacked stock source, fetching it if needed."""
    from skipcat_edge.runtime.source import stock_tree

    click.echo(stock_tree(source))
