"""Data of this project that is installed as packages of its own: patches and devices."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from skipcat_edge.errors import UserError


@cache
def package_dir(name: str) -> Path:
    """Directory of the package `name`. Raises UserError if it is not installed."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The package {name} is missing; reinstall skipcat-edge.")
    return Path(spec.submodule_search_locations[0])
