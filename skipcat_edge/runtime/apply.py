"""Lay the overlay and the patches over a pristine source tree, once."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from skipcat_edge.errors import UserError
from skipcat_edge.runtime.pin import Pin, patches_dir, read_pin

STAMP_NAME = ".skipcat-patches.json"
VERSION_FILE = "llama_cpp/__init__.py"


class State(Enum):
    """What a source tree's stamp says."""

    PRISTINE = "no stamp: nothing was applied, or something without finishing"
    CURRENT = "these patches are applied"
    OUTDATED = "other patches are applied"


@dataclass(frozen=True)
class PatchSet:
    """Everything that is laid over a pristine tree."""

    pin: Pin
    patches: tuple[Path, ...]
    """Unified diffs, in the order they are applied."""
    overlay: Mapping[str, Path]
    """Path in the tree -> the new file."""

    def digests(self) -> dict[str, str]:
        """SHA-256 of every patch and overlay file, and the wheel's version."""
        named = {f"patches/{path.name}": path for path in self.patches}
        named |= {f"overlay/{name}": path for name, path in self.overlay.items()}
        return {"version": self.pin.wheel_version} | {k: _sha256(p.read_bytes()) for k, p in named.items()}


def load_patch_set(directory: Path | None = None) -> PatchSet:
    """The patches and overlay of `directory` (default: the installed ones)."""
    directory = directory or patches_dir()
    overlay = directory / "overlay"
    files = sorted(path for path in overlay.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return PatchSet(
        read_pin(directory),
        tuple(sorted((directory / "patches").glob("*.patch"))),
        {path.relative_to(overlay).as_posix(): path for path in files},
    )


def tree_state(tree: Path, patches: PatchSet) -> State:
    """Compare the stamp of `tree` with `patches`.

    Raises UserError, naming the file, if a file that the stamp lists was changed since.
    """
    stamp = read_stamp(tree)
    if stamp is None:
        return State.PRISTINE
    for name, digest in stamp["files"].items():
        path = tree / name
        if not path.is_file() or _sha256(path.read_bytes()) != digest:
            raise UserError(
                f"{path}: changed since the patches were applied; restore it, or delete {tree} and run again."
            )
    return State.CURRENT if stamp["inputs"] == patches.digests() else State.OUTDATED


def read_stamp(tree: Path) -> dict[str, dict[str, str]] | None:
    """`inputs`: digests of what was applied; `files`: SHA-256 of each file touched. None without a stamp."""
    path = tree / STAMP_NAME
    try:
        stamp = json.loads(path.read_text("utf-8"))
        return {"inputs": dict(stamp["inputs"]), "files": dict(stamp["files"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a stamp of skipcat-edge; delete {tree} and run again.") from None


def apply(tree: Path, patches: PatchSet) -> bool:
    """Apply `patches` to the pristine `tree`; False if they already are.

    Every result is computed before the first file is written. Raises UserError, naming the file,
    for a tree that is dirty, half-applied, patched by another revision or another release.
    """
    state = tree_state(tree, patches)
    if state is State.CURRENT:
        return False
    if state is State.OUTDATED:
        raise UserError(f"{tree / STAMP_NAME}: other patches are applied; start from an unpatched tree.")

    results = _patched_files(tree, patches)
    for name, path in patches.overlay.items():
        if (tree / name).exists():
            raise UserError(
                f"{tree / name}: exists, but the patches add it; "
                "the tree is half-applied, start from an unpatched one."
            )
        results[name] = path.read_bytes()
    results[VERSION_FILE] = _with_version(tree, patches.pin, results.get(VERSION_FILE))

    for name, content in results.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    stamp = {
        "inputs": patches.digests(),
        "files": {name: _sha256(content) for name, content in sorted(results.items())},
    }
    temporary = tree / f"{STAMP_NAME}.tmp"
    temporary.write_text(json.dumps(stamp, indent=1) + "\n", "utf-8")
    temporary.replace(tree / STAMP_NAME)
    return True


def _patched_files(tree: Path, patches: PatchSet) -> dict[str, bytes]:
    """The content of every patched file, computed on copies in a temporary directory."""
    import patch_ng

    results: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="skipcat-apply-") as temp, _quiet(patch_ng.logger):
        stage = Path(temp)
        for patch in patches.patches:
            parsed = patch_ng.fromfile(str(patch))
            if not parsed or not parsed.items:
                raise UserError(f"{patch}: not a unified diff.")
            names = [_target(patch, item) for item in parsed.items]
            for name in names:
                if name not in results:
                    results[name] = _read(tree, name, patch)
                    (stage / name).parent.mkdir(parents=True, exist_ok=True)
                    (stage / name).write_bytes(results[name])
            applied = parsed.apply(root=str(stage))
            for name in names:
                after = (stage / name).read_bytes()
                # patch-ng calls a file that holds the result already a success.
                if after == results[name]:
                    raise UserError(
                        f"{tree / name}: {patch.name} does not apply; the file was edited, "
                        "or the tree is half-applied: start from an unpatched one."
                    )
                results[name] = after
            if not applied:
                raise UserError(f"{tree / names[0]}: {patch.name} does not apply.")
    return results


def _target(patch: Path, item: object) -> str:
    source, target = (
        re.sub("^[ab]/", "", getattr(item, side).decode("utf-8")) for side in ("source", "target")
    )
    if source != target:
        raise UserError(f"{patch}: adds, deletes or renames {target}; new files belong in overlay/.")
    return target


def _read(tree: Path, name: str, patch: Path) -> bytes:
    try:
        return (tree / name).read_bytes()
    except OSError:
        raise UserError(f"{tree / name}: missing, but {patch.name} changes it.") from None


def _with_version(tree: Path, pin: Pin, content: bytes | None) -> bytes:
    """`VERSION_FILE` with the wheel's version, which scikit-build-core reads from there."""
    path = tree / VERSION_FILE
    if content is None:
        try:
            content = path.read_bytes()
        except OSError:
            raise UserError(f"{path}: missing; {tree} is not a source tree of {pin.package}.") from None
    old, new = (f'__version__ = "{version}"'.encode() for version in (pin.version, pin.wheel_version))
    if content.count(old) != 1:
        raise UserError(f"{path}: expected one line `{old.decode()}`; the patches are for that release.")
    return content.replace(old, new)


class _quiet:  # noqa: N801
    """Keep patch-ng's warnings off the terminal: the caller says it in one sentence."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def __enter__(self) -> None:
        self.logger.disabled = True

    def __exit__(self, *exc: object) -> None:
        self.logger.disabled = False


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
