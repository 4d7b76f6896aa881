"""SKIP_GATHER and SKIP_MUL_MAT under AddressSanitizer and UndefinedBehaviorSanitizer, NEON by emulation."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from skipcat_edge.runtime.pin import patches_dir
from skipcat_edge.runtime.source import stock_tree

DRIVERS = Path(__file__).resolve().parent / "cpp"
KERNELS = Path("vendor", "llama.cpp", "ggml", "src", "ggml-cpu")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CPU_LACKS_IT = 77

X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")
# The code paths of this machine -> what compiles to them.
PATHS: dict[str, tuple[str, ...]] = {"neon": ()} if ARM else {"generic": ()}
if X86:
    PATHS["avx2"] = ("-mavx2",)


@dataclass(frozen=True)
class Toolchain:
    compile: tuple[str, ...]
    """Compiler and flags."""
    run: tuple[str, ...] = ()
    """What runs its programs, where this machine does not."""

    def build_and_run(self, source: Path, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        subprocess.run([*self.compile, str(source), "-o", str(program)], check=True, capture_output=True)
        # Leaks cannot be looked for under emulation or a debugger, and are not the point.
        env = {"ASAN_OPTIONS": "detect_leaks=0", "PATH": ""}
        return subprocess.run([*self.run, str(program), *arguments], env=env, capture_output=True, text=True)

    def works(self, directory: Path) -> bool:
        """Whether it can build and run an empty program: sanitizers are a package of their own."""
        source = directory / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        try:
            return self.build_and_run(source, directory / "empty").returncode == 0
        except (OSError, subprocess.CalledProcessError):
            return False


@dataclass(frozen=True)
class Driver:
    source: Path
    min_cases: int
    one_of: int = 1
    """How many cases there are to each one that is run where threads are slow."""


MUL_MAT = Driver(DRIVERS / "skip_mul_mat_sanitize.cpp", 20_000, 5)
each_driver = pytest.mark.parametrize("driver", [
    pytest.param(Driver(DRIVERS / "skip_gather_sanitize.cpp", 50_000), id="skip_gather"),
    pytest.param(MUL_MAT, id="skip_mul_mat"),
])  # fmt: skip


def check_kernels(driver: Driver, toolchain: Toolchain, directory: Path, path: str, one_of: int = 1) -> None:
    """Run the driver; it names the code path that it was compiled to, and how many cases it ran: one of so
    many."""
    ggml = stock_tree() / "vendor" / "llama.cpp" / "ggml"
    include = [patches_dir() / "overlay" / KERNELS, ggml / "include", ggml / "src", ggml / "src" / "ggml-cpu"]
    flags = ("-std=c++17", "-O1", "-g", "-pthread", *(f"-I{folder}" for folder in include))
    complete = Toolchain((*toolchain.compile, *flags), toolchain.run)
    arguments = [str(one_of)] if one_of > 1 else []
    try:
        result = complete.build_and_run(driver.source, directory / "driver", *arguments)
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr.decode("utf-8", "replace"))
    if result.returncode == CPU_LACKS_IT:
        pytest.skip(f"this CPU has no {path}")
    assert result.returncode == 0, result.stderr[:4000]
    name, cases, _ = result.stdout.split()
    assert name == f"{path}:" and int(cases) > driver.min_cases // one_of


@pytest.mark.parametrize("path", PATHS)
@each_driver
def test_natively(driver: Driver, path: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("neither g++ nor clang++ is installed")
    toolchain = Toolchain((compiler, *SANITIZE, *PATHS[path]))
    if not toolchain.works(tmp_path):
        pytest.skip(f"{compiler} has no sanitizers")
    check_kernels(driver, toolchain, tmp_path, path)


@pytest.mark.skipif(not X86, reason="the generic path is compiled on x86-64 only")
def test_threads_do_not_race(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    toolchain = Toolchain((compiler or "c++", "-fsanitize=thread"))
    if not toolchain.works(tmp_path):
        pytest.skip("there is no ThreadSanitizer")
    check_kernels(MUL_MAT, toolchain, tmp_path, "generic", MUL_MAT.one_of)


@pytest.mark.slow
@each_driver
def test_neon_by_emulation(driver: Driver, tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("aarch64-linux-gnu-g++ and qemu-aarch64 are not both installed")
    libc = subprocess.run([compiler, "-print-file-name=libc.so.6"], capture_output=True, check=True).stdout
    root = Path(libc.decode().strip()).resolve().parent.parent
    toolchain = Toolchain((compiler, *SANITIZE, "-static-libasan"), (emulator, "-L", str(root)))
    if not toolchain.works(tmp_path):
        toolchain = Toolchain((compiler, "-static"), (emulator,))
    check_kernels(driver, toolchain, tmp_path, "neon", driver.one_of)
