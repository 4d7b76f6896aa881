"""A broken low-rank file is refused when it is loaded, by name, and never crashes the process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from broken_files import BROKEN, Broken, sound_file
from broken_levels import BROKEN_LEVELS, sound_levels
from gguf_edit import GGUF

pytestmark = [pytest.mark.runtime, pytest.mark.trust]

WORKER = Path(__file__).with_name("load_worker.py")
SOUND, SOUND_LEVELS = "sound", "sound_levels"
ALL = BROKEN | BROKEN_LEVELS
assert len(ALL) == len(BROKEN) + len(BROKEN_LEVELS)


@dataclass(frozen=True)
class Results:
    """What the two ways to load made of every file; a crash is {"crash": how it ended}."""

    native: dict[str, dict[str, Any]]
    cli: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def files(demo_low_rank_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    directory = tmp_path_factory.mktemp("broken")
    paths = write_all(SOUND, sound_file(demo_low_rank_gguf), BROKEN, directory)
    small = tmp_path_factory.mktemp("small")
    paths |= write_all(SOUND_LEVELS, sound_levels(small), BROKEN_LEVELS, directory)
    yield paths
    for path in paths.values():
        path.unlink()


def write_all(sound_name: str, sound: GGUF, edits: dict[str, Broken], directory: Path) -> dict[str, Path]:
    paths = {sound_name: sound.write(directory / f"{sound_name}.gguf")}
    for name, broken in edits.items():
        file = sound.copy()
        if broken.edit:
            broken.edit(file)
        paths[name] = file.write(directory / f"{name}.gguf")
        if broken.damage:
            broken.damage(paths[name])
    return paths


@pytest.fixture(scope="module")
def results(files: dict[str, Path]) -> Results:
    return Results(load_all("native", files), load_all("cli", files))


def load_all(way: str, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Load `files` in as few processes as possible: after a crash the rest gets a new one."""
    names = {str(path): name for name, path in files.items()}
    found: dict[str, dict[str, Any]] = {}
    waiting = list(names)
    while waiting:
        run = subprocess.run([sys.executable, str(WORKER), way, *waiting], capture_output=True, text=True)
        events = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        found |= {names[event["done"]]: event for event in events if "done" in event}
        started = [event["start"] for event in events if "start" in event]
        assert started, run.stderr
        if run.returncode != 0:
            found[names[started[-1]]] = {"crash": f"exit code {run.returncode}: {run.stderr[-2000:]}"}
        else:
            assert len(started) == len(waiting)
        waiting = waiting[len(started):]
    return found


def test_rewriting_a_file_unchanged_changes_no_byte(demo_low_rank_gguf: Path, tmp_path: Path) -> None:
    copy = GGUF.read(demo_low_rank_gguf).write(tmp_path / "copy.gguf")
    assert copy.read_bytes() == demo_low_rank_gguf.read_bytes()


def test_the_sound_file_loads(results: Results) -> None:
    assert results.native[SOUND]["loaded"], results.native[SOUND]
    assert results.cli[SOUND]["code"] == 0, results.cli[SOUND]
    assert results.native[SOUND_LEVELS]["loaded"], results.native[SOUND_LEVELS]


@pytest.mark.parametrize("name", ALL)
def test_refused_by_the_library(results: Results, name: str) -> None:
    result = results.native[name]
    assert "crash" not in result, result["crash"]
    assert not result["loaded"]
    assert ALL[name].names in result["message"]


@pytest.mark.parametrize("name", ALL)
def test_refused_by_generate(results: Results, name: str) -> None:
    result = results.cli[name]
    assert "crash" not in result, result["crash"]
    assert (result["code"], result["stdout"]) == (2, ""), result
    line, end = result["stderr"].split("\n", 1)
    assert (line[:7], line[-1], end) == ("Error: ", ".", "")
    assert f"{name}.gguf" in line
    if ALL[name].damage is None:
        assert ALL[name].names in line
    else:  # found by gguf's reader, which does not always say where
        assert "damaged" in line


@pytest.mark.parametrize("name", ["format_version_3", "runtime_of_the_future"])
def test_a_file_for_a_newer_runtime_says_to_update(results: Results, name: str) -> None:
    assert "update skipcat-edge, then run `skipcat-edge runtime build" in results.cli[name]["stderr"]


def test_a_refusal_ends_the_real_program_with_2(files: dict[str, Path]) -> None:
    program = [sys.executable, "-c", "from skipcat_edge.cli import main; main()"]
    command = [*program, "generate", files["mask_of_ones"], "-n", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "blk.0.attn_in.skip_mask" in run.stderr and "Traceback" not in run.stderr
