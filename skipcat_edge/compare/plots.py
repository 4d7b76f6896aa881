"""The pictures: loss against size, time to first token and decode speed."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.compare.figures import DECODE, SIZE, Axis, Comparison, Figures, Kind
from skipcat_edge.compare.labels import Box, place
from skipcat_edge.compare.request import shortened
from skipcat_edge.output import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = 10.0, 5.625  # inches: a slide's proportions
_DPI = 160
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.95, 0.3, 1.2, 0.72  # inches around the axes
_MARKER = 9.0  # points
_LABEL = 9.5  # font size
_MANY = 26
"""More points than this, and only those of the front have labels."""
_SHOWN_LOSS = 1e-7
"""No point lies below: a logarithm has no zero."""

INK, PAPER, FAINT = "#1b1d22", "#fefefe", "#d8dbe0"
STYLES = {
    Kind.PLAIN: ("#0072b2", "o"),
    Kind.FEEDBACK: ("#009e73", "D"),
    Kind.LOW_RANK: ("#d55e00", "^"),
    Kind.OTHER: ("#b0569a", "s"),
}
THEMED = {INK: "--ink", PAPER: "--paper", FAINT: "--faint",
          **{colour: f"--{kind.name.lower().replace('_', '-')}" for kind, (colour, _) in STYLES.items()}}
"""Colours that the page's style may change, for dark screens."""

# Wide fonts only: room was made with the first one's widths.
_FONTS = ["DejaVu Sans", "Verdana", "Arial", "Helvetica"]


def save_png(comparison: Comparison, axis: Axis, out: Path) -> None:
    """Write the picture to `out`, replacing it. Raises UserError on a failed write."""
    with _style(), atomic_output(out, force=True) as partial:
        draw(comparison, axis).savefig(partial, format="png", dpi=_DPI)


def svg(comparison: Comparison, axis: Axis) -> str:
    """The picture as an element of a page: text is text, colours are the page's."""
    out = io.StringIO()
    with _style():
        draw(comparison, axis).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _as_element(out.getvalue(), axis)


def _as_element(document: str, axis: Axis) -> str:
    element = re.sub(r"<metadata>.*?</metadata>", "", document[document.index("<svg"):], flags=re.DOTALL)
    # several pictures on one page must not share ids
    element = re.sub(r'\bid="', f'id="{axis.key}-', element)
    element = re.sub(r'(href="#|url\(#)', rf"\g<1>{axis.key}-", element)
    for colour, name in THEMED.items():
        element = element.replace(colour, f"var({name})")
    return element.replace("<svg ", f'<svg role="img" aria-label="{axis.title} and loss" ', 1)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    chosen: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "skipcat-edge", "font.family": ["sans-serif"],
        "font.sans-serif": _FONTS, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
        "xtick.color": INK, "ytick.color": INK, "text.parse_math": False, "axes.unicode_minus": False,
    }
    with mpl.rc_context(chosen), warnings.catch_warnings():
        # a file's name may have letters that the font has not
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def draw(comparison: Comparison, axis: Axis) -> Figure:
    """One picture: a marker for each file but the reference, which is a line, as its loss is 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = _SIZE
    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, (width - _LEFT - _RIGHT) / width,
                            (height - _TOP - _BOTTOM) / height), facecolor=PAPER)
    files = [each for each in comparison.files if each.kind is not Kind.REFERENCE]
    front = comparison.front(axis)
    _set_limits(axes, comparison, axis, files)
    _mark_reference(axes, comparison, axis)
    steps = _steps(axes, axis, front)
    if steps:
        axes.plot(*zip(*steps, strict=True), color=INK, linewidth=1.4, zorder=2, alpha=0.75)
    for each in files:
        _draw_point(axes, axis, each, each in front)
    _finish(figure, axes, comparison, axis)
    _label_points(figure, axes, axis, files, front, steps)
    return figure


def _x(axis: Axis, figures: Figures) -> float:
    """In the unit of the picture: MB, ms or tokens/s."""
    found = axis.value(figures)
    assert found is not None
    return found.value * _factor(axis)


def _y(figures: Figures) -> float:
    return max(figures.loss, _SHOWN_LOSS)


def _factor(axis: Axis) -> float:
    return 1e-6 if axis is SIZE else 1.0 if axis is DECODE else 1e3


def _set_limits(axes: Axes, comparison: Comparison, axis: Axis, files: Sequence[Figures]) -> None:
    xs = [_x(axis, each) for each in comparison.files]
    room = 0.09 * (max(xs) - min(xs)) or 0.1 * max(xs)
    axes.set_xlim(min(xs) - room, max(xs) + room)
    ys = [math.log10(_y(each)) for each in files] or [-3.0]
    above = 0.1 * (max(ys) - min(ys)) or 0.5
    axes.set_yscale("log")
    axes.set_ylim(10 ** (min(ys) - 1.3 * above), 10 ** (max(ys) + 1.3 * above))


def _mark_reference(axes: Axes, comparison: Comparison, axis: Axis) -> None:
    x = _x(axis, comparison.reference)
    low, high = axes.get_xlim()
    axes.axvline(x, color=INK, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    place_of = (x - low) / (high - low)
    side = "right" if place_of > 0.8 else "left" if place_of < 0.2 else "center"
    axes.annotate(f"{comparison.reference.type} reference, loss 0", (x, 1), (0, 5),
                  xycoords=axes.get_xaxis_transform(), textcoords="offset points", ha=side, va="bottom",
                  fontsize=_LABEL, color=INK)


def _steps(axes: Axes, axis: Axis, front: Sequence[Figures]) -> list[tuple[float, float]]:
    """Corners of the least loss for at most so many bytes or seconds, or for at least so much speed: from
    the top, where nothing is as small or as fast, to the reference, which loses nothing."""
    points = [(_x(axis, each), _y(each)) for each in front if each.kind is not Kind.REFERENCE]
    if not points:
        return []
    bottom, top = axes.get_ylim()
    corners = [(points[0][0], top), points[0]]
    for x, y in points[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    ends = [_x(axis, each) for each in front if each.kind is Kind.REFERENCE]
    if ends:
        return [*corners, (ends[0], corners[-1][1]), (ends[0], bottom)]
    return [*corners, (axes.get_xlim()[axis.less_is_better], corners[-1][1])]


def _bars(axis: Axis, figures: Figures) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """From the least to the greatest repetition, and a standard error up and down."""
    spread, x, y, factor = axis.value(figures), _x(axis, figures), _y(figures), _factor(axis)
    assert spread is not None
    if axis is not SIZE:
        yield (spread.low * factor, y), (spread.high * factor, y)
    yield (x, max(y - figures.loss_se, _SHOWN_LOSS)), (x, y + figures.loss_se)


def _draw_point(axes: Axes, axis: Axis, figures: Figures, on_front: bool) -> None:
    colour, marker = STYLES[figures.kind]
    for bar in _bars(axis, figures):
        axes.plot(*zip(*bar, strict=True), color=colour, linewidth=1, alpha=0.45, zorder=3)
    axes.plot([_x(axis, figures)], [_y(figures)], marker, color=colour, markersize=_MARKER,
              markeredgewidth=1.6, zorder=4, markerfacecolor=colour if on_front else PAPER)


def _finish(figure: Figure, axes: Axes, comparison: Comparison, axis: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color=FAINT, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(_log_ticks(*axes.get_ylim()))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    units = {"size": "file size in MB", "first-token": "time to first token in ms",
             "decode": "decoded tokens per second"}
    axes.set_xlabel(units[axis.key], fontsize=11)
    axes.set_ylabel(comparison.loss_name + ("" if comparison.embedding else ", nats per token"), fontsize=11)
    width, height = _SIZE
    left = _LEFT / width
    better = "lower and further left" if axis.less_is_better else "lower and further right"
    title = f"{axis.title} and loss, {shortened(comparison.model)}"
    figure.text(left, 1 - 0.32 / height, title, fontsize=14, fontweight="bold", va="center")
    figure.text(1 - _RIGHT / width, 1 - 0.32 / height, f"{better} is better", fontsize=10, va="center",
                ha="right")
    figure.legend(handles=_legend(comparison), loc="upper left", bbox_to_anchor=(left, 1 - 0.5 / height),
                  ncols=6, frameon=False, fontsize=9.5, borderaxespad=0, borderpad=0, handletextpad=0.4,
                  handlelength=1.4, columnspacing=1.5)


def _legend(comparison: Comparison) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    for kind, (colour, marker) in STYLES.items():
        if comparison.of(kind):
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=_MARKER,
                                  markeredgewidth=1.6, label=kind.value))
    handles.append(Line2D([], [], color=INK, linewidth=1.4, alpha=0.75, label="Pareto front"))
    handles.append(Line2D([], [], color=INK, marker="o", linestyle="none", markersize=_MARKER,
                          markerfacecolor=PAPER, markeredgewidth=1.6, label="not on it"))
    return handles


def _log_ticks(low: float, high: float) -> Any:
    """Round numbers, more of them where there are few powers of ten."""
    from matplotlib.ticker import FixedLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    subs = (1,) if span > 3 else (1, 3) if span > 1.5 else (1, 2, 5) if span > 0.6 else (
        1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    ticks = sorted(sub * 10.0**decade for decade in decades for sub in subs)
    return FixedLocator([tick for tick in ticks if low <= tick <= high])


def _plain(value: float) -> str:
    """0.0001, and below that 1e-5."""
    if value < 1e-4:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.5f}".rstrip("0").rstrip(".")


def _label_points(figure: Figure, axes: Axes, axis: Axis, files: Sequence[Figures], front: Sequence[Figures],
                  steps: Sequence[tuple[float, float]]) -> None:
    """Those of the front choose their places first; `steps` and bars are better not covered."""
    from matplotlib.text import Text

    def pixels(x: float, y: float) -> tuple[float, float]:
        found = axes.transData.transform((x, y))
        return float(found[0]), float(found[1])

    scale = _DPI / 72
    named = sorted(files, key=lambda each: each not in front)
    if len(files) > _MANY:
        named = [each for each in named if each in front]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    sizes = []
    for each in named:
        measured = Text(0, 0, each.label, fontsize=_LABEL, figure=figure)
        extent = measured.get_window_extent(renderer)
        sizes.append((extent.width + 4 * scale, extent.height + 2 * scale))
    anchors = [pixels(_x(axis, each), _y(each)) for each in named]
    half = (_MARKER / 2 + 1) * scale
    points = [pixels(_x(axis, each), _y(each)) for each in files]
    obstacles = [Box(x - half, y - half, x + half, y + half) for x, y in points]
    window = axes.get_window_extent(renderer)
    frame = Box(window.x0 + scale, window.y0 + scale, window.x1 + (_RIGHT - 0.05) * _DPI, window.y1 - scale)
    segments = [(*one, *other) for one, other in pairwise(pixels(*corner) for corner in steps)]
    for each in files:
        segments += [(*pixels(*one), *pixels(*other)) for one, other in _bars(axis, each)]
    places = place(anchors, sizes, obstacles, frame, segments, scale)
    for each, anchor, box in zip(named, anchors, places, strict=True):
        if box is not None:
            _write_label(figure, each, anchor, box, scale)


def _write_label(figure: Figure, figures: Figures, anchor: tuple[float, float], box: Box,
                 scale: float) -> None:
    from matplotlib.lines import Line2D

    width, height = figure.bbox.width, figure.bbox.height
    colour = STYLES[figures.kind][0]
    figure.text((box.x0 + box.x1) / 2 / width, (box.y0 + box.y1) / 2 / height, figures.label,
                fontsize=_LABEL, color=colour, ha="center", va="center")
    x, y = box.nearest(*anchor)
    if math.dist((x, y), anchor) > 13 * scale:  # else it is plain whose label it is
        figure.add_artist(Line2D([anchor[0] / width, x / width], [anchor[1] / height, y / height],
                                 color=colour, linewidth=0.7, alpha=0.6))
