"""A phone for `bench --adb` that is no phone: a transcript, or this machine's shell."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from gguf import GGUFWriter, PoolingType

from skipcat_edge.cli import main

_DATA = Path(__file__).resolve().parent / "data"
RECORDED, FAKE = _DATA / "adb-pixel-8.jsonl", _DATA / "fake_adb.py"


class Phone:
    """A fake adb, first on PATH, and the files of this computer."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        program = self.bin / "adb"
        program.write_text(f"#!{sys.executable}\n{FAKE.read_text('utf-8')}", encoding="utf-8")
        program.chmod(0o755)
        (folder / "build" / "phone" / "pixel-8").mkdir(parents=True)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")
        self.tool = folder / "build" / "phone" / "pixel-8" / "llama-bench"
        self.tool.write_text("#!/bin/sh\n")
        self.dense, self.skipcat = self.model("dense.gguf"), self.model("skipcat.gguf")
        self._entries: Sequence[dict[str, Any]] = ()

    def model(self, name: str, architecture: str = "llama", note: str = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        writer = GGUFWriter(path, architecture)
        writer.add_description(note or name)
        if architecture == "bert":
            writer.add_uint32("bert.pooling_type", PoolingType.MEAN)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    def play(self, *entries: dict[str, Any]) -> None:
        """Answer with `entries`, in this order, and nothing else."""
        self._entries = entries
        (self.bin / "transcript.json").write_text(json.dumps(entries))
        (self.bin / "done").unlink(missing_ok=True)

    def recorded(self) -> list[dict[str, Any]]:
        """The entries of the transcript in tests/data."""
        text = "\n".join(RECORDED.read_text("utf-8").splitlines()[1:])  # the first says what the others are
        for file in (self.tool, self.dense, self.skipcat):
            text = text.replace(f"@{file.name}@", str(file))
            text = text.replace(f"@size:{file.name}@", str(file.stat().st_size))
        assert not re.search(r"@\S+@", text)
        return [json.loads(line) for line in text.splitlines()]

    def be_this_machine(self, tool: str) -> None:
        """Run everything here; `tool` is a shell script in place of llama-bench."""
        (self.bin / "phone").mkdir()
        self.tool.write_text(tool)

    def done(self) -> list[list[str]]:
        """What adb was called with."""
        done = self.bin / "done"
        return [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []

    def bench(self, *files: Path | str, options: Sequence[str] = ("--device", "pixel-8"),
              prompt: int = 128, generated: int = 64, repetitions: int = 3) -> Result:
        sizes = "--prompt-tokens", prompt, "--gen-tokens", generated, "--repetitions", repetitions
        result = CliRunner().invoke(main, ["bench", "--adb", *options, *map(str, (*sizes, *files))])
        if self._entries:
            calls = [entry["argv"] for entry in self._entries]
            assert self.done() == calls, f"after {result.output}"
        return result
