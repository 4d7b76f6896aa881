"""Where independent work is done: here, one task after another, or on the machines of a Ray cluster.

Results are the same to the byte. A BLAS may add in another order with another number of threads, so a task on
another machine runs with as many as it would have here.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol, TypeVar

from skipcat_edge import __version__
from skipcat_edge.errors import RetryError, UserError, first_line
from skipcat_edge.extra import require_packages

from .threads import Threads

ExecutorName = Literal["local", "ray"]

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor(Protocol):
    """Does work of which no part needs another's result."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results in the order of `tasks`, of which no more are taken than are worked on.

        `function` is one of a module's, and tasks and results are plain values. Raises what it raises.
        """


class LocalExecutor:
    """Each task when its result is asked for."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        return map(function, tasks)


class RayExecutor:
    """A task per block on a Ray cluster: the one that RAY_ADDRESS names, or else a new one on this machine
    alone."""

    def __init__(self) -> None:
        """Raises UserError if Ray is missing, or the cluster cannot be reached."""
        require_packages("--executor ray needs", "ray", "ray")
        import ray

        try:
            if not ray.is_initialized():
                # without an address Ray would join the cluster that a file in /tmp names, which is anybody's
                own = {"address": "local", "include_dashboard": False}
                ray.init(log_to_driver=False, logging_level="ERROR",
                         **({} if os.environ.get("RAY_ADDRESS") else own))
            machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RetryError(f"The Ray cluster cannot be reached: {first_line(error)}; start one with "
                             "`ray start --head`, or unset RAY_ADDRESS.") from None
        self._machines = machines

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        import ray

        threads = Threads.here()
        # as many as a task's threads, but no more than there are anywhere, which would wait for ever
        cpus = max(1, min(threads.torch, max(self._machines, default=1)))
        at_once = max(1, sum(count // cpus for count in self._machines))
        # a machine may be lost; a task that ends two workers ends all
        remote = ray.remote(num_cpus=cpus, max_retries=1)(_run)
        waiting: deque[Any] = deque()
        try:
            for task in tasks:
                waiting.append(remote.remote(function, task, threads, __version__))
                if len(waiting) > at_once:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)


def open_executor(name: ExecutorName) -> Executor | None:
    """The executor of this name; None: work is done here when it is due. Raises UserError as RayExecutor."""
    return RayExecutor() if name == "ray" else None


def _run(function: Callable[[Any], Any], task: Any, threads: Threads, version: str) -> Any:
    """In a worker."""
    if version != __version__:
        raise RetryError(f"A Ray worker has skipcat-edge {__version__}, not {version}; install the same "
                         "version on all machines.")
    with threads.used():
        return function(task)


def _result(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        if isinstance(error.cause, ModuleNotFoundError):
            raise RetryError(f"A Ray worker has no {error.cause.name}; install 'skipcat-edge[convert,ray]' "
                             "on all machines.") from None
        raise
    except RayError as error:
        raise RetryError(f"A Ray worker failed ({first_line(error)}); run the same command again, which goes "
                         "on from what is done.") from None
