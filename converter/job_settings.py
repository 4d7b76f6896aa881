"""What a conversion's bytes depend on: its job is resumed only where all of it is the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skipcat_edge import __version__
from skipcat_edge.digest import sha256
from skipcat_edge.errors import UserError
from skipcat_edge.runtime.pin import read_pin

from .statistics_file import read_provenance, source_sha256
from .threads import Threads

if TYPE_CHECKING:
    from .options import ConvertOptions

THREADS = "number of threads"
"""The setting that a job resumed elsewhere keeps."""

# What computes, or says which tokens and tensors there are.
_PACKAGES = ("gguf", "numpy", "scipy", "tokenizers", "transformers")


def job_settings(options: ConvertOptions, digest: str) -> dict[str, Any]:
    """By the name that the user knows; `digest`: of the source.

    Raises UserError where the calibration text, the base file or the statistics cannot be read.
    """
    text = None if options.calibration is None else file_sha256(options.calibration, "Calibration text")
    known = None
    if text is None and options.stats is not None and options.stats.exists():
        # another file of the same name would be another calibration
        known = asdict(read_provenance(options.stats))
    linear, head = options.types.linear, options.types.head
    return {
        "model": digest,
        "source name": options.source_name or options.source.resolve().name,
        "calibration text": text,
        "calibration in --stats": known and hashlib.sha256(json.dumps(known).encode()).hexdigest(),
        "--base": None if options.base is None else file_sha256(options.base, "Base file"),
        "--ratio": options.ratio,
        "--budget": options.budget,
        "--bpw": options.bpw,
        "--levels": list(options.levels),
        "--level-overhead": options.level_overhead if options.levels else None,
        "--level-quant": options.types.correction.name if options.levels else None,
        "--quant": linear.name,
        "--head-quant": None if head is None else head.name,
        "--method": options.method.name,
        "--allocation": options.allocation,
        "grid of ranks": options.grid,
        "--rounding": "feedback" if options.rounding.feedback else "plain",
        "details of rounding": list(asdict(options.rounding).values()),
        "--stats": None if options.stats is None else str(options.stats.absolute()),
        "--no-compensation": not options.compensate,
        "--no-grad": not options.gradients,
        "--calib-tokens": options.calib_tokens,
        "--seq-len": options.seq_len,
        "--device": options.device,
        "--device-map": options.device_map,
        "--seed": options.seed,
        "--max-memory": options.max_memory,
        "version of skipcat-edge": __version__,
        "version of the runtime": read_pin().wheel_version,
        "version of PyTorch": torch.__version__,
        **{f"version of {name}": version(name) for name in _PACKAGES},
        THREADS: asdict(Threads.here()),
    }


def source_digest(options: ConvertOptions) -> str:
    """Hash of the source model. Statistics and outputs may lie in its directory."""
    return source_sha256(options.source, options.stats)


def file_sha256(path: Path, what: str) -> str:
    """Raises UserError, which begins with `what`, where it cannot be read."""
    try:
        stat = path.stat()
        return _sha256(path.absolute(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}.") from None


@cache  # many files may be made of one base
def _sha256(path: Path, _size: int, _changed: int) -> str:
    return sha256(path)
