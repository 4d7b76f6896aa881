"""Thousands of damaged files against the loader under sanitizers, and against the reader in Python.

None may crash either, take more than 5 s or more memory than the file accounts for; what is refused is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_files
import pytest
from click.testing import CliRunner
from hostile_build import CLANG, GCC, BuildFailedError, build
from hostile_files import Mutation
from hostile_run import RUNTIME_BYTES, VOCABULARY_BYTES, Verdict, run_harness
from hostile_seeds import SEEDS, plain_file

from skipcat_edge.cli import main
from skipcat_edge.errors import UserError
from skipcat_edge.inspection import inspect
from skipcat_edge.session import model_info

pytestmark = [pytest.mark.slow, pytest.mark.runtime, pytest.mark.trust]

BATCH = 500
KINDS = (
    "truncation",
    "flipped bits",
    "flipped mask bits",
    "offsets",
    "dimensions",
    "tensor types",
    "lengths",
    "numbers",
    "duplicates",
    "missing",
    "swapped",
    "other types",
    "versions and levels",
    "key types",
    "vocabularies",
    "other keys",
    "additions",
    "architectures",
    "alignments",
    "hogs",
)
# a name in quotes, a key's full name, or the place of a key or tensor whose name cannot be read
NAMES_SOMETHING = re.compile(
    r"'[^']*[a-z][^']*'|\bheader\b|(key|tensor) \d+ "
    r"|\b(tokenizer|general|skipcat|llama|bert)\.(?!cpp)[a-z_]+\b"
    r"|invalid magic|GGUF file is version|tokenizer (vocab|merges) in|Byte token for <"  # llama.cpp's words
)


@dataclass(frozen=True)
class Outcome:
    """One mutation (without its bytes) and what became of it."""

    mutation: Mutation
    size: int
    verdict: Verdict


@pytest.fixture(scope="module")
def harness() -> Path:
    # the fuzzer's build, where it can be made, has the same program
    with suppress(BuildFailedError):
        return build(CLANG) / "load_files"
    try:
        return build(GCC) / "load_files"
    except BuildFailedError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def every_mutation() -> list[Mutation]:
    return list(hostile_files.every_mutation())


def in_batches(chosen: list[Mutation], directory: Path, use: Callable[[dict[Path, Mutation]], None]) -> None:
    """Write the files, a batch at a time, for `use`."""
    for start in range(0, len(chosen), BATCH):
        paths = {
            directory / f"{start + i}.gguf": mutation
            for i, mutation in enumerate(chosen[start : start + BATCH])
        }
        for path, mutation in paths.items():
            path.write_bytes(mutation.data)
        use(paths)
        for path in paths:
            path.unlink()


@pytest.fixture(scope="module")
def outcomes(
    harness: Path, every_mutation: list[Mutation], tmp_path_factory: pytest.TempPathFactory
) -> list[Outcome]:
    found: list[Outcome] = []

    def load(paths: dict[Path, Mutation]) -> None:
        verdicts = run_harness(harness, paths)
        for path, mutation in paths.items():
            brief = Mutation(mutation.kind, mutation.name, b"", mutation.names, mutation.refused)
            found.append(Outcome(brief, len(mutation.data), verdicts[path]))

    in_batches(every_mutation, tmp_path_factory.mktemp("hostile"), load)
    return found


def test_the_sound_files_load(harness: Path, tmp_path: Path) -> None:
    makers = SEEDS | {"plain": plain_file}
    paths = [make().write(tmp_path / f"{name}.gguf") for name, make in makers.items()]
    for path, verdict in run_harness(harness, paths).items():
        assert verdict.loaded and not verdict.fault, (path.name, verdict)
        assert 0 < verdict.nbytes < RUNTIME_BYTES


def test_the_harness_tells_a_fault_from_a_refusal(harness: Path, tmp_path: Path) -> None:
    """With no room for any allocation a sound file ends the process: what is asserted below can fail."""
    path = SEEDS["skip"]().write(tmp_path / "skip.gguf")
    (verdict,) = run_harness(harness, [path], {"ASAN_OPTIONS": "max_allocation_size_mb=1"}).values()
    assert "allocation-size-too-big" in verdict.fault


def test_there_are_thousands_of_all_kinds(outcomes: list[Outcome], record_property: Any) -> None:
    refused = sum(not outcome.verdict.loaded for outcome in outcomes)
    record_property("shown", f"{len(outcomes):,} damaged files, {refused:,} refused")
    assert len(outcomes) >= 2000
    assert {outcome.mutation.kind for outcome in outcomes} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_and_every_refusal_names_its_cause(outcomes: list[Outcome], kind: str) -> None:
    failures = [
        f"{o.mutation.name}: {why}" for o in outcomes if o.mutation.kind == kind and (why := complaint(o))
    ]
    assert not failures, f"{len(failures)} of them:\n" + "\n".join(failures[:20])


def complaint(outcome: Outcome) -> str:
    """What is wrong with an outcome; empty where nothing is."""
    mutation, verdict = outcome.mutation, outcome.verdict
    if verdict.fault:
        return verdict.fault
    most = 2 * outcome.size + (VOCABULARY_BYTES if mutation.kind == "hogs" else RUNTIME_BYTES)
    if verdict.nbytes > most:
        return f"{verdict.nbytes} bytes were allocated for a file of {outcome.size}"
    if verdict.loaded:
        return "loaded" if mutation.refused else ""
    if mutation.kind == "architectures":  # each has words of its own for what it lacks
        return "" if verdict.message else "refused without a word"
    if not NAMES_SOMETHING.search(verdict.message):
        return f"refused without a name: {verdict.message}"
    if mutation.names and not any(name in verdict.message for name in mutation.names):
        return f"expected {' or '.join(mutation.names)} in: {verdict.message}"
    return ""


def test_python_reads_or_refuses_one_in_five(every_mutation: list[Mutation], tmp_path: Path) -> None:
    """Our own reader says in a sentence what is wrong with a file, or reads it."""
    failures: list[str] = []

    def read(paths: dict[Path, Mutation]) -> None:
        for path, mutation in paths.items():
            try:
                model_info(path)
                inspect(path)
            except UserError as error:
                if str(path) not in error.message or "\n" in error.message or not error.message.endswith("."):
                    failures.append(f"{mutation.name}: {error.message}")
            except Exception as error:
                failures.append(f"{mutation.name}: {type(error).__name__}: {error}")

    in_batches(every_mutation[::5], tmp_path, read)
    assert not failures, f"{len(failures)} of them:\n" + "\n".join(failures[:20])


def test_the_command_ends_with_2_and_a_sentence(every_mutation: list[Mutation], tmp_path: Path) -> None:
    """The same through the command line, for one of each kind."""
    chosen = [next(m for m in every_mutation if m.kind == kind) for kind in KINDS]

    def read(paths: dict[Path, Mutation]) -> None:
        for path in paths:
            result = CliRunner().invoke(main, ["inspect", str(path)])
            assert result.exit_code in (0, 2) and (result.exit_code == 0) == (result.stderr == ""), result
            assert "Traceback" not in result.stderr

    in_batches(chosen, tmp_path, read)
