"""The machine that a wheel is built for, where that is not only the one it is built on."""

from __future__ import annotations

import platform
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from skipcat_edge.errors import UserError
from skipcat_edge.runtime.progress import run_logged

_GLIBC = re.compile(rb"\0GLIBC_2\.(\d+)")
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


@dataclass(frozen=True)
class Target:
    """A kind of Linux machine; its wheel holds the CPU backend in several variants, of which the best
    one that the CPU can run is chosen when llama.cpp is loaded."""

    architecture: str
    """`x86_64` or `aarch64`, as `uname -m` says."""

    def __post_init__(self) -> None:
        if self.architecture not in _ELF_MACHINES:
            raise UserError(f"Wheels are built for {' and '.join(_ELF_MACHINES)}, not {self.architecture}.")

    @property
    def triple(self) -> str:
        """Prefix of Debian's cross compilers."""
        return f"{self.architecture}-linux-gnu"

    @property
    def is_this_machine(self) -> bool:
        """No cross compiler is needed."""
        return platform.machine() == self.architecture

    @property
    def cmake_args(self) -> list[str]:
        """Of a wheel, on top of those of every build."""
        return ["-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON",
                "-DSKIPCAT_CPU_VARIANTS=ON",
                # libgomp is not on every small system, and its libstdc++ may be older than the compiler's
                "-DGGML_OPENMP=OFF", *(f"-DCMAKE_{kind}_LINKER_FLAGS=-static-libstdc++ -static-libgcc"
                                       for kind in ("SHARED", "MODULE")), *self.cross_args]

    @property
    def cross_args(self) -> list[str]:
        """What tells CMake that it does not build for this machine."""
        if self.is_this_machine:
            return []
        return ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={self.architecture}"]

    @property
    def compilers(self) -> dict[str, str]:
        """CC and CXX of a cross build."""
        return {} if self.is_this_machine else {"CC": f"{self.triple}-gcc", "CXX": f"{self.triple}-g++"}


def retag(wheel: Path, target: Target, log: Path) -> Path:
    """Name `wheel` for what its libraries need: `manylinux_2_X_<architecture>`, X being the newest glibc that
    they take a symbol of. Returns its new path. Raises UserError where a library is for another machine."""
    newest = 17
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        for name in names:
            data = archive.read(name)
            if int.from_bytes(data[18:20], "little") != _ELF_MACHINES[target.architecture]:
                raise UserError(f"{wheel.name}: {name} is for another machine than {target.architecture}.")
            newest = max([newest, *(int(minor) for minor in _GLIBC.findall(data))])
    if not names:
        raise UserError(f"{wheel.name} holds no library.")
    platform_tag = f"manylinux_2_{newest}_{target.architecture}"
    command = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform_tag, str(wheel)]
    run_logged(command, title=f"Tagging {wheel.name}", log=log)
    (tagged,) = wheel.parent.glob(f"*-{platform_tag}.whl")
    return tagged
