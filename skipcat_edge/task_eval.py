"""Zero-shot tasks, by lm-evaluation-harness."""

from __future__ import annotations

import difflib
import io
import logging
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from skipcat_edge.errors import UserError, first_line
from skipcat_edge.evaluation import Begin
from skipcat_edge.extra import require_packages

_BOOTSTRAP = 1000
"""Draws for the standard errors that have no closed form."""
_SEEDS = 0, 1234
"""lm-eval's own, of Python's random module and of all others."""
_LOGGERS = "lm_eval", "datasets", "evaluate", "huggingface_hub", "fsspec", "httpx", "urllib3"
# What these libraries read when they are first imported. Only what a task names is fetched, and nobody is
# told that it ran. For 1000 draws, lm-eval would start a process for each core.
_ENVIRONMENT = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "DISABLE_MULTIPROC": "1",
}
_UNREACHABLE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout",
                "DatasetNotFoundError", "ConnectionError", "MaxRetryError", "ProxyError")


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, and, with a reference, its value there."""

    task: str
    metric: str
    filter: str
    """What lm-eval did to the answers before it judged them."""
    value: float
    value_se: float | None
    """Standard error; None where lm-eval has none."""
    samples: int
    reference: float | None = None
    reference_se: float | None = None

    @property
    def difference(self) -> float | None:
        """`value` without the reference's."""
        return None if self.reference is None else self.value - self.reference

    def to_json(self) -> dict[str, Any]:
        """Flat; what belongs to the reference only where there is one."""
        values = asdict(self)
        if self.reference is None:
            return {name: value for name, value in values.items() if not name.startswith("reference")}
        return {**values, "difference": self.difference}


def measure_tasks(file: Path, names: Sequence[str], *, task_path: Path | None = None,
                  limit: int | None = None, length: int | None = None, reference: Path | None = None,
                  threads: int | None = None, rank_level: float | None = None,
                  begin: Begin = lambda title, total: lambda: None) -> list[TaskResult]:
    """What `file` and `reference` reach in the tasks `names`, in lm-eval's order.

    `task_path` is a folder of further task files; a name may be a task file's path as well. `limit` takes
    the first samples of each task only, `length` a shorter context than the model's, `rank_level` a lower
    level of `file`. Raises UserError where
    lm-eval is missing, knows no such task, cannot load it or cannot judge it.
    """
    with _harness():
        tasks = load_tasks(names, task_path)
        dense = None if reference is None else _measure(reference, tasks, limit, length, threads, None, begin)
        found = _measure(file, tasks, limit, length, threads, rank_level, begin)
    return found if dense is None else [_beside(ours, dense) for ours in found]


@contextmanager
def _harness() -> Iterator[None]:
    """lm-eval without its talk: what it prints would be taken for our own output."""
    require_packages("Tasks need", "eval", "lm_eval")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(), _no_bars():
        warnings.simplefilter("ignore")
        import lm_eval.tasks  # noqa: F401  the libraries set their loggers' levels when they are imported

        levels = {name: logging.getLogger(name).level for name in _LOGGERS}
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """TQDM_DISABLE would come too late where tqdm has been imported."""
    from tqdm.std import tqdm

    draw = tqdm.__init__

    def silent(bar: Any, *given: Any, **named: Any) -> None:
        draw(bar, *given, **{**named, "disable": True})

    with patch.object(tqdm, "__init__", silent):
        yield


def load_tasks(names: Sequence[str], task_path: Path | None) -> dict[str, Any]:
    """lm-eval's task objects, with their data. Raises UserError where one is unknown or does not load."""
    manager = _manager(names, task_path)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # a task file's own code may raise anything
            raise _load_error(name, manager, error) from error
        for kind in loaded:
            loaded[kind].update(found.get(kind) or {})
    for name, task in loaded["tasks"].items():
        # lm-eval goes on without a metric that it does not find
        for metric, judge in getattr(task, "_metric_fn_list", {}).items():
            if judge is None and task.config.process_results is None:
                raise UserError(f"lm-eval has no metric {metric}, which task {name} asks for, or cannot "
                                "fetch it; name another in its metric_list.")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _manager(names: Sequence[str], task_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if task_path is not None:
        if not task_path.is_dir():
            raise UserError(f"{task_path} is not a folder; --task-path takes one with task files (*.yaml).")
        # lm-eval reads ten thousand files of its own to learn their names.
        manager = TaskManager(include_path=str(task_path), include_defaults=False)
        if {*names} <= {*manager.all_subtasks}:
            return manager
    elif all(_is_file(name) for name in names):
        return TaskManager(include_defaults=False)
    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    for name in names:
        if name not in manager.all_tasks and not _is_file(name):
            raise _unknown(name, manager.all_tasks, task_path)
    return manager


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _unknown(name: str, known: Sequence[str], task_path: Path | None) -> UserError:
    from lm_eval.tasks._yaml_loader import load_yaml

    # lm-eval passes over files that it cannot read.
    for file in sorted(task_path.glob("**/*.yaml")) if task_path is not None else []:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            return UserError(f"There is no task {name}, but {file} cannot be read ({first_line(error)}); "
                             "is it there?")
    near = difflib.get_close_matches(name, known, n=3)
    where = "" if task_path is None else f", nor has {task_path}"
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists those it has."
    return UserError(f"lm-eval has no task {name}{where}; {hint}")


def _load_error(name: str, manager: Any, error: Exception) -> UserError:
    entry = manager.task_index.get(name)
    file = name if entry is None or entry.yaml_path is None else entry.yaml_path
    told: BaseException | None = error
    while told is not None:
        if type(told).__name__ in _UNREACHABLE:
            return UserError(f"The data of task {name} is not here and its source cannot be reached "
                             f"({first_line(error)}); run it once with a network, or give a task file with "
                             "data of its own.")
        told = told.__cause__ or told.__context__
    return UserError(f"Task {name} cannot be loaded: {type(error).__name__}: {first_line(error)}; "
                     f"look at {file}.")


def _measure(file: Path, tasks: dict[str, Any], limit: int | None, length: int | None, threads: int | None,
             rank_level: float | None, begin: Begin) -> list[TaskResult]:
    import numpy as np
    from lm_eval import evaluate

    from skipcat_edge.lm_eval_adapter import GgufLM

    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=_SEEDS[1])  # both models see the same examples
    model = GgufLM(file, length=length, threads=threads, rank_level=rank_level, begin=begin)
    try:
        found = evaluate(model, tasks, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False)
    except UserError:
        raise
    except Exception as error:  # templates and code of task files may raise anything
        raise UserError(f"lm-eval could not judge {file}: {type(error).__name__}: {first_line(error)}; look "
                        f"at the files of {', '.join(tasks['tasks'])}.") from error
    finally:
        model.close()
    return list(_results(found))


def _results(found: Any) -> Iterator[TaskResult]:
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = values.get(f"{metric}_stderr,{filter_}")
            yield TaskResult(task, metric, filter_, float(value),
                             float(error) if isinstance(error, float | int) else None, values["sample_len"])


def _beside(ours: TaskResult, dense: Sequence[TaskResult]) -> TaskResult:
    for theirs in dense:
        if (theirs.task, theirs.metric, theirs.filter) == (ours.task, ours.metric, ours.filter):
            return TaskResult(**{**asdict(ours), "reference": theirs.value, "reference_se": theirs.value_se})
    return ours


def with_error(value: float, error: float | None) -> str:
    """`0.7123 ± 0.0045`; without the error where there is none."""
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
