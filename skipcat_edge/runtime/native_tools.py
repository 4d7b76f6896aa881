"""llama.cpp's own programs, stock and patched: the side-by-side references."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from skipcat_edge.errors import UserError
from skipcat_edge.runtime.build import build_dir, build_env, cmake_args, compilers, find_tool, jobs, one_build
from skipcat_edge.runtime.progress import run_logged
from skipcat_edge.runtime.source import log_path, patched_tree, stock_tree
from skipcat_edge.runtime.target import Target

TOOLS = ("llama-bench", "llama-perplexity", "llama-quantize")
KINDS = ("stock", "patched")
_TOOLS_ONLY = ("-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
               "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_OPENSSL=OFF")
PHONE_TOOLS = ("llama-completion", "llama-bench", "llama-perplexity")


@one_build()
def build_native_tools(out: Path, kinds: Sequence[str] = KINDS, source: Path | None = None) -> list[Path]:
    """Build `TOOLS` of each kind into `out/<kind>/bin`; returns these directories.

    The stock and the patched programs and the wheel share their compile flags, so ccache shares
    what the patches leave alone. `source`: the archive to use instead of the package index.
    Raises UserError if CMake, Ninja or a compiler is missing, or with the log's path if a build fails.
    """
    cmake, ninja = _build_tools()
    compilers()  # before anything is fetched
    directories = []
    for kind in kinds:
        tree = stock_tree(source) if kind == "stock" else patched_tree(source)
        build = build_dir(tree, "native")
        log, env, title = log_path(f"native-{kind}"), build_env(tree), f"Building the {kind} tools"
        # From the wheel's own CMakeLists.txt, so that every object has the wheel's flags and paths.
        configure = [
            cmake, "-S", str(tree), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            *cmake_args([*_TOOLS_ONLY, "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON"]),
        ]
        run_logged(configure, title=f"Configuring the {kind} tools", log=log, env=env)
        compile_ = [ninja, "-C", str(build), f"-j{jobs()}", *TOOLS]
        run_logged(compile_, title=title, log=log, env=env, append=True)
        directories.append(_copy_new(build / "bin", out / kind / "bin"))
    return directories


@one_build()
def build_phone_tools(out: Path, target: Target, march: str, source: Path | None = None) -> Path:
    """Build `PHONE_TOOLS` into the directory `out`, patched and static: copied to a phone they run over adb,
    on any Linux kernel of `target`, and need no C library of the phone's.

    `march`: the compiler's name of the instruction set; a program for a newer one than the phone has dies
    of an illegal instruction. Raises UserError as `build_native_tools`.
    """
    cmake, ninja = _build_tools()
    compilers(target)
    tree = patched_tree(source)
    build = build_dir(tree, f"phone-{march}")
    log, env = log_path("phone"), build_env(tree, target)
    # llama.cpp's own project: the Python package's builds shared libraries only
    configure = [
        cmake, "-S", str(tree / "vendor" / "llama.cpp"), "-B", str(build), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        *cmake_args([
            *_TOOLS_ONLY, *target.cross_args, "-DGGML_RPC=OFF", "-DGGML_OPENMP=OFF", "-DGGML_NATIVE=OFF",
            f"-DGGML_CPU_ARM_ARCH={march}", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_STATIC=ON",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",
        ]),
    ]
    run_logged(configure, title="Configuring the phone's tools", log=log, env=env)
    run_logged([ninja, "-C", str(build), f"-j{jobs()}", *PHONE_TOOLS], title="Building the phone's tools",
               log=log, env=env, append=True)
    return _copy_new(build / "bin", out, PHONE_TOOLS)


def _build_tools() -> tuple[str, str]:
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if cmake is None or ninja is None:
        raise UserError("CMake and Ninja are needed; run `pip install 'skipcat-edge[build]'`.")
    return cmake, ninja


def _copy_new(source: Path, target: Path, names: Sequence[str] | None = None) -> Path:
    """Copy programs and libraries (of `names`, if given) whose time differs; programs find libraries beside
    them."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if names is not None and file.name not in names:
            continue
        copy = target / file.name
        if not copy.exists() or copy.stat().st_mtime != file.stat().st_mtime:
            # A program that runs cannot be written to, only replaced.
            copy.unlink(missing_ok=True)
            shutil.copy2(file, copy)
    return target
