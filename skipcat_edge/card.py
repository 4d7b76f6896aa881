"""The model card of a GGUF file: what it was made of, how, and what was measured.

It lies beside the file under the file's own name, `llama.gguf` beside `llama.md`: a folder may hold many.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipcat_edge import __version__
from skipcat_edge import format as fmt
from skipcat_edge.card_source import UNKNOWN, Source
from skipcat_edge.control_characters import visible
from skipcat_edge.errors import UserError
from skipcat_edge.inspection import Inspection, inspect
from skipcat_edge.session import ModelInfo, model_info
from skipcat_edge.terminal import decimal_bytes

_BEGIN, _END = "<!-- skipcat-edge eval: figures -->", "<!-- skipcat-edge eval: end -->"
_FLOATS = {"F32", "F16", "BF16"}
_HEAD = "| figure | value | measured on | date |\n|---|---|---|---|"


@dataclass(frozen=True)
class Conversion:
    """What the one who converts knows, and a dense file's metadata does not say."""

    method: str
    error_feedback: bool = False
    """Rounding passed its errors on."""


@dataclass(frozen=True)
class Figure:
    """A row of the card's table. The same name on the same text replaces an older one."""

    name: str
    value: str
    on: str
    """The text or task, and how much of it."""
    date: str

    def row(self) -> str:
        """In Markdown."""
        return _row(self.name, self.value, self.on, self.date)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def card_path(file: Path) -> Path:
    """Where the card of `file` lies."""
    return file.with_name(file.name.removesuffix(".gguf") + ".md")


def new_card(file: Path, source: Source, *, name: str | None = None,
             conversion: Conversion | None = None) -> str:
    """A card of `file`, which may still have another name than `name`, without figures.

    Without `conversion` it says what the file's metadata says. Raises UserError as `inspect`.
    """
    found, info = inspect(file), model_info(file)
    name = name or file.name
    parts = [
        f"# {name.removesuffix('.gguf')}",
        _summary(found, source),
        "## How it was made", _made(found, source, conversion),
        "## How to run it", _how_to_run(name, found, info),
        "## Measured", _figures(name, info, []),
        "## Licence", _licence(source),
    ]
    return f"---\n{_metadata(found, info, source)}\n---\n\n" + "\n\n".join(parts) + "\n"


def add_figures(card: str, file: Path, figures: Sequence[Figure]) -> str:
    """`card` with `figures` beside those it has; nothing else of it changes."""
    before, begin, rest = card.partition(_BEGIN)
    inside, end, after = rest.partition(_END)
    if not begin or not end:  # somebody took the section out
        before, inside, after = card.rstrip("\n") + "\n\n## Measured\n\n", "", "\n"
    rows = {_key(line): line for line in inside.splitlines() if line.startswith("| ") and line not in _HEAD}
    rows |= {_key(figure.row()): figure.row() for figure in figures}
    return before + _figures(file.name, model_info(file), list(rows.values())) + after


def _key(row: str) -> tuple[str, str]:
    cells = row.replace("\\|", "\0").split("|")
    return cells[1].strip(), cells[3].strip() if len(cells) > 3 else ""


def _figures(name: str, info: ModelInfo, rows: Sequence[str]) -> str:
    reference = " --reference DENSE.gguf"
    said = "\n".join([_HEAD, *rows]) if rows else (
        f"Nothing yet. `skipcat-edge eval {shlex.quote(name)} --text TEXT{reference} --card` measures "
        + ("the mean cosine to the dense model's embeddings" if info.embedding else
           "perplexity and the divergence from the dense model") + " and writes them here."
    )
    return f"{_BEGIN}\n\n{said}\n\n{_END}"


def _metadata(found: Inspection, info: ModelInfo, source: Source) -> str:
    from huggingface_hub import ModelCardData

    # the hub takes small letters, digits, dots and hyphens
    licence_name = re.sub(r"[^a-z0-9.]+", "-", (source.licence_name or "").lower()).strip("-")
    data = ModelCardData(
        license=source.licence, license_name=licence_name or None, license_link=source.licence_link,
        language=list(source.language) if isinstance(source.language, tuple) else source.language,
        library_name="gguf",
        pipeline_tag=source.pipeline_tag or ("feature-extraction" if info.embedding else "text-generation"),
        base_model=source.name if source.on_hub else None,
        tags=["gguf", "skipcat-edge", *(["low-rank"] if found.owners else [])],
        # the hub has no word for low rank, and shows such models among the quantised ones
        **({"base_model_relation": "quantized"} if source.on_hub else {}),
    )
    return str(data.to_yaml())


def _linked(source: Source) -> str:
    if source.name is None:
        return "an unknown model"
    return f"[{source.name}](https://huggingface.co/{source.name})" if source.on_hub else _code(source.name)


def _code(text: object) -> str:
    """`text`, which may come from a file of anybody's, as code in a line of Markdown."""
    return f"`{_line(text).replace('`', chr(39))}`"


def _plain(text: object) -> str:
    """The same as words: neither markup nor a link."""
    return re.sub(r"([\\`<>\[\]|])", r"\\\1", _line(text))


def _line(text: object) -> str:
    return visible(" ".join(str(text).split()))


def _summary(found: Inspection, source: Source) -> str:
    if found.levels:
        levels = ", ".join(f"{level.ratio:g}" for level in found.levels)
        return (f"{_linked(source)} at several levels, {levels}: large matrices are replaced by low-rank "
                "factors, and a lower level has less of them to read and to multiply. Made by skipcat-edge.")
    if found.owners:
        return (f"{_linked(source)} with {found.kept:.0%} of its linear layers' parameters: large "
                "matrices are replaced by low-rank factors, so that there is less to read and to multiply. "
                "Made by skipcat-edge.")
    return f"{_linked(source)} as GGUF, made by skipcat-edge."


def _made(found: Inspection, source: Source, conversion: Conversion | None) -> str:
    keys = found.keys
    rows: list[tuple[str, str]] = [("source", _linked(source)), ("architecture", _code(found.architecture))]
    method = keys.get(fmt.KEY_METHOD) or (conversion.method if conversion else None)
    if found.owners:
        rows.append(("method", _code(method) if method else UNKNOWN))
        asked = f" (asked for {keys[fmt.KEY_RATIO]:g})" if fmt.KEY_RATIO in keys else ""
        rows.append(("parameters kept", f"{found.kept:.4f} of the linear layers'{asked}"))
        if found.levels:
            speeds = (f"{level.ratio:g} ({decimal_bytes(level.bytes_per_token)} per token)"
                      for level in found.levels)
            rows.append(("levels", ", ".join(speeds)))
        ranks = [owner.rank for owner in found.owners]
        rows.append(("ranks", f"{min(ranks):,} to {max(ranks):,}, median {statistics.median_low(ranks):,}, "
                              f"of {len(ranks):,} projections; {len(found.dense_layers):,} linear layers "
                              "stay dense"))
    else:
        rows.append(("parameters kept", "all"))
    types = Counter(layer.type for layer in found.dense_layers)
    for owner in found.owners:
        types.update([owner.type.name, *(member.type.name for member in owner.members)])
    rows.append(("types of the linear layers", ", ".join(name for name, _ in types.most_common()) or UNKNOWN))
    if types.keys() - _FLOATS:
        rows.append(("rounding", UNKNOWN if conversion is None else "plain" if not conversion.error_feedback
                     else "each number's error is passed on to those after it"))
    rows.append(("size", f"{decimal_bytes(found.file_bytes)} ({found.file_bytes:,} bytes)"))
    rows.append(("calibration", _calibration(found, conversion)))
    if conversion is not None:
        rows.append(("made with", f"skipcat-edge {__version__}"))
    if fmt.KEY_FORMAT_VERSION in keys:
        rows.append(("format", f"version {keys[fmt.KEY_FORMAT_VERSION]}, for the runtime "
                               f"{keys.get(fmt.KEY_RUNTIME_MIN, UNKNOWN)} or later"))
    return "| | |\n|---|---|\n" + "\n".join(_row(*cells) for cells in rows)


def _calibration(found: Inspection, conversion: Conversion | None) -> str:
    tokens = found.keys.get(fmt.KEY_CALIBRATION_TOKENS)
    sha256 = found.keys.get(fmt.KEY_CALIBRATION_SHA256)
    if tokens is None:  # a dense file that was calibrated says so; others' makers are unknown
        return UNKNOWN if conversion is None else "none"
    text = f"a text with SHA-256 {_code(sha256)}" if sha256 else "an unknown text"
    return f"{tokens:,} tokens of {text}" if tokens else "none"


def _how_to_run(name: str, found: Inspection, info: ModelInfo) -> str:
    code = f'from llama_cpp import Llama; print(Llama({json.dumps(name)}, embedding=True).embed("Hello"))'
    name = shlex.quote(name)
    ours = f"python -c {shlex.quote(code)}" if info.embedding else (
        f"skipcat-edge chat {name}\nskipcat-edge generate {name} -p \"Once upon a time\"")
    if found.owners:
        return (f"It needs skipcat-edge's patched llama-cpp-python: stock llama.cpp does not know the "
                f"architecture {_code(found.architecture)} and refuses the file.\n\n"
                f"```console\nskipcat-edge runtime build --install\n{ours}\n```"
                + _how_to_turn(name, found, info))
    stock = f"llama-embedding -m {name} -p Hello" if info.embedding else f"llama-cli -m {name}"
    return f"Stock llama.cpp runs it, and everything made with it:\n\n```console\n{stock}\n{ours}\n```"


def _how_to_turn(name: str, found: Inspection, info: ModelInfo) -> str:
    if not found.levels or info.embedding:
        return ""
    lowest = f"{found.levels[0].ratio:g}"
    return ("\n\nIt has several levels, each faster than the next one, and the highest is used where none is "
            "named:\n\n```console\n"
            f"skipcat-edge chat {name} --rank-level {lowest}\n"
            f"skipcat-edge chat {name} --rank-level auto --target-tps 10\n```")


def _licence(source: Source) -> str:
    if source.licence == UNKNOWN:
        return ("The licence of the source is unknown: neither its card nor a file beside it names one. Find "
                "it out before this file is shared.")
    name = _plain(source.licence_name or source.licence)
    # a browser runs what follows `javascript:`
    web = re.fullmatch(r"https?://[^\s()<>]+", source.licence_link or "")
    linked = f"[{name}]({source.licence_link})" if web else name
    where = f", says its {source.licence_from}" if source.licence_from else ""
    return f"The source's: {linked}{where}."


def read_card(path: Path) -> str:
    """Raises UserError where it cannot be read."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {reason}.") from None
