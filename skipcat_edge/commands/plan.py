"""`skipcat-edge plan`: will it fit, and how fast will it be?"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from skipcat_edge.planner import Candidate, PlanResult


@click.command(short_help="Predict memory and speed of a model's possible files on a device.",
               epilog=example("plan meta-llama/Llama-3.2-1B --device rpi5 --min-speed 10 --max-ram 3GB"))
@click.argument("source")
@click.option("--device", default="host", show_default=True,
              help="Of those that `skipcat-edge devices` lists; host is this machine.")
@click.option("--context", type=click.IntRange(min=1),
              help="Tokens that a conversation may have.  [default: 4096, or what the model was trained for]")
@click.option("--prompt-tokens", default=512, show_default=True, type=click.IntRange(min=1),
              help="Tokens of a prompt.")
@click.option("--min-speed", type=click.FloatRange(0, min_open=True),
              help="Decoded tokens per second, at least.")
@click.option("--max-first-token", type=click.FloatRange(0, min_open=True),
              help="Seconds until the answer to a prompt begins, at most.")
@click.option("--max-ram", metavar="SIZE",
              help="Memory, at most.  [default: four fifths of the device's, of the largest that is sold]")
@click.option("--types", default="Q8_0,Q4_0", show_default=True,
              help="ggml types, with commas between them.")
@click.option("--ratios", default="0.9,0.8,0.6", show_default=True,
              help="Kept shares of the linear layers' parameters; dense files always join them.")
@click.option("--threads", type=click.IntRange(min=1),
              help="Of this machine.  [default: one for each physical core]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(source: str, device: str, context: int | None, prompt_tokens: int, min_speed: float | None,
            max_first_token: float | None, max_ram: str | None, types: str, ratios: str, threads: int | None,
            as_json: bool) -> None:
    """Say which files of SOURCE would suit a device: memory and speed, dense and low-rank.

    SOURCE is a Hugging Face directory, a hub id, a GGUF file, or a model that `synth` knows; only its config
    is read. On this machine some layers are timed for about twenty seconds; of other devices the preset says
    what is known. Quality is not predicted: candidates stand in the order in which models usually lose it.
    """
    from skipcat_edge.planner import plan
    from skipcat_edge.ranks import parse_ratios
    from skipcat_edge.sizes import parse_size
    from skipcat_edge.terminal import new_progress

    shares = parse_ratios(ratios)
    if threads is not None and device != "host":
        raise UserError("--threads is about this machine; leave it out for another device.")
    limit = None if max_ram is None else parse_size(max_ram)
    with new_progress() as progress:

        def begin(title: str, total: int) -> Callable[[], None]:
            task = progress.add_task(title, total=total)
            return lambda: progress.advance(task)

        result = plan(source, device=device, context=context, prompt_tokens=prompt_tokens,
                      min_speed=min_speed, max_first_token=max_first_token, max_ram=limit,
                      types=types.split(","), ratios=shares, threads=threads, begin=begin)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        _print(result)


def _print(result: PlanResult) -> None:
    from rich.markup import escape

    from skipcat_edge.terminal import decimal_bytes, new_table, stdout_console

    console = stdout_console()
    wishes = result.wishes
    limit = "" if result.max_ram is None else f", {decimal_bytes(result.max_ram)} of memory at most"
    if result.max_ram is not None and wishes.max_ram is None and result.device != "host":
        limit += " (of the largest that is sold; give --max-ram for yours)"
    console.print(escape(f"{result.source} on {result.device}: a context of {wishes.context:,} tokens, "
                         f"prompts of {wishes.prompt_tokens:,}{limit}"))
    console.print()
    left = [] if result.max_ram is None else [f"left of {decimal_bytes(result.max_ram)}"]
    least = [f"{result.device} with"] if _names_sizes(result) else []
    table = new_table("type", "ratio", "weights", "second copy", "KV cache", "rest", "memory", *left, *least,
                      "first token", "prompt tokens/s", "decode tokens/s", "at full context", "", left=1)
    for candidate in result.candidates:
        table.add_row(*_cells(candidate, result))
    table.columns[-1].justify = "left"
    console.print(table)
    console.print()
    for sentence in (result.reason, result.basis, *result.impossible):
        console.print(escape(sentence))
    best = result.recommended
    if best is not None and (os.path.isdir(result.source) or "/" in result.source):  # noqa: PTH112
        console.print()
        console.print(escape(
            f"skipcat-edge convert {result.source} -o OUT.gguf --ratio {best.ratio:g} --quant {best.type} "
            f"--head-quant {best.type} --calibration TEXT"))


def _names_sizes(result: PlanResult) -> bool:
    """This machine has the memory that it has."""
    return result.device != "host" and any(candidate.least_ram for candidate in result.candidates)


def _cells(candidate: Candidate, result: PlanResult) -> Iterator[str]:
    from skipcat_edge.terminal import decimal_bytes

    def number(value: float | None, digits: int, unit: str = "") -> str:
        return "-" if value is None else f"{value:.{digits}f}{unit}"

    memory = candidate.memory
    yield from (candidate.type, f"{candidate.ratio:g}", decimal_bytes(memory.weights),
                decimal_bytes(memory.repacked) if memory.repacked else "", decimal_bytes(memory.kv),
                decimal_bytes(memory.compute + memory.process), decimal_bytes(memory.peak))
    if result.max_ram is not None:
        yield "-" if memory.peak > result.max_ram else decimal_bytes(result.max_ram - memory.peak)
    if _names_sizes(result):
        yield "-" if candidate.least_ram is None else f"{candidate.least_ram / 2**30:g} GiB"
    yield from (number(candidate.first_token_s, 2, " s"), number(candidate.prompt_tps, 1),
                number(candidate.decode_tps, 1), number(candidate.decode_full_tps, 1))
    misses = ", ".join(f"misses {miss}" for miss in candidate.misses)
    yield "recommended" if candidate == result.recommended else misses
