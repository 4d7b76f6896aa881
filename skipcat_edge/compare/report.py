"""The page: self-contained HTML, and the same main facts as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from skipcat_edge.compare.figures import DENSE, Comparison, Figures, Kind, Measured
from skipcat_edge.compare.plots import save_png, svg
from skipcat_edge.compare.verdict import findings, front_sentence, number, worth_having
from skipcat_edge.output import atomic_output

if TYPE_CHECKING:
    from rich.table import Table

PAGE = "report.html"


@dataclass(frozen=True)
class Column:
    title: str
    text: bool = False
    """Aligned left."""


@dataclass(frozen=True)
class Cell:
    text: str
    css: str = ""
    range: str = ""
    """The least and the greatest repetition, in small print."""


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write the page and a PNG for each picture to `folder`, replacing those that are there.

    Returns the page's path. Raises UserError on a failed write.
    """
    for axis in comparison.axes:
        save_png(comparison, axis, folder / f"{axis.key}.png")
    page = folder / PAGE
    with atomic_output(page, force=True) as partial:
        partial.write_text(html(comparison), encoding="utf-8")
    return page


def html(comparison: Comparison) -> str:
    """The whole page. What comes from the user is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(files(__package__).joinpath(PAGE).read_text("utf-8"))
    pictures = [{"title": f"{axis.title} and loss", "svg": Markup(svg(comparison, axis)),
                 "caption": front_sentence(comparison, axis)} for axis in comparison.axes]
    rows = [{"front": bool(comparison.on_fronts(each)), "cells": _cells(comparison, each)}
            for each in _by_size(comparison)]
    return template.render(
        model=comparison.model, count=f"{len(comparison.files)} files",
        worth_having=worth_having(comparison), findings=[*findings(comparison)], noise=_noise(comparison),
        pictures=pictures, columns=_columns(comparison), rows=rows, notes=comparison.notes,
        setting=comparison.setting or {}, kinds=[_css(kind) for kind in (*DENSE, Kind.LOW_RANK)],
    ) + "\n"


def _noise(comparison: Comparison) -> str:
    what = ("1 - the mean cosine between a file's sentence embeddings and the reference's"
            if comparison.embedding else
            "the KL divergence of a file's next-token distributions from the reference's, in nats per token")
    return (f"Loss is {what}. Two losses count as equal where they differ by no more than the standard error "
            "of their difference, and two speeds where one's median lies within the other's repetitions.")


def _by_size(comparison: Comparison) -> list[Figures]:
    return sorted(comparison.files, key=lambda each: (each.nbytes, each.loss))


def _css(kind: Kind) -> str:
    return kind.name.lower().replace("_", "-")


def _columns(comparison: Comparison) -> list[Column]:
    quality = ["lowest cosine"] if comparison.embedding else ["perplexity", "same top token"]
    decode = [] if comparison.embedding else ["decode tokens/s"]
    loss = "1 - cosine ± s.e." if comparison.embedding else "KL ± s.e."
    return [Column("file", True), Column("kind", True), Column("type", True), Column("ratio"), Column("size"),
            Column(loss), *map(Column, quality), Column("first token"), *map(Column, decode),
            Column("peak memory"), Column("on the front by", True)]


def _cells(comparison: Comparison, each: Figures) -> list[Cell]:
    from skipcat_edge.terminal import decimal_bytes

    quality = [Cell("-" if each.cosine_min is None else f"{each.cosine_min:.3f}")] if comparison.embedding \
        else [Cell("-" if each.ppl is None else f"{each.ppl:.3f}",
                   range="" if each.ppl_se is None else f"± {each.ppl_se:.3f}"),
              Cell("-" if each.top1 is None else f"{each.top1:.1%}")]
    decode = [] if each.decode is None else [_spread(each.decode, tokens_per_second)]
    return [
        Cell(each.file, "text file"), Cell(each.kind.value, f"text kind {_css(each.kind)}"),
        Cell(each.type, "text"), Cell(f"{each.ratio:.2g}"), Cell(decimal_bytes(each.nbytes), "size"),
        _loss(each), *quality, _spread(each.first_token, seconds), *decode,
        Cell("-" if each.peak_bytes is None else decimal_bytes(each.peak_bytes)),
        Cell(", ".join(axis.short for axis in comparison.on_fronts(each)), "text"),
    ]


def _loss(each: Figures) -> Cell:
    if each.kind is Kind.REFERENCE:
        return Cell("0")
    return Cell(number(each.loss), range=f"± {number(each.loss_se, 2)}")


def _spread(measured: Measured, shown: object) -> Cell:
    assert callable(shown)
    return Cell(shown(measured.value), range=f"{shown(measured.low)} to {shown(measured.high)}")


def seconds(value: float) -> str:
    """Of a time to first token."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.{2 if value < 0.01 else 1 if value < 0.1 else 0}f} ms"


def tokens_per_second(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 10 else 2}f}"


def terminal_table(comparison: Comparison) -> Table:
    """A line for each file, smallest first; * for each front that it is on."""
    from rich.markup import escape

    from skipcat_edge.terminal import decimal_bytes, new_table

    decode = [] if comparison.embedding else ["decode tokens/s"]
    loss = "1 - cosine" if comparison.embedding else "KL"
    table = new_table("file", "kind", "size", loss, "± s.e.", "first token", *decode, "on the front by",
                      left=2)
    table.columns[-1].justify = "left"
    for each in _by_size(comparison):
        speed = [] if each.decode is None else [tokens_per_second(each.decode.value)]
        fronts = ", ".join(axis.short for axis in comparison.on_fronts(each))
        table.add_row(escape(each.file), each.kind.value, decimal_bytes(each.nbytes), number(each.loss),
                      number(each.loss_se, 2), seconds(each.first_token.value), *speed, fronts)
    return table


def terminal_sentences(comparison: Comparison) -> Iterator[str]:
    """What the page says at its top."""
    yield worth_having(comparison)
    yield from findings(comparison)
    yield from comparison.notes
