"""The base file: what llama.cpp's own converter makes of the model.

Tokenizer, metadata and tensor names, and any permutation of weights that an architecture
needs, are llama.cpp's; nothing of it is repeated here.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader

from skipcat_edge import format as fmt
from skipcat_edge.errors import UserError
from skipcat_edge.extra import Phase

from .job import Job, is_full_disk
from .without_model_code import without_model_code

_EXACT = {GGMLQuantizationType.F32: "f32", GGMLQuantizationType.BF16: "bf16"}

BASE = "base.gguf"

_PROGRESS = re.compile(r"Writing:\s+(\d+)%")


def write_base(source: Path, out: Path, out_type: str, tree: Path, name: str | None = None,
               advance: Callable[[int], None] = lambda percent: None, allow_pickle: bool = False) -> None:
    """Run the pinned convert_hf_to_gguf.py of `tree` on `source`; `out_type`: f32, f16 or bf16.

    `name`: what the file calls the model (None: llama.cpp's converter decides).

    `advance` gets the percentage written. Raises UserError with the converter's own last line
    if it fails, and where the weights are pickles and not allowed.
    """
    with without_model_code(source, allow_pickle) as model:
        last = _run(model.folder, out, out_type, tree, name, advance)
        if last is None:
            return
        if is_full_disk(last):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
        raise UserError(f"llama.cpp's converter cannot convert {source}: {model.explain(source, last)}")


def _run(model: Path, out: Path, out_type: str, tree: Path, name: str | None,
         advance: Callable[[int], None]) -> str | None:
    """None, or the last line of a run that failed."""
    llama = tree / "vendor" / "llama.cpp"
    # one word each with what a name may begin with
    command = [sys.executable, str(llama / "convert_hf_to_gguf.py"), str(model), f"--outfile={out}",
               f"--outtype={out_type}", *([f"--model-name={name}"] if name else [])]
    # The archive's gguf-py, and nothing from the network.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(llama / "gguf-py"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, text=True, errors="replace") as process:
        assert process.stderr is not None
        last = ""
        # universal newlines: tqdm's carriage returns end lines
        for line in process.stderr:
            match = _PROGRESS.search(line)
            if match:
                advance(int(match[1]))
            elif line.strip():
                last = line.strip()
    return last if process.returncode else None


def open_base(
    path: Path | None, source: Path, job: Job, type_: GGMLQuantizationType, tree: Path, phase: Phase,
    name: str | None = None, allow_pickle: bool = False,
) -> GGUFReader:
    """The dense file at `path`; None: one that is made of `source` in the `job`, in F16 unless `type_` needs
    more, if it is not there yet.

    Raises UserError where it is low-rank already, or one part of several; else as `write_base`.
    """
    if path is None:
        path = job.path(BASE)
        if not job.has(BASE):
            _make_base(job, source, _EXACT.get(type_, "f16"), tree, phase, name, allow_pickle)
    reader = GGUFReader(path)
    if fmt.is_low_rank(reader):
        raise UserError(f"{path} is low-rank already; give a dense base file.")
    if int(fmt.field_value(reader, "split.count") or 1) > 1:
        raise UserError(f"{path} is one part of a split file; merge the parts with llama-gguf-split first.")
    return reader


def _make_base(job: Job, source: Path, out_type: str, tree: Path, phase: Phase, name: str | None,
               allow_pickle: bool) -> None:
    with phase("Converting to GGUF", 100) as advance, job.artifact(BASE) as path:
        done = 0

        def to(percent: int) -> None:
            nonlocal done
            advance(percent - done)
            done = percent

        write_base(source, path, out_type, tree, name, to, allow_pickle)
        to(100)
