"""The job directory of a conversion: what is finished survives whatever ends the process.

    .NAME.job/           beside the output NAME; removed once the output is in place
        lock             held with flock, which the kernel releases however its holder ends
        settings.json    what the result depends on
        ...              artifacts

An artifact is there whole or not at all: it is written under another name, synced and renamed. This
module imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from skipcat_edge.errors import DiskError, RetryError, UnreachableError, UserError, first_line
from skipcat_edge.output import place, sync_file, sync_folder

Restart = Literal["no", "if changed", "yes"]
"""What becomes of an unfinished job: resumed (and refused where its settings differ), begun anew where its
settings differ, or begun anew."""

_LOCK, _SETTINGS, _PLACING = "lock", "settings.json", "placing"
_PARTIAL, _DONE = ".partial-", ".done-"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITTEN = (*_FULL, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, None)


class DamagedError(UserError):
    """An artifact that is not what a conversion keeps: its job is removed."""


@dataclass(frozen=True)
class Job:
    """A folder of artifacts by name."""

    folder: Path

    def path(self, name: str) -> Path:
        """Where the artifact is, or will be."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether it is finished."""
        return self.path(name).exists()

    @contextmanager
    def artifact(self, name: str) -> Iterator[Path]:
        """A path to write to, which becomes the artifact at the end; removed on failure."""
        # the process's own: a child of one that was killed may still write to its partial
        partial = self.path(f"{name}{_PARTIAL}{os.getpid()}")
        try:
            yield partial
            sync_file(partial)
            partial.replace(self.path(name))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)

    def write_json(self, name: str, value: Any) -> None:
        """Floats come back as they were."""
        with self.artifact(name) as path:
            path.write_text(json.dumps(value), "utf-8")

    def read_json(self, name: str) -> Any:
        """Raises DamagedError where it is not JSON."""
        with self.reading(name):
            return json.loads(self.path(name).read_text("utf-8"))

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Raises DamagedError where what is made of the artifact cannot be made of it."""
        try:
            yield
        except (OSError, MemoryError):  # these say nothing of what is in it
            raise
        except Exception as error:  # a damaged archive has NumPy, zipfile and zlib raise a dozen kinds
            if isinstance(error.__context__, OSError):
                raise RetryError(f"{self.path(name)} cannot be read ({first_line(error.__context__)}); once "
                                 "it can, the same command goes on.") from None
            raise DamagedError(f"{self.path(name)} is not what a conversion keeps; what was finished is "
                               "removed, and the same command begins anew.") from None

    @property
    def settings(self) -> dict[str, Any]:
        """What it was begun with. Raises RetryError where that is damaged."""
        with suppress(DamagedError):
            known = self.read_json(_SETTINGS)
            if isinstance(known, dict):
                return known
        raise self.damaged_settings()

    def damaged_settings(self) -> RetryError:
        """Unlike other damage no reason to remove the job: what the settings were for may still be of use."""
        return RetryError(f"{self.path(_SETTINGS)} is not what a conversion keeps; pass --restart to begin "
                          "anew.")

    def drop(self, name: str) -> None:
        """Remove an artifact that nothing needs any more."""
        self.path(name).unlink(missing_ok=True)

    def drop_states(self) -> None:
        """Remove hidden states and gradients."""
        for path in self.folder.glob("*.f32"):
            path.unlink()

    def has_any(self, but: Collection[str] = ()) -> bool:
        """Whether any artifact is finished, `but` these."""
        return any(path.name not in (_LOCK, _SETTINGS, *but) and _PARTIAL not in path.name
                   for path in self.folder.iterdir())

    @property
    def is_placing(self) -> bool:
        """The outputs were being put into place, and are the job's own where they exist."""
        return self.has(_PLACING)

    def place(self, names: Sequence[str], outs: Sequence[Path]) -> None:
        """Make these artifacts the outputs: all of them or none, also where the process ends here."""
        self.write_json(_PLACING, [str(out) for out in outs])
        place([self.path(name) for name in names], outs)

    def clear(self) -> None:
        """Remove everything but the lock."""
        # the settings first: without them, what is left is no job that could be resumed
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != _SETTINGS):
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def job_folder(output: Path) -> Path:
    """The folder of the job that makes `output`."""
    return output.with_name(f".{output.name}.job")


def was_placing(output: Path) -> bool:
    """Whether a job ended while it put `output` into place: what is there is its own."""
    return Job(job_folder(output)).is_placing


def remove_rest(output: Path) -> None:
    """Remove what a job left that ended while it removed itself."""
    folder = output.absolute().parent
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(f"{job_folder(output).name}{_DONE}"):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def open_job(output: Path, settings: Mapping[str, Any], restart: Restart = "no",
             adopted: Collection[str] = (), cheap: Collection[str] = ()) -> Iterator[Job]:
    """The job that makes `output`, begun or resumed; `settings`: all that its bytes depend on, by the name
    that the user knows, in JSON's types. Those that are `adopted` a resumed job goes on with as it was begun.

    It goes where all is done; where nothing is finished but what is `cheap`, by its name, so that a mistake
    leaves nothing behind; and where what was asked for can never be, or the job is damaged. It stays with
    everything else that ends the process: a disk that is not mounted looks like a model that is broken.

    Raises UserError where another process is at it, and where it was begun with other settings.
    """
    folder = job_folder(output)
    try:
        lock = _lock(folder, output)
    except OSError as error:
        raise UserError(f"{output} could not be written ({error.strerror}); choose a folder that is writable "
                        "and has room.") from None
    try:
        job = Job(folder)
        _begin(job, output, settings, restart, adopted)
        try:
            yield job
        except UserError as error:
            retry = isinstance(error, RetryError)
            if isinstance(error, (UnreachableError, DamagedError)) or not job.has_any(() if retry else cheap):
                _remove(job)
            elif not retry:  # one of those says itself what to do
                raise UserError(
                    f"{error.message.rstrip('.')}; what is finished is kept in {folder}: the same command "
                    "goes on from it, and --restart begins anew.") from None
            raise
        _remove(job)
    except OSError as error:
        # NumPy's tofile reports a full disk with neither a number nor a file name
        where = folder if error.filename is None else Path(os.fsdecode(error.filename))
        if folder.absolute().parent not in where.absolute().parents or error.errno not in _NOT_WRITTEN:
            raise
        reason = error.strerror or str(error)
        raise DiskError(f"{output} could not be written ({reason}); make room, and the same command goes on "
                        f"from what is finished, in {folder}.") from None
    finally:
        os.close(lock)


@contextmanager
def temporary_job(beside: Path) -> Iterator[Job]:
    """A job that nothing resumes, in a folder beside `beside`."""
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.absolute().parent) as folder:
        yield Job(Path(folder))


def is_full_disk(text: str) -> bool:
    """Whether a program's last words are that it could not write."""
    return any(each in text for each in (*map(os.strerror, _FULL), " requested and "))


def _lock(folder: Path, output: Path) -> int:
    """A descriptor that holds the folder's lock."""
    path = folder / _LOCK
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its owner has just removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"Another process is converting to {output}; wait for it, or name another "
                            "output.") from None
        os.close(lock)


def _begin(job: Job, output: Path, settings: Mapping[str, Any], restart: Restart,
           adopted: Collection[str]) -> None:
    asked = json.loads(json.dumps(settings))
    known = job.settings if restart != "yes" and job.has(_SETTINGS) else None
    if known is not None:
        changed = next((name for name in {**known, **asked} if known.get(name) != asked.get(name)
                        and not (name in adopted and name in known)), None)
        if changed is None:
            # and matrices that lay on the disk for the process alone
            for partial in [*job.folder.glob(f"*{_PARTIAL}*"), *job.folder.glob("*.f64")]:
                partial.unlink()
            return
        if restart == "no":
            before, now = (_shown(each.get(changed)) for each in (known, asked))
            raise UserError(
                f"The unfinished conversion to {output} was begun with another {changed} ({before}; this "
                f"one: {now}); repeat it as it was to go on with it, or pass --restart to begin anew.")
    job.clear()
    job.write_json(_SETTINGS, asked)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and len(value) == 64:  # a SHA-256
        return value[:12]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _remove(job: Job) -> None:
    # by one rename: half a job would be resumed as if it were one
    done = job.folder.with_name(f"{job.folder.name}{_DONE}{os.getpid()}")
    job.folder.rename(done)
    shutil.rmtree(done, ignore_errors=True)
