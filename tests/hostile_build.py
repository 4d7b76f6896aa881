"""Build tests/cpp/hostile: the patched loader under sanitizers, or counting which of its lines run."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from skipcat_edge.runtime.build import build_env, find_tool, jobs
from skipcat_edge.runtime.source import patched_tree

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "cpp" / "hostile"


@dataclass(frozen=True)
class Build:
    """One way to compile the loader."""

    name: str
    """Its directory below build/hostile."""
    compilers: tuple[str, str]
    """For C and for C++."""
    targets: tuple[str, ...]
    options: tuple[str, ...] = ()


GCC = Build("gcc", ("gcc", "g++"), ("load_files",))
CLANG = Build("clang", ("clang", "clang++"), ("load_files", "fuzz_load"), ("-DSKIPCAT_FUZZER=ON",))
COVERAGE = Build("coverage", ("clang", "clang++"), ("load_files",), ("-DSKIPCAT_COVERAGE=ON",))


class BuildFailedError(Exception):
    """A compiler that is missing or that failed: its last lines."""


def build(how: Build) -> Path:
    """Compile the targets of `how`; returns the directory that they are in. Raises BuildFailedError."""
    tools = {name: shutil.which(name) for name in how.compilers} | {
        name: find_tool(name) for name in ("cmake", "ninja")
    }
    if missing := [name for name, path in tools.items() if path is None]:
        raise BuildFailedError(f"{', '.join(missing)} is not installed")
    tree, directory = patched_tree(), ROOT / "build" / "hostile" / how.name
    env = build_env(tree) | {"CCACHE_BASEDIR": os.path.commonpath([tree, ROOT])}
    ccache = find_tool("ccache")
    launchers = (
        [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in ("C", "CXX")] if ccache else []
    )
    configure = [
        str(tools["cmake"]),
        "-S",
        str(SOURCE),
        "-B",
        str(directory),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
        f"-DLLAMA_CPP={tree / 'vendor' / 'llama.cpp'}",
        "-DCMAKE_BUILD_TYPE=None",
        "-DCMAKE_C_FLAGS=-O1",
        "-DCMAKE_CXX_FLAGS=-O1",
        f"-DCMAKE_C_COMPILER={tools[how.compilers[0]]}",
        f"-DCMAKE_CXX_COMPILER={tools[how.compilers[1]]}",
        *launchers,
        *how.options,
    ]
    for command in (configure, [str(tools["ninja"]), "-C", str(directory), f"-j{jobs()}", *how.targets]):
        run = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            raise BuildFailedError(run.stdout[-4000:])
    return directory
