"""Conversions on a Ray cluster of this machine: the same bytes as without."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from conversion import DEMO, convert_model

torch = pytest.importorskip("torch", reason="the converter needs torch")
transformers = pytest.importorskip("transformers", reason="the converter needs transformers")

from skipcat_converter import executor, pipeline  # noqa: E402
from skipcat_converter.executor import RayExecutor  # noqa: E402
from skipcat_converter.job import job_folder  # noqa: E402
from skipcat_converter.threads import Threads  # noqa: E402

from skipcat_edge import extra  # noqa: E402
from skipcat_edge.errors import RetryError, UserError  # noqa: E402

pytestmark = pytest.mark.runtime

# What is measured and factored elsewhere: measured only, both, both of levels, factored only.
OPTIONS: dict[str, dict[str, Any]] = {
    "compensated": {"method": "auto", "quant": "Q4_0", "ratio": 0.9},
    "not compensated": {"method": "auto", "quant": "Q4_0", "ratio": 0.9, "compensate": False},
    "levels": {"method": "auto", "levels": (0.6, 0.8), "compensate": False},
    "uniform": {"method": "skipcat", "quant": "Q8_0", "compensate": False},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers, each with as many threads as a task here."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    # the workers import this file's functions
    workers = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    ray.init(num_cpus=2 * torch.get_num_threads(), include_dashboard=False, logging_level="ERROR",
             log_to_driver=False, object_store_memory=200 * 2**20, runtime_env=workers)
    yield ray
    ray.shutdown()


@dataclass(frozen=True)
class Source:
    """A model of three small blocks, its dense GGUF and its statistics."""

    folder: Path

    def convert(self, out: Path, **options: Any) -> Any:
        return convert_model(self.folder / "model", out, base=self.folder / "base.gguf", calib_tokens=512,
                             stats=self.folder / "statistics", **options,
                             calibration=DEMO / "calibration.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    from test_architectures import random_model

    folder = tmp_path_factory.mktemp("source")
    random_model("llama-gqa", folder / "model")
    convert_model(folder / "model", folder / "base.gguf", ratio=1.0)
    source = Source(folder)
    source.convert(folder / "out.gguf", ratio=1.0)
    return source


@pytest.mark.parametrize("name", OPTIONS)
def test_same_bytes(name: str, cluster: Any, source: Source, tmp_path: Path) -> None:
    here, there = tmp_path / "here.gguf", tmp_path / "there.gguf"
    first = source.convert(here, **OPTIONS[name])
    second = source.convert(there, **OPTIONS[name], executor="ray")
    assert there.read_bytes() == here.read_bytes()
    assert (second.owners, second.kept, second.levels) == (first.owners, first.kept, first.levels)
    assert not job_folder(there).exists()


@dataclass
class Elsewhere:
    """A machine that has none of this one's files."""

    statistics: Path
    sent: list[int] = field(default_factory=list)

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        for task in tasks:
            data = pickle.dumps(task)
            self.sent.append(len(data))
            aside = self.statistics.rename(self.statistics.with_suffix(".aside"))
            result = function(pickle.loads(data))
            aside.rename(self.statistics)
            yield result


def test_a_task_carries_what_it_needs(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its block's weights and statistics, not those of others, and no file."""
    options = OPTIONS["not compensated"]
    source.convert(tmp_path / "here.gguf", **options)
    elsewhere = Elsewhere(source.folder / "statistics")
    monkeypatch.setattr(pipeline, "open_executor", lambda name: elsewhere)
    source.convert(tmp_path / "there.gguf", executor="ray", **options)
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()
    blocks = len(elsewhere.sent) // 2
    # statistics are stored in float32 and sent in float64
    all_of_them = 2 * elsewhere.statistics.stat().st_size + (source.folder / "base.gguf").stat().st_size
    assert max(elsewhere.sent) < 1.5 * all_of_them / blocks


class Failing:
    """A cluster that is lost after the first task."""

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        yield function(next(iter(tasks)))
        raise RetryError("The cluster is lost.")


def test_what_is_done_survives_a_lost_cluster(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    monkeypatch.setattr(pipeline, "open_executor", lambda name: Failing())
    with pytest.raises(RetryError):
        source.convert(out, executor="ray", **OPTIONS["uniform"])
    assert job_folder(out).exists()
    monkeypatch.undo()
    source.convert(tmp_path / "here.gguf", **OPTIONS["uniform"])
    source.convert(out, **OPTIONS["uniform"])
    assert out.read_bytes() == (tmp_path / "here.gguf").read_bytes()
    assert not job_folder(out).exists()


def where(task: int) -> tuple[int, int, int]:
    return task, os.getpid(), torch.get_num_threads()


def test_order_workers_and_threads(cluster: Any) -> None:
    found = list(RayExecutor().map(where, range(8)))
    assert [task for task, _, _ in found] == [*range(8)]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {torch.get_num_threads()}


def test_tasks_are_taken_as_they_are_worked_on(cluster: Any) -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for task in range(20):
            taken.append(task)
            yield task

    results = RayExecutor().map(where, tasks())
    next(results)
    assert len(taken) <= 4
    results.close()  # type: ignore[attr-defined]


def refuse(task: int) -> int:
    if task == 2:
        raise UserError("The third is wrong.")
    return task


def test_errors_are_those_of_here(cluster: Any) -> None:
    results = RayExecutor().map(refuse, range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(UserError, match=r"^The third is wrong\.$"):
        next(results)


def die(task: int) -> int:
    os._exit(1)


def test_worker_that_dies(cluster: Any) -> None:
    with pytest.raises(UserError, match="A Ray worker failed"):
        list(RayExecutor().map(die, [0]))


def test_a_worker_of_another_version() -> None:
    """It can be updated, and what is done meanwhile stays."""
    with pytest.raises(RetryError, match=r"has skipcat-edge .*, not 0\.0; install the same version"):
        executor._run(where, 0, Threads.here(), "0.0")


@pytest.mark.parametrize(("address", "wanted"), [
    (None, {"address": "local", "include_dashboard": False}),
    ("", {"address": "local", "include_dashboard": False}),
    ("127.0.0.1:6379", {}),
])
def test_only_a_cluster_that_was_named_is_joined(
    address: str | None, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray by itself joins one that a file in /tmp names, which is anybody's, and unpickles what it sends."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    asked: list[dict[str, Any]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **how: asked.append(how))
    monkeypatch.setattr(ray, "nodes", list)
    RayExecutor()
    (how,) = asked
    assert {name: how[name] for name in ("address", "include_dashboard") if name in how} == wanted


def test_a_planted_cluster_is_not_joined(tmp_path: Path) -> None:
    """Ray knows it by the file that `ray start` leaves, and would fail to reach it."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    script = (
        "import sys, ray, ray._private.services as services\n"
        "services.find_bootstrap_address = lambda temp_dir: '127.0.0.1:1'\n"
        "assert services.canonicalize_bootstrap_address(None).endswith(':1')\n"
        "from skipcat_converter.executor import RayExecutor\n"
        "from test_executor import where\n"
        "print(*RayExecutor().map(where, [5]))\n")
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    found = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True,
                           env={**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert found.returncode == 0, (ray.__version__, found.stderr)
    assert found.stdout.startswith("(5, ")


def test_ray_is_missing(monkeypatch: pytest.MonkeyPatch, demo_dense_gguf: Path, tmp_path: Path) -> None:
    known = extra.find_spec
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "ray" else known(name))
    result = run("convert", DEMO / "model", "-o", tmp_path / "out.gguf", "--base", demo_dense_gguf,
                 "--calibration", DEMO / "calibration.txt", "--executor", "ray")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: --executor ray needs ray; install it with `pip install 'skipcat-edge[ray]'`.")
    assert [*tmp_path.iterdir()] == []


def test_local_conversion_imports_no_ray() -> None:
    script = "import sys, skipcat_converter.pipeline; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
