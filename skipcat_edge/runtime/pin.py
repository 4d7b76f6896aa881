"""The pin: which llama-cpp-python source release the patches are for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcat_edge.errors import UserError
from skipcat_edge.packages import package_dir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Pin:
    """A source release of llama-cpp-python and the revision of the patches on it."""

    package: str
    version: str
    sha256: str
    """Of the source archive, lower-case hexadecimal."""
    revision: int

    @property
    def wheel_version(self) -> str:
        """Version of the patched wheel, for example `0.3.36+skipcat.1`."""
        return f"{self.version}+skipcat.{self.revision}"

    @property
    def source_dir_name(self) -> str:
        """The archive's only top-level directory, for example `llama_cpp_python-0.3.36`."""
        return f"{self.package.replace('-', '_')}-{self.version}"

    @property
    def archive_name(self) -> str:
        """File name of the source archive."""
        return f"{self.source_dir_name}.tar.gz"


def patches_dir() -> Path:
    """Directory with pin.toml, patches/ and overlay/. Raises UserError if it is not installed."""
    return package_dir("skipcat_patches")


def read_pin(directory: Path | None = None) -> Pin:
    """Read pin.toml of `directory` (default: the installed one). Raises UserError, naming the key."""
    path = (directory or patches_dir()) / "pin.toml"
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error}).") from None
    for key, type_ in (("package", str), ("version", str), ("sha256", str), ("revision", int)):
        if not isinstance(table.get(key), type_):
            raise UserError(f"{path}: `{key}` is missing or not of type {type_.__name__}.")
    return Pin(table["package"], table["version"], table["sha256"].lower(), table["revision"])
