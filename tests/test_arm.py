"""The aarch64 wheel without Arm hardware: installed in an arm64 Debian, its programs run by qemu.

Not part of `make test`: `make test-arm` builds the wheel and the Debian first, which takes a while.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from arm_debian import ArmDebian, UnavailableError, download, missing_packages
from bench_instructions import EMULATOR, new_counter
from click.testing import CliRunner
from conversion import DEMO, convert_model
from fake_phone import Phone
from greedy_tokens import assert_same_tokens
from made_once import Once

from skipcat_edge.cli import main
from skipcat_edge.device import load_device
from skipcat_edge.runtime.build import build_wheel
from skipcat_edge.runtime.native_tools import PHONE_TOOLS, build_phone_tools
from skipcat_edge.runtime.target import Target

pytestmark = [pytest.mark.arm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "arm"
# qemu's name of a CPU -> the variant that must be chosen on it
CPUS = {
    "cortex-a72": "armv8.0_1",  # Raspberry Pi 4: no dotprod
    "neoverse-n1": "armv8.2_2",  # the cortex-a76 of a Raspberry Pi 5 in all that counts: dotprod, fp16
    "max,sve=off,sme=off": "armv8.6_0",  # phones: i8mm, no SVE
    # SVE with the 128 bits that phones have; ggml's own kernels are wrong at 512, which nothing with i8mm has
    "max,sme=off,sve-default-vector-length=16": "armv8.6_2",
}
OP_TESTS = ("test_skip_gather.py", "test_skip_mul_mat.py")
every_cpu = pytest.mark.parametrize("cpu", CPUS)
PROMPT = "Once upon a time, there was a little fox who"


def build_debian(_: Path) -> None:
    """In the folder BUILD; its Debian is kept, what is ours in there is made anew."""
    wheels = BUILD / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for old in wheels.glob("*skipcat*"):
        old.unlink()
    runtime = build_wheel(wheels, None, Target("aarch64"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels),
                    str(ROOT)], check=True)
    (own,) = wheels.glob("skipcat_edge-*.whl")
    download([str(runtime), str(own), "pytest"], wheels)
    try:
        system = ArmDebian(BUILD)
    except UnavailableError as error:
        pytest.skip(str(error))
    system.install(wheels, ["skipcat-edge", f"/wheels/{runtime.name}", "pytest"])
    tests = system.root / "root" / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    tests.mkdir()
    for name in (*OP_TESTS, "greedy_worker.py"):
        shutil.copy(ROOT / "tests" / name, tests)


@pytest.fixture(scope="session")
def debian(once: Once) -> ArmDebian:
    """An arm64 Debian with skipcat-edge, the cross-built runtime and pytest in /venv."""
    if missing := missing_packages():
        pytest.skip(f"sudo apt install {' '.join(missing)}")
    once("debian", build_debian)
    return ArmDebian(BUILD)


@every_cpu
def test_the_best_variant_is_chosen(debian: ArmDebian, cpu: str) -> None:
    out = debian.run(["/venv/bin/skipcat-edge", "runtime", "check"], cpu)
    assert f"CPU variant      {CPUS[cpu]}\n" in out
    features = out.partition("CPU features")[2].partition("\n")[0].split()
    assert ("DOTPROD" in features) == (cpu != "cortex-a72")
    assert ("MATMUL_INT8" in features) == cpu.startswith("max")


@every_cpu
@pytest.mark.parametrize("tests", OP_TESTS)
def test_the_op_equals_numpy(debian: ArmDebian, tests: str, cpu: str) -> None:
    command = ["/venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # many rows differ from some by more turns of the same code, and take minutes
    out = debian.run([*command, f"/root/tests/{tests}", "-k", "not 512 and not 128"], cpu)
    assert " passed" in out and "failed" not in out
    # without dotprod no weights are repacked
    assert ("skipped" in out) == (cpu == "cortex-a72" and tests == "test_skip_mul_mat.py")


@every_cpu
def test_golden_logits(debian: ArmDebian, cpu: str) -> None:
    outcomes = json.loads(debian.run(["/venv/bin/skipcat-edge", "runtime", "selftest", "--json"], cpu))
    assert {outcome["model"] for outcome in outcomes} == {"F16", "Q8_0", "Q4_0", "Q4_K"}
    for outcome in outcomes:
        assert max(outcome["prompt_error"], outcome["decode_error"]) < outcome["tolerance"], outcome


@every_cpu
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "F16"])
def test_greedy_tokens_are_those_of_this_machine(
    debian: ArmDebian, demo_by_type: dict[str, Path], quant: str, cpu: str
) -> None:
    model = demo_by_type[quant]
    inside = debian.root / "root" / f"{quant}-{cpu}.gguf"
    shutil.copy(model, inside)
    worker = ROOT / "tests" / "greedy_worker.py"
    here = subprocess.run([sys.executable, str(worker), str(model), PROMPT, "24"], check=True,
                          capture_output=True, text=True).stdout
    # not through `skipcat-edge generate`: what it asks whether a file is readable, proot does not translate
    command = ["/venv/bin/python", f"/root/tests/{worker.name}", f"/root/{inside.name}", PROMPT, "24"]
    there = debian.run(command, cpu)
    inside.unlink()
    assert_same_tokens(here, there, 24)


# loops as often as its first argument has characters, two instructions each time
LOOP = """
.globl _start
_start: ldr x1, [sp, 16]
1:      ldrb w0, [x1], 1
        cbnz w0, 1b
        mov x0, 0
        mov x8, 93
        svc 0
"""


@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason="sudo apt install qemu-user")
def test_instructions_are_counted(tmp_path: Path) -> None:
    if missing := missing_packages():
        pytest.skip(f"sudo apt install {' '.join(missing)}")
    source, program = tmp_path / "loop.s", tmp_path / "loop"
    source.write_text(LOOP)
    compiler = ["aarch64-linux-gnu-gcc", "-nostdlib", "-static"]
    subprocess.run([*compiler, str(source), "-o", str(program)], check=True)
    counter = new_counter("cortex-a72", tmp_path, program)
    assert counter.count(program, "x" * 12345) == 2 * (12345 + 1) + 4


def test_static_programs_for_a_phone(
    tmp_path: Path, demo_dense_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := missing_packages():
        pytest.skip(f"sudo apt install {' '.join(missing)}")
    low_rank = tmp_path / "low.gguf"
    convert_model(DEMO / "model", low_rank, base=demo_dense_gguf, quant="Q4_0", method="skip", ratio=0.9,
                  calibration=DEMO / "calibration.txt", calib_tokens=2000)
    device = load_device("generic-aarch64")
    out = build_phone_tools(BUILD / "phone", Target(device.architecture), device.build.march)
    for program in PHONE_TOOLS:
        # neither an interpreter nor a library of Android's is asked for
        headers = subprocess.run(["aarch64-linux-gnu-readelf", "-lW", str(out / program)], check=True,
                                 capture_output=True, text=True).stdout
        assert "AArch64" not in headers and "INTERP" not in headers and "DYNAMIC" not in headers

    def on_a_cortex_a72(*command: str) -> str:
        emulated = ["qemu-aarch64-static", "-cpu", "cortex-a72", str(out / command[0]), *command[1:]]
        return subprocess.run(emulated, check=True, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL).stdout

    rows = json.loads(on_a_cortex_a72("llama-bench", "-m", str(low_rank), "-p", "16", "-n", "4", "-r", "1",
                                      "-t", "2", "-o", "json"))
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(16, 0), (0, 4)]
    assert all(row["avg_ts"] > 0 for row in rows)
    phone = Phone(tmp_path, monkeypatch)
    emulated = f"qemu-aarch64-static -cpu cortex-a72 '{out / 'llama-bench'}'"
    phone.be_this_machine(f'#!/bin/sh\nexec {emulated} "$@"\n')
    options = ["--threads", "2", "--phone-tools", str(phone.tool.parent), "--json"]
    result = phone.bench(low_rank, options=options, prompt=16, generated=4, repetitions=1)
    assert result.exit_code == 0, result.output
    (measured,) = json.loads(result.stdout)
    assert measured["file_bytes"] == low_rank.stat().st_size
    assert min(measured["prompt_tps_min"], measured["decode_tps_min"]) > 0
    text = on_a_cortex_a72("llama-completion", "-m", str(low_rank), "-p", PROMPT, "-n", "12", "--temp", "0",
                           "-no-cnv", "-t", "2")
    here = CliRunner().invoke(main, ["generate", str(low_rank), "-p", PROMPT, "-n", "12", "--threads", "2"])
    assert here.exit_code == 0, here.output
    continuation = here.stdout.strip()
    assert len(continuation.split()) > 5
    assert continuation in text
