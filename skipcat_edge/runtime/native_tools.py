"""llama.cpp's own programs, stock and patched: the side-by-side references."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from skipcat_edge.errors import UserError
from skipcat_edge.runtime.build import build_dir, build_env, cmake_args, compilers, find_tool, jobs
from skipcat_edge.runtime.progress import run_logged
from skipcat_edge.runtime.source import log_path, patched_tree, stock_tree

TOOLS = ("llama-bench", "llama-perplexity", "llama-quantize")
KINDS = ("stock", "patched")


def build_native_tools(out: Path, kinds: Sequence[str] = KINDS, source: Path | None = None) -> list[Path]:
    """Build `TOOLS` of each kind into `out/<kind>/bin`; returns these directories.

    The stock and the patched programs and the wheel share their compile flags, so ccache shares
    what the patches leave alone. `source`: the archive to use instead of the package index.
    Raises UserError if CMake, Ninja or a compiler is missing, or with the log's path if a build fails.
    """
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if cmake is None or ninja is None:
        raise UserError("CMake and Ninja are needed; run `pip install 'skipcat-edge[build]'`.")
    compilers()  # before anything is fetched
    directories = []
    for kind in kinds:
        tree = stock_tree(source) if kind == "stock" else patched_tree(source)
        build = build_dir(tree, "native")
        log, env, title = log_path(f"native-{kind}"), build_env(tree), f"Building the {kind} tools"
        # From the wheel's own CMakeLists.txt, so that every object has the wheel's flags and paths.
        configure = [
            cmake, "-S", str(tree), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
            "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_OPENSSL=OFF", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
            *cmake_args(),
        ]
        run_logged(configure, title=f"Configuring the {kind} tools", log=log, env=env)
        compile_ = [ninja, "-C", str(build), f"-j{jobs()}", *TOOLS]
        run_logged(compile_, title=title, log=log, env=env, append=True)
        directories.append(_copy_new(build / "bin", out / kind / "bin"))
    return directories


def _copy_new(source: Path, target: Path) -> Path:
    """Copy programs and libraries whose time differs; the programs find the libraries beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        copy = target / file.name
        if not copy.exists() or copy.stat().st_mtime != file.stat().st_mtime:
            # A program that runs cannot be written to, only replaced.
            copy.unlink(missing_ok=True)
            shutil.copy2(file, copy)
    return target
