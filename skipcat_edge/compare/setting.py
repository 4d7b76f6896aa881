"""How a comparison was measured, and what to keep in mind, for the foot of the page."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from skipcat_edge.bench_rows import Row
from skipcat_edge.compare.request import Request, printable
from skipcat_edge.digest import sha256

_STEADY = 0.9  # of the first repetition's speed, as `bench` reports it


def setting_of(request: Request, row: Row, quality: Mapping[str, Any],
               calibration_tokens: int | None) -> dict[str, str]:
    """Name -> value. `row`: the reference's of the bench; `quality`: its evaluation."""
    read = f"{quality['lines']:,} lines" if "lines" in quality else \
        f"{quality['tokens']:,} tokens, windows of {request.window}"
    found = {"text": f"{_text(request.text)}, the first {read}"}
    if request.calibration is not None and calibration_tokens is not None:
        found["calibration"] = f"{_text(request.calibration)}, {calibration_tokens:,} tokens"
        found["method"] = request.method
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    decoded = "" if row["decode_tps"] is None else f", {row['gen_tokens']} tokens decoded"
    found["speed"] = (f"prompt of {row['prompt_tokens']} tokens{decoded}, {threads}; medians of "
                      f"{row['repetitions']} repetitions in which all files took turns")
    found["machine"] = f"{row['cpu']} ({platform.machine()}), {platform.system()} {platform.release()}"
    if row["read_bandwidth"]:
        found["memory"] = f"{row['read_bandwidth'] / 1e9:.1f} GB/s, read by {threads}"
    if row["celsius_before"] is not None and row["celsius_after"] is not None:
        found["CPU temperature"] = (f"{row['celsius_before']:.1f} °C before, "
                                    f"{row['celsius_after']:.1f} °C after")
    found["versions"] = f"skipcat-edge {row['skipcat_edge']}, llama-cpp-python {row['llama_cpp']}"
    found["date"] = str(row["date"])
    if request.command:
        found["command"] = request.command
    return found


def _text(path: Path) -> str:
    return f"{printable(path.name)} (SHA-256 {sha256(path)[:12]}…)"


def notes_of(request: Request, impossible: Mapping[str, str], left_out: Mapping[str, str],
             rows: Mapping[Path, Row]) -> Iterator[str]:
    """Files that cannot be had or measured, and what makes figures worse or better than they should be."""
    for name, reason in impossible.items():
        yield f"There is no {name}: {reason.rstrip('.')}."
    for name, reason in left_out.items():
        yield f"{name} is left out: {reason.rstrip('.')}."
    if request.calibration is not None and sha256(request.calibration) == sha256(request.text):
        yield ("The files are measured on the text that they were calibrated with, which flatters all but "
               "plain quantisation; give another --text.")
    if request.repetitions == 1:
        yield ("Speeds were measured once, so their noise is not known and each difference counts; give more "
               "--repetitions.")
    for path, row in rows.items():
        if row["steadiness"] < _STEADY:
            yield (f"{printable(path.name)}: {1 - row['steadiness']:.0%} slower in the last repetition than "
                   "in the first; the machine may throttle or be busy.")
    first = next(iter(rows.values()))
    if first["throttled"]:
        yield (f"The machine slowed itself down ({', '.join(first['throttled'])}): the speeds are too low.")
    if first["governor"] not in (None, "performance"):
        yield f"The CPUs' governor is {first['governor']}: clocks may change while it measures."
