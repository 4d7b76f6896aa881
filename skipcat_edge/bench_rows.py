"""Results of `bench` as rows of plain values: to be kept, and to be compared with later ones."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from skipcat_edge.benchmark import Result, Spread
from skipcat_edge.errors import UserError

Row = Mapping[str, Any]
FORMATS = ("md", "csv", "json", "jsonl")
_SAME = ("prompt_tokens", "gen_tokens", "threads")
_SETTING = ("skipcat_edge", "llama_cpp", "cpu_variant", "device", "governor")


@dataclass(frozen=True)
class Setting:
    """What the results of one run share."""

    llama_cpp: str
    """Version of the runtime."""
    device: str
    """Name of the preset; `host` for this machine without one."""
    cpu: str
    cpu_variant: str | None
    """Which of a wheel's CPU backends was chosen; None where there is one."""
    cpu_features: tuple[str, ...]


def this_machine(device: str) -> Setting:
    """The installed runtime on this machine."""
    from skipcat_edge.device import load_device
    from skipcat_edge.runtime.check import runtime_status

    status, host = runtime_status(), load_device("host")
    cpu = "+".join(dict.fromkeys(cores.kind for cores in host.cores))
    return Setting(status.version or "unknown", device, cpu, status.cpu_variant, status.cpu_features)


def a_phone(device: str) -> Setting:
    """Programs of the pinned runtime on a phone, which tells nothing of its own."""
    from skipcat_edge.runtime.pin import read_pin

    return Setting(read_pin().wheel_version, device, "unknown", None, ())


def rows_of(results: Sequence[Result], setting: Setting) -> list[Row]:
    """A row for each result; speeds in tokens/s, sizes in bytes, bandwidths in bytes/s."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [{
        "file": result.file, "file_bytes": result.file_bytes,
        "rank_level": result.rank_level, "progressive": result.progressive,
        "threads": result.threads, "prompt_tokens": result.prompt_tokens, "gen_tokens": result.gen_tokens,
        "repetitions": result.repetitions,
        **_spread("prompt_tps", result.prompt_tps), **_spread("first_token_s", result.first_token_s),
        **_spread("decode_tps", result.decode_tps),
        "load_s": result.load_s, "peak_rss_bytes": result.peak_rss_bytes,
        "allocated_bytes": result.allocated_bytes, "buffers": result.buffers,
        "bytes_per_token": result.bytes_per_token, "achieved_bandwidth": result.achieved_bandwidth,
        "read_bandwidth": result.read_bandwidth, "steadiness": result.steadiness,
        "celsius_before": result.conditions.celsius_before, "celsius_after": result.conditions.celsius_after,
        "throttled": list(result.conditions.throttled), "governor": result.conditions.governor,
        "cpus": list(result.conditions.cpus),
        "skipcat_edge": version("skipcat-edge"), "llama_cpp": setting.llama_cpp, "device": setting.device,
        "cpu": setting.cpu, "cpu_variant": setting.cpu_variant, "cpu_features": list(setting.cpu_features),
        "date": date,
    } for result in results]


def _spread(name: str, spread: Spread | None) -> dict[str, float | None]:
    if spread is None:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: spread.median, f"{name}_min": spread.min, f"{name}_max": spread.max}


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps(rows, indent=2)


def as_json_lines(rows: Sequence[Row]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def as_csv(rows: Sequence[Row]) -> str:
    """With a header; lists and tables are JSON in their cells."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(value) if isinstance(value, list | dict) else value
                         for key, value in row.items()})
    return out.getvalue().rstrip("\n")


def read_rows(path: Path) -> list[Row]:
    """Rows that an earlier run wrote as JSON or JSON lines. Raises UserError where `path` holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} cannot be read; give what `bench --output json` wrote.") from None
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            found = None
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not all(
        isinstance(row, dict) and {"file", "prompt_tps", *_SAME} <= row.keys() for row in found
    ):
        raise UserError(f"{path} holds no measurements; give what `bench --output json` wrote.")
    return found


@dataclass(frozen=True)
class Change:
    """A row, and how it compares with an earlier one."""

    row: Row
    prompt: float | None
    """Speed over the earlier speed; None without one."""
    decode: float | None
    differences: tuple[str, ...]
    """What else than the file and the flags is not as it was, as `name: then, now`."""


def changes(rows: Sequence[Row], earlier: Sequence[Row]) -> list[Change]:
    """Each of `rows` beside the last one of `earlier` with its file name, level, tokens and threads."""
    def key(row: Row) -> tuple[Any, ...]:
        levels = (row.get(name) for name in ("rank_level", "progressive"))  # older rows have none
        return (Path(row["file"]).name, *(row[name] for name in _SAME), *levels)

    before = {key(row): row for row in earlier}
    found = []
    for row in rows:
        then = before.get(key(row))
        if then is None:
            found.append(Change(row, None, None, ()))
            continue
        differences = tuple(f"{name}: {then.get(name)}, now {row[name]}" for name in (*_SETTING, "file_bytes")
                            if then.get(name) != row[name])
        found.append(Change(row, _over(row, then, "prompt_tps"), _over(row, then, "decode_tps"), differences))
    return found


def _over(row: Row, then: Row, name: str) -> float | None:
    return row[name] / then[name] if row[name] and then.get(name) else None
