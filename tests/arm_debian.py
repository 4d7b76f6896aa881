"""An arm64 Debian without Arm hardware: fetched by debootstrap, its programs run by qemu through proot.

No binary format need be registered with the kernel. debootstrap wants root; a Debian that is there already
does not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64-static": "qemu-user-static",
    "proot": "proot", "debootstrap": "debootstrap", "dpkg-deb": "dpkg",
}
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PYTHON, GLIBC = "3.11", 36
_BASE = ("python3", "python3-venv")
# debootstrap is in /usr/sbin, where users do not look
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def missing_packages() -> list[str]:
    """Debian packages of the tools that are not here."""
    return [package for tool, package in TOOLS.items() if shutil.which(tool, path=_PATH) is None]


class UnavailableError(RuntimeError):
    """This machine cannot have an arm64 Debian: no mirror is reached, or proot may not trace."""


class ArmDebian:
    """A root file system below `folder`, made once."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / SUITE
        done = folder / f"{SUITE}.done"
        if not done.exists():
            shutil.rmtree(self.root, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            first = ["debootstrap", "--arch=arm64", "--foreign", "--variant=minbase",
                     f"--include={','.join(_BASE)}", SUITE, str(self.root), MIRROR]
            env = {**os.environ, "PATH": _PATH}
            unpacked = subprocess.run(first, capture_output=True, text=True, env=env)
            if unpacked.returncode:
                raise UnavailableError(f"debootstrap failed: {(unpacked.stderr or unpacked.stdout)[-500:]}")
            # where debootstrap may not mount, it leaves a link to the host's
            if (self.root / "proc").is_symlink():
                (self.root / "proc").unlink()
                (self.root / "proc").mkdir()
            self._unpack()
            try:
                self.run(["python3", "--version"])
            except RuntimeError as error:
                raise UnavailableError(str(error)) from None
            done.touch()

    def _unpack(self) -> None:
        """The downloaded packages, as they are: Python needs none of what configuring them would do.

        debootstrap's second stage takes minutes under emulation, this takes seconds.
        """
        for package in sorted((self.root / "var" / "cache" / "apt" / "archives").glob("*.deb")):
            command = ["dpkg-deb", "--fsys-tarfile", str(package)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as files:
                # /bin, /lib and /sbin are links into /usr
                subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", str(self.root)],
                               stdin=files.stdout, check=True)
            if files.returncode:
                raise RuntimeError(f"dpkg-deb cannot unpack {package.name}")

    def run(self, command: Sequence[str], cpu: str | None = None) -> str:
        """Standard output of `command` in there, on a `cpu` that qemu knows (None: with all it has).

        Raises RuntimeError with the end of what it said where it fails.
        """
        emulator = "qemu-aarch64-static" if cpu is None else f"qemu-aarch64-static -cpu {cpu}"
        clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
        prefix = ["proot", "-q", emulator, "-0", "-r", str(self.root), "-b", "/proc", "-b", "/dev",
                  "-w", "/root", "/usr/bin/env", "-i", *(f"{name}={value}" for name, value in clean.items())]
        done = subprocess.run([*prefix, *command], capture_output=True, text=True,
                              env={"PATH": os.environ["PATH"]})
        if done.returncode:
            said = done.stdout[-500:] + done.stderr[-500:]
            raise RuntimeError(f"{command} failed with {done.returncode}: {said}")
        return done.stdout

    def install(self, wheels: Path, requirements: Sequence[str]) -> None:
        """`requirements` into a fresh virtual environment at /venv, from the folder `wheels` only."""
        shutil.rmtree(self.root / "venv", ignore_errors=True)
        inside = self.root / "wheels"
        shutil.rmtree(inside, ignore_errors=True)
        shutil.copytree(wheels, inside)
        self.run(["python3", "-m", "venv", "/venv"])
        self.run(["/venv/bin/python", "-m", "pip", "install", "--no-index", "--find-links", "/wheels",
                  "--disable-pip-version-check", *requirements])


def download(requirements: Sequence[str], wheels: Path) -> None:
    """Wheels of `requirements` for arm64 and what they depend on, from the package index."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(GLIBC, 16, -1)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", *platforms,
                    f"--python-version={PYTHON}", "--dest", str(wheels), *requirements], check=True)
