"""The page and the pictures of bench_quality.py, from its results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PLAIN = "llama-quantize"
IMATRIX = "llama-quantize + imatrix"
FEEDBACK = "error feedback (ours)"
LOW_RANK = "low rank"

Row = Mapping[str, Any]

# (label, colour, marker) per series of the picture.
_STYLES = {
    PLAIN: ("#1f77b4", "o"),
    IMATRIX: ("#17becf", "s"),
    FEEDBACK: ("#2ca02c", "D"),
    f"{LOW_RANK}, auto, F16": ("#d62728", "^"),
    f"{LOW_RANK}, auto, Q8_0": ("#ff7f0e", "v"),
    f"{LOW_RANK}, auto, Q4_0": ("#9467bd", "P"),
    f"{LOW_RANK}, other methods": ("#999999", "o"),
}


def write_report(out: Path, results: Mapping[str, Sequence[Row]], scale: Mapping[str, Any],
                 missing: Mapping[str, int], times: Mapping[str, Mapping[str, float]]) -> Path:
    """Write quality.md and a picture per model to `out`; returns the page's path.

    `missing`: files of each model's plan that have not been measured yet. `times`: seconds of each
    model's calibration and sweeps.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Quality by size", "", _protocol(scale)]
    unfinished = [f"{count} of {model}" for model, count in missing.items() if count]
    if unfinished:
        parts += ["", f"**Unfinished run**: not measured yet are {', '.join(unfinished)}."]
    for model, rows in results.items():
        if not rows:
            continue
        measured = [row for row in rows if not row["variant"]]
        picture = out / f"quality-{model}.png"
        draw(picture, model, [row for row in measured if "skipped" not in row])
        parts += ["", f"## {model}", "", f"![{model}: size and divergence]({picture.name})", "",
                  *_model_table([row for row in measured if "skipped" not in row]), *_skips(measured)]
    parts += ["", "## Beside the published methods", "", *_beside_others(results)]
    parts += ["", "## What each piece of auto adds", "", *_ablation(results)]
    parts += ["", "## Where plain quantisation wins", "", *_verdicts(results)]
    parts += ["", "## Calibrate once", "", *_times(times)] if times else []
    page = out / "quality.md"
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return page


def _protocol(scale: Mapping[str, Any]) -> str:
    quick = " This page is a smoke test with short texts: its figures mean nothing." if scale["quick"] else ""
    return (
        f"Made by `make bench-quality`.{quick}\n\n"
        f"The language models are calibrated with {scale['calib_tokens']:,} tokens of TinyStories and "
        f"measured on the first {scale['eval_tokens']:,} tokens of other stories, in windows of 256; MiniLM "
        f"is calibrated with 1,200 sentences of WikiText-2 and measured on {scale['lines']} others. KL and "
        "top-1 compare with the dense F16 file, cosines with its embeddings; ± is one standard error. "
        "Embeddings and head are F16 in every file.\n\n"
        "`llama-quantize` mixes types under names with _M and replaces one whose block does not divide rows "
        "by a larger one; error feedback and low rank store one type, and F16 where its block does not "
        "divide rows. The column *stored as* counts the blocks' matrices of each type.\n\n"
        "What schedules of rank levels do to quality: [Progressive decoding](progressive.md)."
    )


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """An aligned table whose first `left` columns are text."""
    body = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in body)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) if i < left else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(body[0]), line(rule), *map(line, body[1:])]


def _figures(row: Row) -> list[str]:
    if "cosine" in row:
        return [f"{row['cosine']:.5f}", f"{row['cosine_min']:.5f}"]
    return [f"{row['ppl']:.3f} ± {row['ppl_se']:.3f}", f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
            f"{100 * row['top1']:.2f}"]


def _is_encoder(rows: Sequence[Row]) -> bool:
    return any("cosine" in row for row in rows)


def _model_table(rows: Sequence[Row]) -> list[str]:
    figures = ["mean cosine", "lowest cosine"] if _is_encoder(rows) else ["perplexity", "KL", "top-1 %"]
    header = ["file", "method", "type", "stored as", "ratio", "MB", "bits per weight", *figures]
    lines = []
    for row in sorted(rows, key=lambda row: (row["bytes"], row["loss"])):
        stored = ", ".join(f"{count} {name}" for name, count in sorted(row["stored"].items()))
        method = row["method"] if row["kind"] == LOW_RANK else ""
        lines.append([row["kind"], method, row["type"], stored, f"{row['ratio']:g}",
                      f"{row['bytes'] / 1e6:.3f}", f"{row['bpw']:.2f}", *_figures(row)])
    return _markdown(header, lines, 4)


def _skips(rows: Sequence[Row]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "skipped" in row:
            reasons.setdefault(row["skipped"].rstrip("."), []).append(_name(row))
    if not reasons:
        return []
    lines = [f"- {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return ["", "Not measured:", "", *lines]


def _name(row: Row) -> str:
    if row["kind"] == LOW_RANK:
        return f"{row['method']} {row['type']} {row['ratio']:g}"
    return f"{row['kind']} {row['type']}"


def _ablation(results: Mapping[str, Sequence[Row]]) -> list[str]:
    """One line per piece, one column per configuration."""
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, Row] = {}
    rows = [row for each in results.values() for row in each
            if row["method"] == "auto" and row["kind"] == LOW_RANK]
    for row in rows:
        if row["variant"]:
            column = f"{row['model']} {row['type']} {row['ratio']:g}"
            full = next(each for each in rows if not each["variant"]
                        and all(each[key] == row[key] for key in ("model", "type", "ratio")))
            columns[column] = full
            cells.setdefault(row["variant"], {})[column] = _change(row, full)
    if not cells:
        return ["Not measured for these models."]
    full_line = [_loss(full) for full in columns.values()]
    lines = [["all of it", *full_line]]
    lines += [[variant, *(found.get(column, "") for column in columns)] for variant, found in cells.items()]
    return ["KL, or 1 - mean cosine for MiniLM, and its change from all of auto: + is worse.", "",
            *_markdown(["auto", *columns], lines, 1)]


def _beside_others(results: Mapping[str, Sequence[Row]]) -> list[str]:
    """Low-rank files of the same type and ratio, one column per method."""
    cells: dict[tuple[str, str, float], dict[str, Row]] = {}
    for row in (row for rows in results.values() for row in rows):
        if row["kind"] == LOW_RANK and not row["variant"]:
            cells.setdefault((row["model"], row["type"], row["ratio"]), {})[row["method"]] = row
    cells = {key: found for key, found in cells.items() if len(found) > 1 and "auto" in found}
    if not cells:
        return ["Not measured for these models."]
    others = list(dict.fromkeys(method for found in cells.values() for method in found if method != "auto"))
    methods = [*others, "auto"]
    lines = [[*key[:2], f"{key[2]:g}", *(_loss(found[each]) if each in found else "" for each in methods)]
             for key, found in cells.items()]
    rivals = [(row, found["auto"]) for found in cells.values() for row in found.values()
              if row["method"] != "auto" and "skipped" not in row]
    worse = sum("skipped" in auto or auto["loss"] > row["loss"] for row, auto in rivals)
    return ["KL, or 1 - mean cosine for MiniLM. In "
            f"{worse} of {len(rivals)} comparisons `auto` is the worse one.", "",
            *_markdown(["model", "type", "ratio", *methods], lines, 2)]


def _times(times: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(next(iter(times.values())))
    lines = [[model, *(f"{found[name]:.1f}" for name in names)] for model, found in times.items()]
    return ["Seconds, on the machine that made this page, of a calibration and of a sweep over eight ratios "
            "from its statistics.", "", *_markdown(["model", *names], lines, 1)]


def _loss(row: Row) -> str:
    return "skipped" if "skipped" in row else f"{row['loss']:.5f}"


def _change(row: Row, full: Row) -> str:
    if "skipped" in row or "skipped" in full:
        return _loss(row)
    return f"{_loss(row)} ({100 * (row['loss'] / full['loss'] - 1):+.1f} %)"


def _verdicts(results: Mapping[str, Sequence[Row]]) -> list[str]:
    """For each model, how many of auto's files lose to a dense file of no more bytes."""
    lines: list[str] = []
    for model, all_rows in results.items():
        rows = [row for row in all_rows if "skipped" not in row and not row["variant"]]
        low = [row for row in rows if row["kind"] == LOW_RANK and row["method"] == "auto"]
        if not low:
            tried = any(row["kind"] == LOW_RANK for row in all_rows)
            lines += [f"**{model}**: no low-rank file could be made.", ""] if tried else []
            continue
        kinds = (PLAIN, IMATRIX, FEEDBACK)
        best = [{kind: _best(rows, kind, each["bytes"]) for kind in kinds} for each in low]
        beaten = {kind: sum(found[kind] is not None and found[kind]["loss"] < each["loss"]
                            for each, found in zip(low, best, strict=True)) for kind in kinds}
        left = [(each, found) for each, found in zip(low, best, strict=True)
                if not any(row is not None and row["loss"] < each["loss"] for row in found.values())]
        counts = ", ".join(f"{count} by {kind}" for kind, count in beaten.items())
        lines.append(f"**{model}**: {len(low) - len(left)} of {len(low)} files of auto are beaten by a "
                     f"dense file of no more bytes ({counts}).")
        lines += [""] if left else []
        lines += [_not_beaten(each, found) for each, found in left]
        lines.append("")
    return lines[:-1]


def _best(rows: Sequence[Row], kind: str, limit: int) -> Any:
    fitting = [row for row in rows if row["kind"] == kind and row["bytes"] <= limit]
    return min(fitting, key=lambda row: row["loss"], default=None)


def _not_beaten(row: Row, found: Mapping[str, Any]) -> str:
    word = "1 - cosine" if "cosine" in row else "KL"
    name = f"- Not beaten: {_name(row)} ({row['bytes'] / 1e6:.3f} MB, {word} {_loss(row)})"
    rivals = [each for each in found.values() if each is not None]
    if not rivals:
        return f"{name}; no dense file is that small."
    rival = min(rivals, key=lambda each: float(each["loss"]))
    return (f"{name}; the closest dense file of no more bytes is {_name(rival)} "
            f"({rival['bytes'] / 1e6:.3f} MB, {_loss(rival)}).")


def _series(row: Row) -> str:
    if row["kind"] != LOW_RANK:
        return str(row["kind"])
    return f"{LOW_RANK}, auto, {row['type']}" if row["method"] == "auto" else f"{LOW_RANK}, other methods"


def draw(path: Path, model: str, rows: Sequence[Row]) -> None:
    """Size against loss; the dense F16 file, whose loss is 0, is a vertical line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6.2), dpi=130, layout="constrained")
    axes.set_yscale("log")
    labels: list[tuple[float, float, str, str]] = []
    for series, (colour, marker) in _STYLES.items():
        points = [row for row in rows if _series(row) == series and row["loss"] > 0]
        points.sort(key=lambda row: row["bytes"])
        if not points:
            continue
        grey = series.endswith("other methods")
        x, y = [row["bytes"] / 1e6 for row in points], [row["loss"] for row in points]
        axes.plot(x, y, marker, color=colour, markersize=5 if grey else 8, label=series,
                  linestyle="none" if grey else "-", linewidth=1.2, zorder=2 if grey else 3)
        # the same sizes and types as without the imatrix
        if not grey and series != IMATRIX:
            labels += [(a, b, f"{row['ratio']:g}" if row["kind"] == LOW_RANK else row["type"], colour)
                       for a, b, row in zip(x, y, points, strict=True)]
    dense = [row["bytes"] / 1e6 for row in rows if row["kind"] == "dense"]
    for size in dense:
        axes.axvline(size, color="black", linewidth=1, linestyle=":", label="dense F16")
    axes.set_xlabel("file size in MB", fontsize=13)
    loss = "1 - mean cosine to dense F16" if _is_encoder(rows) else "KL from dense F16, nats per token"
    axes.set_ylabel(loss, fontsize=13)
    axes.set_title(f"{model}: lower and further left is better", fontsize=15)
    axes.tick_params(labelsize=12)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.margins(x=0.06, y=0.08)
    axes.legend(fontsize=11, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _place_labels(figure, axes, labels)
    figure.savefig(path)
    plt.close(figure)


def _place_labels(figure: Any, axes: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Each label at the first of some offsets where it covers no other label and no point."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    taken = []
    for line in axes.lines:
        if line.get_marker() not in ("None", None, ""):
            for x, y in axes.transData.transform(line.get_xydata()):
                taken.append(Bbox.from_extents(x - 7, y - 7, x + 7, y + 7))
    offsets = [offset for reach in (8, 18, 30) for offset in (
        (0, reach, "center"), (0, -reach - 8, "center"), (reach, -3, "left"), (-reach, -3, "right"),
        (reach, reach, "left"), (-reach, reach, "right"),
        (reach, -reach - 6, "left"), (-reach, -reach - 6, "right"),
    )]  # fmt: skip
    for x, y, text, colour in labels:
        for dx, dy, side in offsets:
            label = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=side, fontsize=10,
                                  color=colour, zorder=4, bbox={"color": "white", "alpha": 0.7, "pad": 0.5})
            box = label.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken) or (dx, dy, side) == offsets[-1]:
                taken.append(box)
                break
            label.remove()
