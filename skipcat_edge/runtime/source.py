"""The pinned source: fetch it, check it, unpack it, patch it. All of it lives in a cache."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import platformdirs
from rich.progress import Progress
from rich.progress import open as open_with_progress

from skipcat_edge.digest import sha256
from skipcat_edge.errors import UserError
from skipcat_edge.runtime.apply import (
    VERSION_FILE,
    PatchSet,
    State,
    apply,
    load_patch_set,
    read_stamp,
    tree_state,
)
from skipcat_edge.runtime.pin import Pin, read_pin
from skipcat_edge.runtime.progress import console, run_logged

# The archive's git history is 40 MB, and a build would ask git for a version to compile in.
_HISTORY = ".git"
# What a build leaves in a tree, by directory.
_BUILT = {".": {"build", "_skbuild", "dist"}, "vendor/llama.cpp": {"build"}, "llama_cpp": {"lib"}}


def cache_dir() -> Path:
    """Where sources, build directories and logs are kept (SKIPCAT_EDGE_CACHE overrides it)."""
    override = os.environ.get("SKIPCAT_EDGE_CACHE")
    return Path(override).absolute() if override else platformdirs.user_cache_path("skipcat-edge")


def log_path(name: str) -> Path:
    """Log file of a long command."""
    return cache_dir() / "logs" / f"{name}.log"


def stock_tree(source: Path | None = None) -> Path:
    """The unpacked, unpatched source tree; `source`: an archive to use instead of the package index."""
    pin = read_pin()
    tree = _tree(pin, "stock")
    if not tree.is_dir():
        if source is not None and source.is_dir():
            raise UserError(f"{source}: a stock tree comes from the pinned archive only, not a directory.")
        _unpack_to(fetch_archive(pin, source), pin, tree)
    return tree


def patched_tree(source: Path | None = None) -> Path:
    """The source tree with the patches applied.

    `source`: an archive to use instead of the package index, or an unpacked tree, patched or not,
    that is copied and never changed. Raises UserError, naming the file, for a dirty tree.
    """
    patches = load_patch_set()
    if source is not None and source.is_dir():
        tree = _tree(patches.pin, "directory")
        # Its files may be older than what was built from another directory.
        shutil.rmtree(tree.parent, ignore_errors=True)
        copy_tree(source, tree, patches)
        return tree
    tree = _tree(patches.pin, "patched")
    if source is not None:
        check_sha256(source, patches.pin)
    if tree.is_dir() and tree_state(tree, patches) is State.CURRENT:
        return tree
    if tree.is_dir() and read_stamp(tree) is None:
        apply(tree, patches)
        return tree
    _unpack_to(fetch_archive(patches.pin, source), patches.pin, tree, patches)
    return tree


def fetch_archive(pin: Pin, source: Path | None = None) -> Path:
    """The pinned archive in the cache: copied from `source`, or else downloaded once with pip.

    Raises UserError if its SHA-256 is not the pin's, before anything of it is read.
    """
    cached = cache_dir() / pin.archive_name
    if source is not None:
        check_sha256(source, pin)
        if not cached.is_file():
            with writing_to(cached.parent) as temp:
                shutil.copyfile(source, temp / cached.name).replace(cached)
    elif not cached.is_file():
        with writing_to(cached.parent) as temp:
            _download(pin, temp).replace(cached)
    check_sha256(cached, pin)
    return cached


def check_sha256(archive: Path, pin: Pin) -> None:
    """Raise UserError unless `archive` is the pinned one."""
    try:
        found = sha256(archive)
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror}).") from None
    if found != pin.sha256:
        raise UserError(
            f"{archive}: SHA-256 is {found}, but the pin of {pin.package} {pin.version} is "
            f"{pin.sha256}; delete the file and get {pin.archive_name} again."
        )


def unpack(archive: Path, directory: Path, top: str) -> Path:
    """Unpack a .tar.gz whose members all lie below the directory `top`, into `directory`.

    Raises UserError, naming the member, for a link, a device or a path that leads elsewhere.
    """
    with (
        open_with_progress(archive, "rb", description="Unpacking the source", console=console,
                           disable=not console.is_terminal) as file,
        tarfile.open(fileobj=file, mode="r|gz") as tar,
    ):
        for member in tar:
            parts = member.name.split("/")
            if not (member.isreg() or member.isdir()) or parts[0] != top or {"..", ""} & set(parts):
                raise UserError(f"{archive}: refusing to unpack its member {member.name!r}.")
            if _HISTORY in parts:
                continue
            # Python before 3.10.12 and 3.11.4 has no filters; the checks above stand alone there.
            if hasattr(tarfile, "data_filter"):
                tar.extract(member, directory, filter="data")
            else:
                tar.extract(member, directory, set_attrs=False)
    return directory / top


def copy_tree(source: Path, tree: Path, patches: PatchSet) -> None:
    """Copy the unpacked `source` to `tree` and apply `patches` to the copy."""
    pin = patches.pin
    try:
        version = re.search(r'^__version__ = "(.*)"', (source / VERSION_FILE).read_text("utf-8"), re.M)
    except OSError:
        raise UserError(f"{source}: not an unpacked source of {pin.package}: no {VERSION_FILE}.") from None
    found = version[1] if version else "unknown"
    if found.split("+")[0] != pin.version:
        raise UserError(f"{source}: {pin.package} {found}, but the patches are for {pin.version}.")

    def skip(directory: str, names: list[str]) -> set[str]:
        built = _BUILT.get(Path(directory).relative_to(source).as_posix(), set())
        return set(names) & (built | {_HISTORY, "__pycache__"})

    with writing_to(tree.parent) as temp, Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Copying the source", total=sum(len(files) for _, _, files in os.walk(source)))

        def copy(old: str, new: str) -> str:
            bar.advance(task)
            return str(shutil.copy2(old, new))

        shutil.copytree(source, temp / "tree", symlinks=True, ignore=skip, copy_function=copy)
        apply(temp / "tree", patches)
        (temp / "tree").replace(tree)


def _tree(pin: Pin, kind: str) -> Path:
    # Build directories lie beside `tree`, at the same relative path for every kind, so that
    # ccache shares their objects.
    return cache_dir() / pin.source_dir_name / kind / "tree"


def _unpack_to(archive: Path, pin: Pin, tree: Path, patches: PatchSet | None = None) -> None:
    """Unpack, patch, and only then move to `tree`, in place of what is there."""
    with writing_to(tree.parent) as temp:
        fresh = unpack(archive, temp, pin.source_dir_name)
        if patches is not None:
            apply(fresh, patches)
        if tree.exists():
            # Ninja goes by time: what the old patches touched must look new without them.
            for name in (read_stamp(tree) or {"files": {}})["files"]:
                if (fresh / name).exists():
                    os.utime(fresh / name)
            tree.replace(temp / "old")
        fresh.replace(tree)


@contextmanager
def writing_to(directory: Path) -> Iterator[Path]:
    """A temporary directory in `directory`, which is made if needed.

    Raises UserError for a full disk and whatever else keeps files from being written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".incoming-") as temp:
            yield Path(temp)
    except OSError as error:
        raise UserError(
            f"{directory} could not be written ({error.strerror or error}); choose a folder that is writable "
            "and has room (the cache: SKIPCAT_EDGE_CACHE)."
        ) from None


def _download(pin: Pin, directory: Path) -> Path:
    """Let pip fetch the archive; with --hash it too checks before it runs the archive's build code."""
    if find_spec("pip") is None:
        raise UserError(
            f"This Python has no pip to fetch {pin.archive_name}; run `{sys.executable} -m ensurepip`, "
            "or pass the archive with --source."
        )
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", "utf-8")
    # Only the package itself, not `:all:`, which would make pip build CMake from source where
    # the package's build needs it.
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", pin.package,
        "--requirement", str(requirements), "--dest", str(directory), "--disable-pip-version-check",
    ]
    if find_spec("scikit_build_core") is not None:
        command.append("--no-build-isolation")
    if int(metadata.version("pip").split(".")[0]) > 24:
        command += ["--progress-bar", "raw"]
    run_logged(command, title=f"Downloading {pin.archive_name}", log=log_path("download"),
               hint="without a network, pass the archive with --source")
    archive = directory / pin.archive_name
    if not archive.is_file():
        raise UserError(f"pip did not save {pin.archive_name}; see {log_path('download')}.")
    return archive
