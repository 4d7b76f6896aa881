"""The wheel for all x86-64 machines, on CPUs that this one is not: its Python run by qemu, as each of them.

Part of `make test-arm`, like the other wheel for machines that are not here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from greedy_tokens import assert_same_tokens
from made_once import Once

from skipcat_edge.runtime.build import build_wheel
from skipcat_edge.runtime.target import Target

pytestmark = [pytest.mark.arm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "x86"
EMULATOR = "qemu-x86_64"
# qemu's name of a CPU -> the variant that must be chosen on it; it emulates no AVX-512
CPUS = {"Nehalem": "sse42", "SandyBridge": "sandybridge", "Haswell": "haswell"}
every_cpu = pytest.mark.parametrize("cpu", CPUS)
PROMPT = "Once upon a time, there was a little fox who"
CHECK = "from skipcat_edge.cli import main; main(['runtime', 'check'])"


def build_packages(folder: Path) -> None:
    wheel = build_wheel(BUILD, None, Target("x86_64"))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder),
                    str(wheel)], check=True)


@pytest.fixture(scope="session")
def packages(once: Once) -> Path:
    """A folder with the wheel's llama_cpp, to come before this environment's own."""
    if platform.machine() != "x86_64" or shutil.which(EMULATOR) is None:
        pytest.skip("needs x86-64, and qemu-user (sudo apt install qemu-user)")
    return once("packages", build_packages)


def run(packages: Path, cpu: str | None, *arguments: str) -> str:
    """Python with `arguments`, as `cpu` or as this machine."""
    emulated = [EMULATOR, "-cpu", cpu] if cpu else []
    # NumPy's BLAS, which is not looked at here, may take an emulated CPU for one that can do more
    blas = {"OPENBLAS_CORETYPE": "Nehalem"} if cpu else {}
    done = subprocess.run([*emulated, sys.executable, *arguments], capture_output=True, text=True,
                          env={**os.environ, **blas, "PYTHONPATH": str(packages)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@every_cpu
def test_the_best_variant_is_chosen(packages: Path, cpu: str) -> None:
    out = run(packages, cpu, "-c", CHECK)
    assert f"CPU variant      {CPUS[cpu]}\n" in out
    features = out.partition("CPU features")[2].partition("\n")[0].split()
    assert ("AVX2" in features) == (cpu == "Haswell")
    assert "AVX512" not in features


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "F16"])
def test_greedy_tokens_are_the_same_on_all(
    packages: Path, quant: str, demo_by_type: dict[str, Path]
) -> None:
    worker = [str(ROOT / "tests" / "greedy_worker.py"), str(demo_by_type[quant]), PROMPT, "24"]
    here = run(packages, None, *worker)
    for cpu in CPUS:
        assert_same_tokens(here, run(packages, cpu, *worker), 24)
