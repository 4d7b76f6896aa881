"""`skipcat-edge compare`: one model in many files, on one page."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skipcat_edge.commands.convert import METHODS
from skipcat_edge.commands.examples import example
from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from skipcat_edge.compare.request import Request

_ARGUMENTS = "skipcat_edge.arguments"
_RATIOS, _TYPES = "0.9,0.8,0.6", "F16,Q8_0,Q4_0"
_CALIB_TOKENS = 8_192  # every file that is fitted reads them again


class _KeepsArguments(click.Command):
    """A command that knows what was typed: the report shows it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)


@click.command(cls=_KeepsArguments,
               short_help="Build a model's files, measure them, and report which are worth having.",
               epilog=example("compare ./Llama-3.2-1B -o comparison --calibration text.txt --text other.txt"))
@click.argument("source")
@click.option("-o", "--output", "folder", required=True, type=click.Path(path_type=Path),
              help="Folder for the files, the report and the pictures.")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 text to measure on.")
@click.option("--calibration", type=click.Path(path_type=Path),
              help="Another text, that shows which inputs matter; needed where files are built.")
@click.option("--ratios", help="Kept shares of the linear layers' parameters, for the low-rank files.  "
                               f"[default: {_RATIOS}]")
@click.option("--types", help=f"ggml types of the linear layers.  [default: {_TYPES}]")
@click.option("--file", "files", multiple=True, type=click.Path(path_type=Path),
              help="A GGUF file that is there already, to be measured too; may be given several times.")
@click.option("--method", default="auto", show_default=True, type=click.Choice(METHODS),
              help="Of the low-rank files, as in convert.")
@click.option("--calib-tokens", type=click.IntRange(1, 65_536),
              help="Most tokens of --calibration to read, of which convert takes more.  "
                   f"[default: {_CALIB_TOKENS:,}]")
@click.option("--max-tokens", default=8192, show_default=True, type=click.IntRange(min=1),
              help="Tokens of --text to measure the loss on.")
@click.option("--window", default=256, show_default=True, type=click.IntRange(min=2),
              help="Tokens of a window, BOS included.")
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(min=1),
              help="Tokens of the prompt whose first answer is waited for.")
@click.option("--gen-tokens", default=64, show_default=True, type=click.IntRange(min=1),
              help="Tokens decoded one by one.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(min=1),
              help="Of the speed's measurement.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@click.option("--base", type=click.Path(path_type=Path),
              help="Dense GGUF of the same model, instead of converting it here.")
@click.option("--runtime-source", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Pinned llama-cpp-python archive, whose converter is used.  [default: fetch it]")
@click.option("--force", is_flag=True, help="Start over, whatever the folder holds.")
@click.pass_context
def command(
    ctx: click.Context, source: str, folder: Path, text: Path, calibration: Path | None, ratios: str | None,
    types: str | None, files: tuple[Path, ...], method: str, calib_tokens: int | None, max_tokens: int,
    window: int, prompt_tokens: int, gen_tokens: int, repetitions: int, threads: int | None,
    base: Path | None, runtime_source: Path | None, force: bool,
) -> None:
    """Build files of SOURCE at several ratios and types, measure them, and report which are worth having.

    SOURCE is a Hugging Face directory or hub id. For each type there is a plain quantisation, as
    llama-quantize makes it, a dense file with error feedback, and low-rank files. All are compared with
    the dense file, and take turns where speed is measured. SOURCE may also be a dense GGUF file: then
    nothing is built, and the files of --file are compared with it.

    The folder gets report.html, which needs nothing else, and a PNG of each picture. Ctrl-C interrupts;
    the same command goes on where it stopped, and one with other options does only what they change.
    """
    from skipcat_edge.compare.measure import read_text
    from skipcat_edge.compare.request import Request, parse_ratios, parse_types
    from skipcat_edge.extra import require_packages
    from skipcat_edge.session import default_threads

    require_packages("The report needs", "compare", "matplotlib", "jinja2")
    read_text(text)
    common = Request(
        source=Path(source), source_name=source, folder=folder, text=text, calibration=None,
        files=tuple({path.resolve(): path for path in files}.values()), max_tokens=max_tokens, window=window,
        prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, repetitions=repetitions,
        threads=threads or default_threads(),
        command=" ".join(["skipcat-edge compare", *map(_shown, ctx.meta[_ARGUMENTS])]),
    )
    if Path(source).is_file():
        built = {"--calibration": calibration, "--ratios": ratios, "--types": types, "--base": base,
                 "--calib-tokens": calib_tokens}
        request = _of_gguf(common, next((name for name, value in built.items() if value is not None), None))
    else:
        from dataclasses import replace

        from skipcat_edge.extra import require_converter
        from skipcat_edge.gguf_file import open_gguf

        if calibration is None:
            raise UserError("Files are made with a calibration text; pass --calibration FILE, another one "
                            "than --text.")
        read_text(calibration)
        request = replace(
            common, calibration=calibration, ratios=parse_ratios(_RATIOS if ratios is None else ratios),
            types=parse_types(_TYPES if types is None else types), method=method,
            calib_tokens=calib_tokens or _CALIB_TOKENS, base=base, runtime_source=runtime_source)
        require_converter()
        if base is not None:
            open_gguf(base)
        from skipcat_converter.source_model import resolve_source

        request = replace(request, source=resolve_source(source))
    _run(request, force)


def _shown(argument: str) -> str:
    """As a shell reads it, without the name of the user's home, as the report may be passed on."""
    from skipcat_edge.compare.request import printable

    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    home = os.environ.get("HOME", "").rstrip("/") + "/"
    if len(home) > 1 and value.startswith(home):
        value = f'"$HOME"/{shlex.quote(printable(value.removeprefix(home)))}'
        return f"{name}{equals}{value}"
    return shlex.quote(printable(argument))


def _of_gguf(request: Request, needless: str | None) -> Request:
    """`request`, whose source is a file; `needless`: an option that is only for building.

    Raises UserError unless that is a dense GGUF, and there are files to compare with it.
    """
    from skipcat_edge.inspection import inspect

    if inspect(request.source).owners:
        raise UserError(f"{request.source} is low-rank; give the dense file that the others were made from, "
                        "and this one with --file.")
    if needless is not None:
        raise UserError(f"{request.source} is GGUF, of which nothing is built: leave out {needless}, or give "
                        "the Hugging Face directory.")
    if not request.files:
        raise UserError(f"{request.source} has nothing to be compared with; name files with --file.")
    return request


def _run(request: Request, force: bool) -> None:
    from rich.markup import escape

    from skipcat_edge.compare.job import run
    from skipcat_edge.compare.report import terminal_sentences, terminal_table, write_report
    from skipcat_edge.terminal import stdout_console

    if any(path.resolve() == request.reference.resolve() for path in request.files):
        raise UserError(f"{request.reference} is what the others are compared with; leave it out of --file.")
    try:
        comparison = run(request, force)
        page = write_report(comparison, request.folder)
    except KeyboardInterrupt:
        which = "the same command without --force" if force else "the same command"
        click.echo(f"Interrupted; {which} goes on where it stopped.", err=True)
        raise SystemExit(130) from None
    console = stdout_console()
    console.print(terminal_table(comparison))
    console.print()
    for sentence in terminal_sentences(comparison):
        console.print(escape(sentence))
    console.print()
    console.print(escape(str(page)))
