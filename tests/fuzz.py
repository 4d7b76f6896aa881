"""`make fuzz`: libFuzzer on the patched loader under sanitizers, then which of our own lines were reached.

Prints executions, the corpus, and the coverage of each file of the overlay by the fuzzer's corpus together
with the files of tests/hostile_files.py. Ends with 1 if the fuzzer found a fault or the coverage is too low,
and with 2 where Clang is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile_build import CLANG, COVERAGE, ROOT, BuildFailedError, build
from hostile_files import every_mutation
from hostile_run import run_harness
from hostile_seeds import SEEDS, plain_file

from skipcat_edge import format as fmt
from skipcat_edge.runtime.build import jobs

DIRECTORY = ROOT / "build" / "fuzz"
INSTALL = "Clang, libFuzzer and llvm-cov are needed: sudo apt install clang llvm libclang-rt-14-dev"
LEAST_COVERAGE = 95.0
MAX_BYTES = 65536
OWN = re.compile(r"/(skipcat[\w-]*\.(?:cpp|h)|ggml-skipcat\.c|skip-[\w-]+\.(?:cpp|h))$")
# skip-rows.h also has code for other CPUs, which is not compiled and so not counted here.


def write_dictionary(path: Path) -> None:
    """The words of the format, for mutations that insert."""
    words = [value for name, value in vars(fmt).items() if name.startswith("KEY_")]
    words += [
        *fmt.GROUPS,
        *fmt.GROUP_OF,
        ".lr_a",
        ".lr_b",
        ".skip_mask",
        ".weight",
        ".0.0",
        ".1.2",
        "blk.0.",
        fmt.ARCHITECTURE_PREFIX,
    ]
    path.write_text("".join(f'"{word}"\n' for word in dict.fromkeys(words)), "utf-8")


def fuzz(program: Path, seconds: int) -> tuple[int, float, list[Path]]:
    """Run the fuzzer; returns its executions, the seconds that they took and the files that it found faults
    with."""
    corpus, seeds, faults = (DIRECTORY / name for name in ("corpus", "seeds", "faults"))
    shutil.rmtree(faults, ignore_errors=True)
    for directory in (corpus, seeds, faults):
        directory.mkdir(parents=True, exist_ok=True)
    for name, make in SEEDS.items():
        make().write(seeds / f"{name}.gguf")
    write_dictionary(DIRECTORY / "keys.dict")
    command = [
        str(program),
        f"-fork={jobs()}",
        "-ignore_crashes=1",
        "-ignore_timeouts=1",
        "-ignore_ooms=1",
        f"-max_total_time={seconds}",
        "-timeout=5",
        "-malloc_limit_mb=256",
        f"-max_len={MAX_BYTES}",
        "-print_funcs=0",
        f"-dict={DIRECTORY / 'keys.dict'}",
        f"-artifact_prefix={faults}/",
        str(corpus),
        str(seeds),
    ]
    began = time.monotonic()
    run = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={"ASAN_OPTIONS": "detect_leaks=0"},
    )
    took = time.monotonic() - began
    (DIRECTORY / "fuzz.log").write_text(run.stderr, "utf-8")
    executions = [int(number) for number in re.findall(r"^#(\d+): cov", run.stderr, re.M)]
    found = sorted(faults.iterdir())
    if not executions or took < seconds or (run.returncode and not found):
        sys.exit(f"The fuzzer ended by itself after {took:.0f} s; see {DIRECTORY / 'fuzz.log'}")
    return executions[-1], took, found


@dataclass(frozen=True)
class Coverage:
    """Lines of one file that can run, and that did."""

    name: str
    lines: int
    covered: int
    missed: tuple[int, ...]
    """Lines that did not run."""


def coverage(files: Iterable[Path]) -> list[Coverage]:
    """Coverage of each of our own files by loading `files`, with each form of the graph."""
    program, profiles = build(COVERAGE) / "load_files", DIRECTORY / "profiles"
    shutil.rmtree(profiles, ignore_errors=True)
    chosen = list(files)
    for fused in ("", "0", "1"):
        used = chosen if not fused else chosen[: len(SEEDS)]
        run_harness(
            program,
            used,
            {"SKIPCAT_FUSED": fused, "LLVM_PROFILE_FILE": f"{profiles}/{fused or 'auto'}-%p.profraw"},
        )
    data = profiles / "all.profdata"
    subprocess.run([_tool("llvm-profdata"), "merge", "-o", data, *profiles.glob("*.profraw")], check=True)
    exported = subprocess.run(
        [_tool("llvm-cov"), "export", program, f"-instr-profile={data}"], check=True, capture_output=True
    )
    found = [
        _of_file(entry)
        for entry in json.loads(exported.stdout)["data"][0]["files"]
        if OWN.search(entry["filename"])
    ]
    return sorted(found, key=lambda each: each.name)


def _of_file(entry: Any) -> Coverage:
    summary = entry["summary"]["lines"]
    segments = entry["segments"]  # of each: line, column, count, has a count, is an entry, is a gap
    missed = {line for line, _, count, counts, _, is_gap in segments if counts and not count and not is_gap}
    return Coverage(
        Path(str(entry["filename"])).name, summary["count"], summary["covered"], tuple(sorted(missed))
    )


def _tool(name: str) -> str:
    """The tool of the same release as Clang."""
    found = subprocess.run(
        ["clang", f"-print-prog-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    path = shutil.which(found) or shutil.which(name)
    if path is None:
        sys.exit(INSTALL)
    return path


def damaged_files() -> list[Path]:
    """The files of tests/hostile_files.py, written for the coverage."""
    directory = DIRECTORY / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    paths = []
    for i, mutation in enumerate(every_mutation()):
        paths.append(directory / f"{i}.gguf")
        paths[-1].write_bytes(mutation.data)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--report", type=Path, help="write what is printed as JSON, too")
    arguments = parser.parse_args()
    if shutil.which("clang") is None or shutil.which("clang++") is None:
        print(INSTALL, file=sys.stderr)
        sys.exit(2)
    try:
        program = build(CLANG) / "fuzz_load"
        executions, took, faults = fuzz(program, arguments.seconds)
        corpus = sorted((DIRECTORY / "corpus").iterdir())
        seeds = sorted((DIRECTORY / "seeds").iterdir())
        plain = plain_file().write(DIRECTORY / "plain.gguf")
        found = coverage([*seeds, plain, DIRECTORY / "missing.gguf", *corpus, *damaged_files()])
    except BuildFailedError as error:
        sys.exit(f"The fuzzer could not be built; {INSTALL}\n{error}")
    shutil.rmtree(DIRECTORY / "damaged")

    lines, covered = sum(each.lines for each in found), sum(each.covered for each in found)
    print(f"executions: {executions:,} in {took:.0f} s")
    print(f"corpus: {len(corpus):,} files, {sum(path.stat().st_size for path in corpus):,} bytes")
    for each in found:
        missed = f", not from line {', '.join(map(str, each.missed))}" if each.missed else ""
        print(f"coverage of {each.name}: {each.covered} of {each.lines} lines{missed}")
    share = 100 * covered / lines
    print(f"coverage of the overlay: {covered:,} of {lines:,} lines, {share:.1f} %")
    for path in faults:
        print(f"FAULT: {path}")
    if arguments.report:
        report = {
            "seconds": took,
            "executions": executions,
            "corpus": len(corpus),
            "faults": len(faults),
            "coverage": share,
        }
        arguments.report.write_text(json.dumps(report) + "\n", "utf-8")
    if share < LEAST_COVERAGE:
        print(f"The overlay's coverage is below {LEAST_COVERAGE:.0f} %.")
    sys.exit(bool(faults) or share < LEAST_COVERAGE)


if __name__ == "__main__":
    main()
