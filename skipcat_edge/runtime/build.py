"""Build the wheel of the patched llama-cpp-python, and install it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import click
import psutil
from filelock import FileLock, Timeout

from skipcat_edge.cores import usable_cores
from skipcat_edge.errors import UserError
from skipcat_edge.runtime.pin import patches_dir, read_pin
from skipcat_edge.runtime.progress import run_logged
from skipcat_edge.runtime.source import cache_dir, log_path, patched_tree, writing_to
from skipcat_edge.runtime.target import Target, retag

# The largest translation units of llama.cpp take about this much memory to compile.
_BYTES_PER_JOB = 600 * 2**20
# CMake's default install rules put a second copy of the libraries, and headers, at the top of
# site-packages; llama_cpp/lib is what is loaded.
_WHEEL_EXCLUDE = ("/lib/**", "/include/**", "/bin/**")


def find_tool(name: str) -> str | None:
    """Path of a program: of this environment (which need not be activated) or on PATH."""
    here = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([here, os.environ.get("PATH", os.defpath)]))


def cmake_args(own: Sequence[str] = ()) -> list[str]:
    """CMake arguments that the wheel and the native tools share, then a build's `own`, and last those of
    SKIPCAT_EDGE_CMAKE_ARGS, which so win."""
    args = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_RPC=ON",
        "-DLLAVA_BUILD=OFF",
        # Wheels hold no symbolic links: libllama.so, .so.0 and .so.0.5.0 would be three copies.
        "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
        # Unity sources with relative paths are the same in every tree (CMake 4 on; else ignored).
        "-DCMAKE_UNITY_BUILD_RELOCATABLE=ON",
        f"-DCMAKE_PROJECT_INCLUDE={patches_dir() / 'flags.cmake'}",
    ]
    if ccache := find_tool("ccache"):
        args += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in ("C", "CXX")]
    try:
        return [*args, *own, *shlex.split(os.environ.get("SKIPCAT_EDGE_CMAKE_ARGS", ""))]
    except ValueError as error:
        raise UserError(f"SKIPCAT_EDGE_CMAKE_ARGS is no shell words ({error}); mend its quotes.") from None


def build_env(tree: Path, target: Target | None = None) -> dict[str, str]:
    """Environment of a build of `tree`, whose build directory lies beside it."""
    env = dict(os.environ)
    # CMAKE_ARGS belongs to other projects' builds; ours reads SKIPCAT_EDGE_CMAKE_ARGS.
    env.pop("CMAKE_ARGS", None)
    return env | compilers(target) | {
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs()),
        "PYTHONUNBUFFERED": "1",
        "NINJA_STATUS": "[%f/%t] ",
        # Objects are shared between trees in different places.
        "CCACHE_BASEDIR": str(tree.parent),
        "CCACHE_NOHASHDIR": "1",
        # A cache inside some repository must not compile that repository's commit in.
        "GIT_CEILING_DIRECTORIES": str(tree.parent),
    }


def build_dir(tree: Path, name: str) -> Path:
    """Build directory beside `tree`, its objects kept but not what earlier CMake arguments set."""
    directory = tree.parent / name
    (directory / "CMakeCache.txt").unlink(missing_ok=True)
    return directory


def jobs() -> int:
    """Compilers to run at once: one per core that this process may use, if memory allows."""
    return max(1, min(usable_cores(), int(psutil.virtual_memory().total // _BYTES_PER_JOB)))


def compilers(target: Target | None = None) -> dict[str, str]:
    """CC and CXX of every build: CMake and scikit-build-core would choose different names for one
    compiler, and ccache takes those for two. Raises UserError if there is no C++ compiler."""
    if target is not None and target.compilers:
        for name in target.compilers.values():
            if find_tool(name) is None:
                raise UserError(f"{name} was not found; install it, on Debian with "
                                f"`sudo apt install g++-{target.triple.replace('_', '-')}`.")
        return target.compilers
    if sys.platform == "win32":
        return {}
    found = {}
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        compiler = os.environ.get(variable) or next(filter(None, map(find_tool, names)), None)
        if compiler is None:
            raise UserError("No C++ compiler was found; install one, for example `sudo apt install g++`.")
        found[variable] = compiler
    return found


@contextmanager
def one_build() -> Iterator[None]:
    """Waits while another process builds: both would change the same trees and build directories."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache_dir() / "build.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        click.echo("Waiting for another build to end ...", err=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@one_build()
def build_wheel(out: Path, source: Path | None = None, target: Target | None = None) -> Path:
    """Build the patched wheel into the directory `out`; returns its path.

    `source`: archive or unpacked tree to use instead of the package index. `target`: None for this
    very machine and no other. Raises UserError with the log's path if the build fails; `out` then
    holds nothing new.
    """
    compilers(target)  # before anything is fetched
    tree = patched_tree(source)
    # upstream's CMake installs here too, and the wheel takes what it finds
    shutil.rmtree(tree / "llama_cpp" / "lib", ignore_errors=True)
    own = [f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={patches_dir() / 'wheel.cmake'}"]
    args = cmake_args(own + ([] if target is None else target.cmake_args))
    name = "wheel" if target is None else f"wheel-{target.architecture}"
    env = build_env(tree, target) | {
        # Environment variables, because pip passes --config-settings only since 22.1 and repeated
        # ones only since 23.1.
        "SKBUILD_CMAKE_ARGS": ";".join(args),
        "SKBUILD_BUILD_TARGETS": "llama",
        "SKBUILD_BUILD_DIR": str(build_dir(tree, name)),
        "SKBUILD_WHEEL_EXCLUDE": ";".join(_WHEEL_EXCLUDE),
    }
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--verbose", "--disable-pip-version-check"]
    if find_spec("scikit_build_core") is not None and find_tool("cmake") and find_tool("ninja"):
        command.append("--no-build-isolation")
    with writing_to(out) as temp:
        run_logged([*command, "--wheel-dir", str(temp), str(tree)], title="Building the runtime",
                   log=log_path(name), env=env)
        (wheel,) = temp.glob("*.whl")
        if target is not None:
            wheel = retag(wheel, target, log_path("tag"))
        return wheel.replace(out / wheel.name)


def install_wheel(wheel: Path) -> None:
    """Install `wheel` into this Python's environment, in place of any llama-cpp-python there."""
    pin = read_pin()
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", str(wheel)]
    try:
        # pip skips a version that it sees installed; what that one depends on is there already.
        if metadata.version(pin.package) == pin.wheel_version:
            command += ["--force-reinstall", "--no-deps"]
    except metadata.PackageNotFoundError:
        pass
    run_logged(command, title=f"Installing {wheel.name}", log=log_path("install"))
