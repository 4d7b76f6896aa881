"""The options that say at which of a file's levels a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from skipcat_edge.level_control import Wish
    from skipcat_edge.levels import Schedule

_Command = TypeVar("_Command", bound=Callable[..., Any])


def rank_level_option(*words: str, say: str = "") -> Callable[[_Command], _Command]:
    """--rank-level: None, a float, or one of `words`. `say` follows what its help says of levels."""
    def parse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | str | None:
        if value is None or value in words:
            return value
        from skipcat_edge.levels import parse_level

        try:
            return parse_level(value)
        except UserError as error:
            also = f" or {' or '.join(words)}" if words else ""
            raise UserError(f"--rank-level: {error.message.removesuffix('.')}{also}.") from None

    return click.option("--rank-level", "--level", callback=parse, metavar="|".join(["LEVEL", *words]),
                        help="Run at this level of a file that has several, named by its ratio."
                             f"{' ' if say else ''}{say}  [default: the full level]")


def progressive_option(_command: _Command) -> _Command:
    """--progressive: None or a Schedule."""
    def parse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Schedule | None:
        from skipcat_edge.levels import parse_schedule

        return None if value is None else parse_schedule(value)

    return click.option(
        "--progressive", callback=parse, metavar="TOKEN:LEVEL,...",
        help="Change the level while writing: 0:0.8,32:0.6 computes the first 32 tokens at level 0.8 and all "
             "others at 0.6. Tokens count from 0 after the prompt, which always has the full level.",
    )(_command)


def aim_options(command: _Command) -> _Command:
    """--rank-level with `auto`, --target-tps and --max-temp, for `wish_of`."""
    options = (
        rank_level_option("auto", say="`auto` turns it while writing, after prompts at the full level, as "
                                      "--target-tps and --max-temp want it."),
        click.option("--target-tps", type=click.FloatRange(min=0, min_open=True), metavar="N",
                     help="With --rank-level auto: the highest level that writes so many tokens per second."),
        click.option("--max-temp", type=click.FloatRange(1, 150), metavar="CELSIUS",
                     help="With --rank-level auto: lower levels while the CPU is hotter."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def dial_options(command: _Command) -> _Command:
    """The same and --progressive."""
    return aim_options(progressive_option(command))


def wish_of(rank_level: float | str | None, target_tps: float | None, max_temp: float | None,
            progressive: Schedule | None = None) -> Wish | None:
    """What the options together ask for. Raises UserError where they contradict each other."""
    aims = target_tps is not None or max_temp is not None
    if progressive is not None and (rank_level is not None or aims):
        raise UserError("--progressive sets the level of every token; leave out --rank-level.")
    if aims and rank_level != "auto":
        raise UserError("--target-tps and --max-temp are of --rank-level auto; add it.")
    if rank_level == "auto":
        if not aims:
            raise UserError("--rank-level auto has nothing to aim at; give --target-tps or --max-temp.")
        from skipcat_edge.level_control import Auto

        return Auto(target_tps, max_temp)
    assert not isinstance(rank_level, str)
    return progressive if progressive is not None else rank_level
