"""`inspect --plot`: what is drawn is what the file stores, it can be read, and bad names are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from skipcat_edge import format as fmt
from skipcat_edge.cli import main
from skipcat_edge.inspection import DenseLayer, Inspection, Totals, inspect
from skipcat_edge.rank_plot import FORMATS, Cell, cells, draw, save_plot

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
from matplotlib import colormaps, image
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.text import Text

SHAPES = {  # m, n
    "attn_q": (2048, 2048), "attn_k": (512, 2048), "attn_v": (512, 2048), "attn_output": (2048, 2048),
    "ffn_gate": (8192, 2048), "ffn_up": (8192, 2048), "ffn_down": (2048, 8192),
}  # fmt: skip
ROWS = list(SHAPES)
DENSE = "#d4d4d4"


def owner(block: int, *members: str, rank: int, skip: bool = True) -> fmt.Owner:
    stored = tuple(fmt.Member(name, SHAPES[name][0], Type.F16, 0) for name in members)
    return fmt.Owner(block, fmt.owner_of(members), SHAPES[members[0]][1], rank, skip, Type.F16, 0, stored)


def dense(block: int, member: str) -> DenseLayer:
    return DenseLayer(block, member, *SHAPES[member], "F16", 0)


def inspection(layers: Iterable[fmt.Owner | DenseLayer], file: str = "/some/model.gguf",
               keys: Mapping[str, Any] | None = None) -> Inspection:
    layers = list(layers)
    owners = tuple(layer for layer in layers if isinstance(layer, fmt.Owner))
    plain = tuple(layer for layer in layers if isinstance(layer, DenseLayer))
    totals = Totals(100, 75, 0.75 if owners else 1.0, 0, 0, 0)
    return Inspection(file, 1_234_000_000, "llama", dict(keys or {fmt.KEY_METHOD: "skipcat"}), owners, plain,
                      totals)


def mixed(blocks: int) -> Inspection:
    """Every form in turn: shared with Skip, own projections without Skip, dense."""
    layers: list[fmt.Owner | DenseLayer] = []
    for block in range(blocks):
        if block % 3 == 0:
            layers += [owner(block, "attn_q", "attn_k", "attn_v", rank=1024 + 8 * block),
                       owner(block, "ffn_gate", "ffn_up", rank=512)]
        elif block % 3 == 1:
            layers += [owner(block, name, rank=256, skip=False)
                       for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")]
        else:
            layers += [dense(block, name) for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")]
        layers += [owner(block, "attn_output", rank=1536), dense(block, "ffn_down")]
    return inspection(layers)


def all_dense(blocks: int) -> Inspection:
    return inspection(dense(block, name) for block in range(blocks) for name in SHAPES)


def boxes(figure: Figure) -> dict[tuple[int, int], tuple[str, int]]:
    """Column and first row of each drawn cell -> its colour and how many rows it spans."""
    found = {}
    for patch in figure.axes[0].patches:
        if isinstance(patch, Rectangle):
            x, y = patch.get_x() + patch.get_width() / 2, patch.get_y()
            found[round(x), round(y + 0.5)] = to_hex(patch.get_facecolor()), round(patch.get_height())
    return found


def corners(figure: Figure) -> set[tuple[int, int]]:
    """Columns and first rows of the cells that carry the mark of Skip."""
    marks = [patch.get_xy()[0] for patch in figure.axes[0].patches if isinstance(patch, Polygon)]
    return {(round(x + 0.5), round(y + 0.5)) for x, y in marks}


def labels(figure: Figure) -> dict[tuple[float, float], str]:
    return {text.get_position(): text.get_text() for text in figure.axes[0].texts}


def legend(figure: Figure) -> set[str]:
    def texts(artist: Any) -> set[str]:
        return set().union({artist.get_text()} if isinstance(artist, Text) else set(),
                           *map(texts, artist.get_children()))

    return set().union(*(texts(artist) for artist in figure.artists))


def test_cells_are_the_file_s_layers() -> None:
    layers = [dense(0, "ffn_down"), owner(0, "ffn_up", "ffn_gate", rank=512),
              owner(0, "attn_k", rank=64, skip=False)]
    assert cells(inspection(layers)) == [
        Cell(0, ("attn_k",), 64, 512, pytest.approx(64 * (512 + 2048) / (512 * 2048)), False),
        Cell(0, ("ffn_gate", "ffn_up"), 512, 2048,
             pytest.approx(512 * (16384 + 2048 - 512) / (16384 * 2048)), True),
        Cell(0, ("ffn_down",), None, 2048, 1.0, False),
    ]


@pytest.mark.parametrize("blocks", [1, 3, 32, 130])
def test_what_is_drawn_is_what_is_stored(blocks: int) -> None:
    found = mixed(blocks)
    figure = draw(found)
    viridis = colormaps["viridis"]
    expected = {}
    for each in found.owners:
        first = min(ROWS.index(member.name) for member in each.members)
        expected[each.layer, first] = to_hex(viridis(each.ratio)), len(each.members)
    expected |= {(layer.layer, ROWS.index(layer.name)): (DENSE, 1) for layer in found.dense_layers}
    assert boxes(figure) == expected
    assert corners(figure) == {
        (each.layer, min(ROWS.index(member.name) for member in each.members))
        for each in found.owners if each.skip
    }
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ROWS
    ticks = zip(figure.axes[0].get_xticks(), figure.axes[0].get_xticklabels(), strict=True)
    assert all(str(round(place)) == text.get_text() for place, text in ticks)


@pytest.mark.parametrize("blocks", [1, 3, 32])
def test_texts_tell_the_rank(blocks: int) -> None:
    found = mixed(blocks)
    figure = draw(found)
    long = blocks < 32
    expected: dict[tuple[float, float], str] = {}
    for each in found.owners:
        rows = [ROWS.index(member.name) for member in each.members]
        text = f"{each.rank}/{each.full_rank}" if long else str(each.rank)
        expected[each.layer, sum(rows) / len(rows)] = text
    expected |= {(layer.layer, ROWS.index(layer.name)): "dense" for layer in found.dense_layers}
    assert labels(figure) == expected
    assert ("numbers: rank / full rank" if long else "numbers: rank") in legend(figure)


def test_no_text_where_there_is_no_room() -> None:
    figure = draw(mixed(130))
    assert labels(figure) == {}
    assert legend(figure) == {"joined: shared (Cat)", "Skip", "dense"}


@pytest.mark.parametrize("blocks", [1, 2, 8, 16, 24, 32, 64, 80, 96, 130])
@pytest.mark.parametrize("make", [mixed, all_dense])
def test_texts_do_not_overlap(make: Any, blocks: int) -> None:
    figure = draw(make(blocks))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    cell_width = abs(axes.transData.transform((1, 0)) - axes.transData.transform((0, 0)))[0]
    cell_height = abs(axes.transData.transform((0, 1)) - axes.transData.transform((0, 0)))[1]
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.width <= cell_width
        assert box.height <= cell_height
    ticks = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(ticks))
    whole = figure.bbox
    (row,) = figure.artists
    for artist in [*figure.texts, *axes.get_yticklabels(), axes.xaxis.label, row, *figure.axes[1:]]:
        box = artist.get_tightbbox()
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert row.get_tightbbox().y1 < axes.xaxis.label.get_window_extent().y0


def test_the_title_names_file_method_ratio_and_size() -> None:
    name, facts = (text.get_text() for text in draw(mixed(3)).texts)
    assert name == "model.gguf"
    assert facts == "method skipcat · ratio 0.750 · 1.2 GB"
    assert draw(all_dense(3)).texts[1].get_text() == "dense · ratio 1.000 · 1.2 GB"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("two\nlines $x$.gguf", "two?lines $x$.gguf"),
        ("\udcff.gguf", "?.gguf"),
        ("模型.gguf", "模型.gguf"),
        ("a" * 200 + ".gguf", "….gguf"),
    ],
)
def test_any_file_name(name: str, shown: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    found = inspection([dense(0, "attn_q")], file=f"/folder/{name}")
    title = draw(found).texts[0].get_text()
    assert title == shown or (title.startswith("aaa") and "…" in title and title.endswith(".gguf"))
    save_plot(found, tmp_path / "plot.png", force=False)
    assert not list(recwarn)


def test_a_method_of_any_length_fits() -> None:
    figure = draw(inspection([owner(0, "attn_q", rank=64)], keys={fmt.KEY_METHOD: "method-" * 50}))
    assert figure.texts[1].get_tightbbox().x1 <= figure.bbox.x1


def test_a_file_without_a_method() -> None:
    figure = draw(inspection([owner(0, "attn_q", rank=64)], keys={fmt.KEY_RATIO: 0.8}))
    assert figure.texts[1].get_text() == "ratio 0.750 · 1.2 GB"


def test_layers_that_are_missing_stay_empty() -> None:
    figure = draw(inspection([dense(0, "attn_q"), dense(7, "ffn_up"), dense(4_000_000_000, "ffn_up")]))
    assert boxes(figure) == {(0, 0): (DENSE, 1), (1, 1): (DENSE, 1), (2, 1): (DENSE, 1)}
    shown = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert shown[0] == "0"
    assert set(shown) <= {"0", "7", "4000000000"}
    assert "empty: no layer" in legend(figure)


def test_members_that_are_no_neighbours_are_drawn_apart() -> None:
    figure = draw(inspection([owner(0, "attn_q", "attn_v", rank=64), dense(0, "attn_k")]))
    assert {place: rows for place, (_, rows) in boxes(figure).items()} == {(0, 0): 1, (0, 1): 1, (0, 2): 1}
    assert list(labels(figure).values()).count("64/2048") == 2


def test_a_layer_of_no_group() -> None:
    """The format allows it, so the plot must not fail on it."""
    odd = fmt.Owner(0, "ssm_in", 64, 8, False, Type.F16, 0, (fmt.Member("ssm_in", 32, Type.F16, 0),))
    figure = draw(inspection([odd, dense(0, "ffn_down")]))
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["ffn_down", "ssm_in"]


# The command


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def assert_one_sentence(result: Result, *parts: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file of two blocks: a shared low-rank projection with Skip in each, all else dense."""
    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "skipcat-llama")
    writer.add_uint32(fmt.KEY_FORMAT_VERSION, 1)
    writer.add_string(fmt.KEY_METHOD, "skipcat")
    for block in range(2):
        skip = np.zeros(64, bool)
        skip[: 16 + 8 * block] = True
        rank = int(skip.sum())
        writer.add_tensor(fmt.skip_mask_name(block, "ffn_in"), fmt.pack_skip_mask(skip))
        writer.add_tensor(fmt.lr_a_name(block, "ffn_in"), np.zeros((rank, 64 - rank), np.float16))
        for member in ("ffn_gate", "ffn_up"):
            writer.add_tensor(fmt.lr_b_name(block, member), np.zeros((48, rank), np.float16))
        writer.add_tensor(fmt.weight_name(block, "ffn_down"), np.zeros((64, 48), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_picture_is_written(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranks.png"
    result = run(model, "--plot", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == run(model).stdout
    pixels = image.imread(out)
    assert 500 < pixels.shape[0] < 3000
    assert 1000 < pixels.shape[1] < 3000
    colours = {to_hex(colour) for colour in np.unique(pixels[..., :3].reshape(-1, 3), axis=0)}
    ratios = [each.ratio for each in inspect(model).owners]
    assert len(set(ratios)) == 2
    assert {"#ffffff", DENSE, *(to_hex(colormaps["viridis"](ratio)) for ratio in ratios)} <= colours
    assert not list(tmp_path.glob(".*"))


def test_json_stays_json(model: Path, tmp_path: Path) -> None:
    result = run(model, "--json", "--plot", tmp_path / "ranks.svg")
    assert json.loads(result.stdout)["totals"]["ratio"] < 1
    assert (tmp_path / "ranks.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format(ending: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / f"ranks.{ending.upper()}"
    assert run(model, "--plot", out).exit_code == 0
    assert out.stat().st_size > 1000


def test_an_existing_picture_is_replaced_only_by_force(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranks.png"
    out.write_text("mine")
    assert_one_sentence(run(model, "--plot", out), str(out), "--force")
    assert out.read_text() == "mine"
    assert run(model, "--plot", out, "--force").exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ranks", "picture format"),
        ("ranks.txt", ".png, .pdf, .svg"),
        ("ranks.pgf", "picture format"),
        (".png", "picture format"),
        ("missing/ranks.png", "does not exist"),
        ("folder.png", "is a directory"),
    ],
)
def test_names_that_are_refused(name: str, part: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert_one_sentence(run(model, "--plot", tmp_path / name, "--force"), str(tmp_path / name), part)


def test_a_file_without_layers(tmp_path: Path) -> None:
    path, out = tmp_path / "vocabulary.gguf", tmp_path / "ranks.png"
    writer = GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert_one_sentence(run(path, "--plot", out), str(path), "no linear layers")
    assert not out.exists()


def test_without_matplotlib(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipcat_edge.extra.find_spec", lambda name: None)
    assert_one_sentence(run(model, "--plot", tmp_path / "ranks.png"), "pip install 'skipcat-edge[plot]'")
    assert run(model).exit_code == 0


def test_matplotlib_is_loaded_only_to_draw(model: Path) -> None:
    code = (
        "import sys; from skipcat_edge.cli import main; import skipcat_edge.rank_plot\n"
        f"main(['inspect', {str(model)!r}], standalone_mode=False)\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_window_system_is_needed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyplot would open one, and fail where there is none."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert run(model, "--plot", tmp_path / "ranks.png").exit_code == 0
