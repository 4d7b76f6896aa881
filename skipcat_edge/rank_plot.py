"""A picture of a file's ranks: a heat map of what each layer of each block keeps."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge import format as fmt
from skipcat_edge.errors import UserError
from skipcat_edge.extra import require_packages
from skipcat_edge.inspection import Inspection, full_level
from skipcat_edge.output import atomic_output, check_output

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg", "jpg", "jpeg", "webp", "tif", "tiff", "ps", "eps")
"""What a name may end in: matplotlib's formats that need no other program and are pictures."""

_DPI = 150
_MEMBERS = tuple(member for members in fmt.GROUPS.values() for member in members)  # from top to bottom

# Inches.
_LEFT, _RIGHT, _TOP, _BOTTOM = 1.2, 1.3, 0.85, 1.05
_EDGE = 0.3  # on the right without a colour bar
_CELL_HEIGHT = 0.5
_MOST_CELL_WIDTH, _LEAST_WIDTH, _MOST_WIDTH = 0.85, 5.5, 13.5  # of a cell; of all cells together
_GAP = 0.03  # between cells that share nothing
_PADDING, _LONG_PADDING = 0.07, 0.12  # of the text in cells, both sides together
_CORNER = 0.11  # legs of the triangle that marks Skip, in cells that are wide enough

_POINT = 1 / 72
_FONT_SIZES, _LONG_FONT_SIZES = (10.0, 9.0, 8.0, 7.0), (10.0, 9.0)  # of the text in cells
_DIGIT_WIDTH = 0.64  # of DejaVu Sans, matplotlib's own font, by its size
_BOLD_WIDTH = 0.72  # the same for letters in bold
_LINE = 1.4  # height of a line of text, by its size
_MARK = 9  # points, of a mark in the legend
_DENSE_COLOUR = "#d4d4d4"


@dataclass(frozen=True)
class Cell:
    """One owner or dense layer, as it is drawn."""

    block: int
    members: tuple[str, ...]
    """The layers that it stores, more than one where they share a projection."""
    rank: int | None
    """None for a dense layer."""
    full_rank: int
    """The rank that would lose nothing: min(m, n)."""
    kept: float
    """Stored parameters over those of the dense layers; 1 for a dense layer."""
    skip: bool

    def label(self, long: bool) -> str:
        """The text in it: `dense`, or the rank, as a share of the full one if `long`."""
        if self.rank is None:
            return "dense"
        return f"{self.rank}/{self.full_rank}" if long else str(self.rank)


def cells(inspection: Inspection) -> list[Cell]:
    """What is drawn of `inspection`, its full level, by block and from top to bottom."""
    owners, dense_layers = full_level(inspection)
    found = [_cell(stages) for stages in _stages(owners)]
    found += [
        Cell(dense.layer, (dense.name,), None, min(dense.m, dense.n), 1.0, False)
        for dense in dense_layers
    ]
    return sorted(found, key=lambda cell: (cell.block, _order(cell.members[0])))


_Part = tuple[fmt.Owner, tuple[fmt.Member, ...]]
"""An owner and those of its members that a cell is about."""


def _stages(owners: Sequence[fmt.Owner]) -> list[list[_Part]]:
    """What each cell adds up: owners of the same members, or, where a shared and an own projection add up,
    each member's part of them."""
    shared: dict[tuple[int, frozenset[str]], list[fmt.Owner]] = {}
    for owner in owners:
        shared.setdefault((owner.layer, frozenset(member.name for member in owner.members)), []).append(owner)
    seen = Counter((layer, name) for layer, names in shared for name in names)
    whole = [[(owner, owner.members) for owner in group] for (layer, names), group in shared.items()
             if all(seen[layer, name] == 1 for name in names)]
    split: dict[tuple[int, str], list[_Part]] = {}
    for (layer, names), group in shared.items():
        if any(seen[layer, name] > 1 for name in names):
            for owner in group:
                for member in owner.members:
                    split.setdefault((layer, member.name), []).append((owner, (member,)))
    return [*whole, *split.values()]


def _cell(parts: Sequence[_Part]) -> Cell:
    (first, members), m = parts[0], sum(member.m for member in parts[0][1])
    stored = sum(owner.parameters * m / owner.m for owner, _ in parts)
    return Cell(first.layer, tuple(sorted((member.name for member in members), key=_order)),
                sum(owner.rank for owner, _ in parts), min(m, first.n), stored / (m * first.n),
                any(owner.skip for owner, _ in parts))


def _order(member: str) -> tuple[int, str]:
    """Where `member`'s row belongs; layers of no group, which the format allows, come last."""
    return _MEMBERS.index(member) if member in _MEMBERS else len(_MEMBERS), member


def check_plot(out: Path, force: bool) -> None:
    """Raise UserError if matplotlib is missing, or `out` cannot be written as a picture."""
    require_packages("Plotting needs", "plot", "matplotlib")
    _format_of(out)
    check_output(out, force)


def save_plot(inspection: Inspection, out: Path, force: bool) -> None:
    """Write the picture of `inspection` in the format that `out` ends in.

    Raises UserError as `check_plot`, if there is nothing to draw, or on a failed write.
    """
    check_plot(out, force)
    figure = draw(inspection)
    with atomic_output(out, force) as partial, warnings.catch_warnings():
        # A file's name may have letters that the font has not; they become boxes.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(partial, format=_format_of(out), dpi=_DPI)


def _format_of(out: Path) -> str:
    ending = out.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise UserError(f"{out} does not end in a picture format; use one of .{', .'.join(FORMATS)}.")
    return ending


def draw(inspection: Inspection) -> Figure:
    """The heat map: rows are layers, columns blocks, colours the share of parameters kept.

    Raises UserError if the file has no linear layer that low rank could compress.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = cells(inspection)
    if not drawn:
        raise UserError(f"{inspection.file} has no linear layers in blocks, so there are no ranks to plot.")
    members = sorted({name for cell in drawn for name in cell.members}, key=_order)
    # Only blocks that are there: a damaged file may number them in billions.
    blocks = sorted({cell.block for cell in drawn})
    width = min(max(len(blocks) * _MOST_CELL_WIDTH, _LEAST_WIDTH), _MOST_WIDTH)
    height = len(members) * _CELL_HEIGHT
    right = _RIGHT if inspection.owners else _EDGE
    size = width + _LEFT + right, height + _TOP + _BOTTOM

    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((_LEFT / size[0], _BOTTOM / size[1], width / size[0], height / size[1]))
    colours = colormaps["viridis"]
    grid = _Grid(axes, blocks, members, width / len(blocks), colours)
    layout = _text_layout(drawn, width / len(blocks))
    for cell in drawn:
        grid.add(cell, layout)
    _label_axes(axes, blocks, members, width)
    if inspection.owners:
        _add_colour_bar(figure, axes, colours)
    complete = sum(len(cell.members) for cell in drawn) == len(blocks) * len(members)
    _add_legend(figure, drawn, layout, complete)
    _add_title(figure, inspection)
    return figure


class _Grid:
    """Places cells: column and row numbers are the axes' coordinates, row 0 at the top."""

    def __init__(self, axes: Axes, blocks: Sequence[int], members: Sequence[str], cell_width: float,
                 colours: Colormap) -> None:
        self._axes = axes
        self._column = {block: index for index, block in enumerate(blocks)}
        self._row = {member: index for index, member in enumerate(members)}
        self._cell_width = cell_width
        self._colours = colours
        axes.set_xlim(-0.5, len(blocks) - 0.5)
        axes.set_ylim(len(members) - 0.5, -0.5)

    def add(self, cell: Cell, layout: _TextLayout | None) -> None:
        """Draw `cell`, in one piece where its members are neighbours."""
        from matplotlib.patches import Polygon, Rectangle

        column = self._column[cell.block]
        dx, dy = min(_GAP / self._cell_width, 0.15), _GAP / _CELL_HEIGHT
        colour = _DENSE_COLOUR if cell.rank is None else self._colours(cell.kept)
        for first, last in self._pieces(cell):
            left, top = column - 0.5 + dx / 2, first - 0.5 + dy / 2
            size = 1 - dx, last - first + 1 - dy
            self._axes.add_patch(Rectangle((left, top), *size, facecolor=colour, linewidth=0))
            if cell.skip:
                leg = min(_CORNER, (0.8 if layout is None else 0.3) * self._cell_width)
                corner = [(left, top), (left + leg / self._cell_width, top), (left, top + leg / _CELL_HEIGHT)]
                self._axes.add_patch(Polygon(corner, facecolor="black", edgecolor="white", linewidth=0.4))
            if layout is not None:
                self._axes.text(
                    column, (first + last) / 2, cell.label(layout.long), fontsize=layout.size,
                    rotation=90 if layout.upright else 0, ha="center", va="center", color=_ink(colour),
                )

    def _pieces(self, cell: Cell) -> list[tuple[int, int]]:
        """First and last row of each run of neighbours among `cell`'s members."""
        pieces: list[tuple[int, int]] = []
        for row in (self._row[member] for member in cell.members):
            if pieces and row == pieces[-1][1] + 1:
                pieces[-1] = pieces[-1][0], row
            else:
                pieces.append((row, row))
        return pieces


def _ink(background: Any) -> str:
    """Black or white, whichever is read better on `background`."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # The contrasts, as WCAG defines them, are equal at 0.18; on saturated blues white is still better.
    return "black" if luminance > 0.22 else "white"


@dataclass(frozen=True)
class _TextLayout:
    """How the text in all cells is written."""

    long: bool
    """As of `Cell.label`."""
    size: float
    """Points."""
    upright: bool


def _text_layout(drawn: Sequence[Cell], cell_width: float) -> _TextLayout | None:
    """The first layout that fits into every cell, or None: level, long and large ones come first."""
    from matplotlib.textpath import TextPath

    def width(long: bool) -> float:
        labels = {cell.label(long) for cell in drawn}
        return max(float(TextPath((0, 0), label, size=1).get_extents().width) for label in labels)

    forms = (
        (True, width(True), _LONG_PADDING, _LONG_FONT_SIZES),
        (False, width(False), _PADDING, _FONT_SIZES),
    )
    for upright in (False, True):
        room, line = (_CELL_HEIGHT, cell_width) if upright else (cell_width, _CELL_HEIGHT)
        for long, em, padding, sizes in forms:
            for size in sizes:
                if em * size * _POINT <= room - padding and _LINE * size * _POINT <= line:
                    return _TextLayout(long, size, upright)
    return None


def _label_axes(axes: Axes, blocks: Sequence[int], members: Sequence[str], width: float) -> None:
    letters = len(str(blocks[-1])) + 1
    step = max(1, round(letters * _DIGIT_WIDTH * 10 * _POINT * len(blocks) / width + 0.5))
    step = next(nice for nice in (1, 2, 5, 10, 20, 50, 100, step) if nice >= step)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]], fontsize=10)
    names = [_shortened(member, 12) for member in members]
    axes.set_yticks(range(len(members)), names, fontsize=10.5, family="monospace")
    axes.set_xlabel("block", fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _add_colour_bar(figure: Figure, axes: Axes, colours: Colormap) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    box, inch = axes.get_position(), 1 / figure.get_figwidth()
    bar = figure.add_axes((box.x1 + 0.2 * inch, box.y0, 0.18 * inch, box.height))
    figure.colorbar(ScalarMappable(Normalize(0, 1), colours), cax=bar, format="{x:.0%}")
    bar.set_ylabel("parameters kept", fontsize=11)
    bar.tick_params(labelsize=10)


def _add_legend(figure: Figure, drawn: Sequence[Cell], layout: _TextLayout | None, complete: bool) -> None:
    """Explain, below the axes, the marks that occur."""
    from matplotlib.offsetbox import AnchoredOffsetbox, DrawingArea, HPacker, TextArea
    from matplotlib.patches import Patch, Polygon, Rectangle

    def entry(text: str, mark: Patch | None = None) -> HPacker:
        parts: list[Artist] = [TextArea(text, textprops={"size": 10})]
        if mark:
            area = DrawingArea(_MARK, _MARK)
            area.add_artist(mark)
            parts.insert(0, area)
        return HPacker(children=parts, pad=0, sep=5, align="center")

    entries: list[Artist] = []
    if layout is not None and any(cell.rank is not None for cell in drawn):
        entries.append(entry("numbers: rank / full rank" if layout.long else "numbers: rank"))
    if any(len(cell.members) > 1 for cell in drawn):
        entries.append(entry("joined: shared (Cat)"))
    if any(cell.skip for cell in drawn):
        entries.append(entry("Skip", Polygon([(0, 0), (0, _MARK), (_MARK, _MARK)], color="black")))
    if any(cell.rank is None for cell in drawn):
        entries.append(entry("dense", Rectangle((0, 0), _MARK, _MARK, color=_DENSE_COLOUR)))
    if not complete:
        entries.append(entry("empty: no layer"))
    row = HPacker(children=entries, pad=0, sep=18, align="center")
    place = _LEFT / figure.get_figwidth(), 0.2 / figure.get_figheight()
    figure.add_artist(AnchoredOffsetbox("lower left", child=row, pad=0, borderpad=0, frameon=False,
                                        bbox_to_anchor=place, bbox_transform=figure.transFigure))


def _add_title(figure: Figure, inspection: Inspection) -> None:
    """File name, method, total ratio and size, from the left edge of the cells."""
    from skipcat_edge.terminal import decimal_bytes

    method = inspection.keys.get(fmt.KEY_METHOD) if inspection.owners else "dense"
    parts = [] if method is None else [f"method {method}" if inspection.owners else "dense"]
    parts += [f"level {inspection.levels[-1].ratio:g}"] if inspection.levels else []
    parts += [f"ratio {inspection.kept:.3f}", decimal_bytes(inspection.file_bytes)]
    width, height = figure.get_size_inches()
    lines = ((0.3, 14, "bold", Path(inspection.file).name), (0.6, 11, "normal", " · ".join(parts)))
    for below, size, weight, text in lines:
        room = (width - _LEFT - 0.1) / (_BOLD_WIDTH * size * _POINT)
        figure.text(_LEFT / width, 1 - below / height, _shortened(text, int(room)), fontsize=size,
                    fontweight=weight, va="center", parse_math=False)


def _shortened(text: str, letters: int) -> str:
    """`text` as one printable line of at most `letters`, its middle left out where it is longer."""
    line = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(line) <= letters:
        return line
    return f"{line[: letters // 2]}…{line[len(line) - (letters - letters // 2 - 1):]}"
