"""Wheels for other machines: their names, compilers and CMake arguments."""

from __future__ import annotations

import platform
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from wheel.wheelfile import WheelFile

from skipcat_edge.cli import main
from skipcat_edge.errors import UserError
from skipcat_edge.runtime import build
from skipcat_edge.runtime.target import Target, retag

OTHER = "aarch64" if platform.machine() != "aarch64" else "x86_64"
MACHINES = {"x86_64": 62, "aarch64": 183}


def wheel_of(folder: Path, architecture: str, *glibc: str) -> Path:
    """A wheel of one library that names the symbol versions `glibc`."""
    elf = b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little")
    elf += MACHINES[architecture].to_bytes(2, "little") + bytes(44)
    elf += b"\0".join([b"", *(version.encode() for version in glibc), b""])
    path = folder / "thing-1.0-py3-none-linux_x86_64.whl"
    info = "thing-1.0.dist-info"
    with WheelFile(path, "w") as archive:  # which writes RECORD itself
        archive.writestr("thing/lib/libthing.so", elf)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\n"
                                          "Tag: py3-none-linux_x86_64\n")
    return path


@pytest.mark.parametrize("architecture", MACHINES)
def test_a_wheel_is_named_for_the_glibc_it_needs(architecture: str, tmp_path: Path) -> None:
    made = wheel_of(tmp_path, architecture, "GLIBC_2.17", "GLIBC_2.34", "GLIBC_2.4", "GLIBC_PRIVATE")
    tagged = retag(made, Target(architecture), tmp_path / "log")
    assert tagged.name == f"thing-1.0-py3-none-manylinux_2_34_{architecture}.whl"
    assert not made.exists()
    with zipfile.ZipFile(tagged) as archive:
        assert f"Tag: py3-none-manylinux_2_34_{architecture}" in archive.read(
            "thing-1.0.dist-info/WHEEL").decode()


def test_a_library_for_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"libthing\.so is for another machine"):
        retag(wheel_of(tmp_path, "x86_64"), Target("aarch64"), tmp_path / "log")


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(UserError, match="x86_64 and aarch64, not riscv64"):
        Target("riscv64")


def test_a_cross_build_says_so_to_cmake() -> None:
    here, there = Target(platform.machine()), Target(OTHER)
    for target in (here, there):
        assert {"-DGGML_NATIVE=OFF", "-DGGML_CPU_ALL_VARIANTS=ON"} < set(target.cmake_args)
    assert here.compilers == {}
    assert not any("CMAKE_SYSTEM" in argument for argument in here.cmake_args)
    assert there.compilers == {"CC": f"{OTHER}-linux-gnu-gcc", "CXX": f"{OTHER}-linux-gnu-g++"}
    assert f"-DCMAKE_SYSTEM_PROCESSOR={OTHER}" in there.cmake_args


def test_a_missing_cross_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_tool", lambda name: None)
    device = "generic-aarch64" if OTHER == "aarch64" else "generic-x86-64"
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["runtime", "build", "--device", device, "--out", str(out)])
    assert result.exit_code == 2
    assert f"{OTHER}-linux-gnu-gcc was not found" in result.output and "sudo apt install" in result.output
    assert not out.exists()


def test_a_cross_built_wheel_is_not_installed_here(tmp_path: Path) -> None:
    device = "generic-aarch64" if OTHER == "aarch64" else "generic-x86-64"
    result = CliRunner().invoke(main, ["runtime", "build", "--device", device, "--install"])
    assert result.exit_code == 2
    assert "cannot be installed" in result.output
