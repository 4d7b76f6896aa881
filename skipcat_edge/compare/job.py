"""The whole job: its steps in order, what each depends on, and the comparison that they add up to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from skipcat_edge.compare.build import Builder
from skipcat_edge.compare.figures import Comparison, Kind, figures_of
from skipcat_edge.compare.measure import Evaluator, bench_all
from skipcat_edge.compare.progress import Bar, new_bar
from skipcat_edge.compare.request import Entry, Request, entries, printable
from skipcat_edge.compare.state import NAME, Job, State, identity, source_identity
from skipcat_edge.digest import sha256
from skipcat_edge.errors import UserError
from skipcat_edge.session import import_llama_cpp

_REFERENCE, _STATISTICS, _BENCH = "reference", "statistics", "bench"
# Seconds of a small model; a large one's differ, but much alike.
_WEIGHTS = {_REFERENCE: 5.0, _STATISTICS: 60.0, Kind.PLAIN: 1.0, Kind.FEEDBACK: 15.0, Kind.LOW_RANK: 20.0,
            "eval": 5.0, "bench": 2.0}


def run(request: Request, force: bool) -> Comparison:
    """Do what is not done yet of `request`, and return what was found.

    `force` starts over. Raises UserError for bad input, where the folder holds something else or is in
    use, and as the steps do; what they finished stays.
    """
    listed = entries(request)
    with _locked_folder(request, force) as state:
        jobs = [*_jobs(request, listed, state)]
        stale = state.to_do(jobs)
        total = sum(job.weight for job in jobs)
        with new_bar() as display:
            bar = Bar(display, total, total - sum(job.weight for job in stale))
            for job in stale:
                inputs = job.inputs()
                with bar.step(job.title, job.weight) as step:
                    state.keep(job, inputs, job.run(step))
        return _comparison(request, listed, state)


@contextmanager
def _locked_folder(request: Request, force: bool) -> Iterator[State]:
    """The folder's state, nobody else's meanwhile; without what a run that was killed left half-written."""
    import fcntl
    import shutil

    folder = request.folder
    handle = _open_folder(folder, force)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder} is in use by another compare; wait for it, or name another.") from None
        if force:
            (folder / NAME).unlink(missing_ok=True)
        state = State(folder)
        source = str(Path(request.source_name).resolve()) if Path(request.source_name).exists() \
            else request.source_name
        if state.source not in (None, source):
            raise UserError(f"{folder} holds the comparison of {state.source}; name another folder, or pass "
                            "--force to replace it.")
        # an unfinished conversion's job is resumed, unless all begins anew
        for left in (left for pattern in (".*.partial-*", ".*.job.done-*", *([".*.job"] if force else []))
                     for left in folder.glob(pattern)):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        state.begin(source)
        yield state
    finally:
        os.close(handle)


def _open_folder(folder: Path, force: bool) -> int:
    """Make the folder where it is missing. Raises UserError unless a comparison may be written to it."""
    parent = folder.absolute().parent
    try:
        if not parent.is_dir():
            raise UserError(f"{folder}: the folder {parent} does not exist; create it first.")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; name a folder.")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / NAME).exists() and not force:
            raise UserError(f"{folder} holds other files, and no comparison; name a new folder, or pass "
                            "--force.")
        folder.mkdir(exist_ok=True)
        return os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder} cannot be used ({error.strerror}); name a folder that can be written "
                        "to.") from None


def _key(entry: Entry) -> str:
    return str(entry.path.resolve()) if entry.given else entry.path.name


def _jobs(request: Request, listed: Sequence[Entry], state: State) -> Iterator[Job]:
    """In order: the reference, its evaluation and that of what was given, so that a text or a file that will
    not do is known early; files and their evaluation; the speed of all."""
    versions = {"skipcat_edge": version("skipcat-edge"), "llama_cpp": str(import_llama_cpp().__version__)}
    built = [entry for entry in listed if not entry.given]
    calibrated = any(entry.calibrated for entry in built)
    texts = {path: sha256(path) for path in (request.text, request.calibration) if path is not None}
    calibration = {} if request.calibration is None else {
        "text": texts[request.calibration], "tokens": request.calib_tokens}
    reference = (_REFERENCE,) if request.builds else ()
    evaluation = partial(_evaluation, request, Evaluator(request), texts[request.text], versions)
    if request.builds:
        builder = Builder(request)
        source = source_identity(request.source)
        base = None if request.base is None else identity(request.base)
        yield Job(_REFERENCE, "the dense reference", _WEIGHTS[_REFERENCE], (),
                  lambda: {"source": source, "base": base, **versions}, builder.reference, request.reference)
    yield evaluation(_REFERENCE, request.reference, reference, lambda: True)
    for entry in (entry for entry in listed if entry.given):
        yield evaluation(_key(entry), entry.path, reference, lambda: True)
    if calibrated:
        yield Job(_STATISTICS, "calibrating", _WEIGHTS[_STATISTICS], (_REFERENCE,),
                  lambda: {"source": source, **calibration, "reference": identity(request.reference)},
                  builder.statistics, request.statistics)
    for entry in built:
        needs = (_REFERENCE, _STATISTICS) if entry.calibrated else (_REFERENCE,)

        def inputs(entry: Entry = entry) -> dict[str, Any]:
            found: dict[str, Any] = {"reference": identity(request.reference), **versions}
            if entry.calibrated:
                found |= {"statistics": identity(request.statistics), "calibration": calibration,
                          "method": request.method}
            return found

        yield Job(f"file {_key(entry)}", f"making {entry.path.name}", _WEIGHTS[entry.kind], needs, inputs,
                  partial(builder.entry, entry), entry.path)
    for entry in built:
        yield evaluation(_key(entry), entry.path, (*reference, f"file {_key(entry)}"),
                         partial(_there, entry, state))

    def speed_inputs() -> dict[str, Any]:
        return {"files": [identity(path) for path in _present(request, listed, state)],
                "prompt_tokens": request.prompt_tokens, "gen_tokens": request.gen_tokens,
                "threads": request.threads, "repetitions": request.repetitions, **versions}

    yield Job(_BENCH, "speed of all files", _WEIGHTS["bench"] * (1 + len(listed)),
              (*reference, *(f"file {_key(entry)}" for entry in built)), speed_inputs,
              lambda step: bench_all(request, _present(request, listed, state), step))


def _evaluation(request: Request, evaluator: Evaluator, text: str, versions: Mapping[str, str], key: str,
                path: Path, needs: tuple[str, ...], there: Callable[[], bool]) -> Job:
    def inputs() -> dict[str, Any]:
        return {"file": identity(path) if there() else None, "reference": identity(request.reference),
                "text": text, "max_tokens": request.max_tokens, "window": request.window, **versions}

    return Job(f"eval {key}", f"loss of {path.name}", _WEIGHTS["eval"], needs, inputs,
               lambda step: evaluator(path, step) if there() else {})


def _there(entry: Entry, state: State) -> bool:
    return entry.given or "impossible" not in state.result(f"file {_key(entry)}")


def _present(request: Request, listed: Sequence[Entry], state: State) -> list[Path]:
    return [request.reference, *(entry.path for entry in listed if _there(entry, state))]


def _comparison(request: Request, listed: Sequence[Entry], state: State) -> Comparison:
    from skipcat_edge.compare.setting import notes_of, setting_of
    from skipcat_edge.session import model_info

    present = [entry for entry in listed if _there(entry, state)]
    rows = dict(zip(_present(request, listed, state), state.result(_BENCH)["rows"], strict=True))
    quality = {_REFERENCE: state.result(f"eval {_REFERENCE}")}
    reference_type = request.reference_type if request.builds else _type_of(request.reference)
    files = [figures_of(reference_type, Kind.REFERENCE,
                        {"file": printable(request.reference.name), "type": reference_type, "ratio": 1.0},
                        rows[request.reference], quality[_REFERENCE])]
    left_out = {}
    for entry in present:
        described = {"file": entry.name, "type": entry.type, "ratio": entry.ratio}
        found = state.result(f"eval {_key(entry)}")
        if "impossible" in found:
            left_out[entry.name] = found["impossible"]
            continue
        files.append(figures_of(entry.label, entry.kind, described, rows[entry.path], found))
    impossible = {entry.path.stem: state.result(f"file {_key(entry)}")["impossible"]
                  for entry in listed if entry not in present}
    tokens = state.result(_STATISTICS)["tokens"] if any(entry.calibrated and not entry.given
                                                        for entry in present) else None
    return Comparison(
        printable(_model_name(request.source_name)), tuple(files),
        model_info(request.reference).embedding, tuple(notes_of(request, impossible, left_out, rows)),
        setting_of(request, rows[request.reference], quality[_REFERENCE], tokens))


def _model_name(source: str) -> str:
    """The last part of a path or a hub id; of `.` and `..` what they stand for."""
    path = Path(source)
    return (path.resolve() if path.name in ("", "..") else path).name or source


def _type_of(path: Path) -> str:
    from collections import Counter

    from skipcat_edge.inspection import inspect

    types = Counter(layer.type for layer in inspect(path).dense_layers)
    return types.most_common(1)[0][0] if types else "dense"
