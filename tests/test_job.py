"""Conversions that are killed, find the disk full, or are begun twice: what is there afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from conversion import DEMO

torch = pytest.importorskip("torch", reason="the converter needs torch")
transformers = pytest.importorskip("transformers", reason="the converter needs transformers")

from skipcat_converter import job_blocks, job_settings, pipeline  # noqa: E402
from skipcat_converter.candidates import Candidate  # noqa: E402
from skipcat_converter.job import DamagedError, Job, job_folder, open_job, temporary_job  # noqa: E402
from skipcat_converter.layers import Layer  # noqa: E402
from skipcat_converter.threads import Threads  # noqa: E402

from skipcat_edge.errors import RetryError, UnreachableError, UserError  # noqa: E402

pytestmark = pytest.mark.runtime

# By set of options.
KILLS = {"auto": 20, "levels": 6, "one-sided": 6, "dense": 6, "streamed": 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "levels": {"levels": [0.7, 0.9]},
    "one-sided": {"method": "skip", "gradients": False},
    "dense": {"ratio": 1, "quant": "Q4_0"},
    "streamed": {"max_memory": 3 * 10**9},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short calibration text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO / "calibration.txt").read_text("utf-8")[:2000], "utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three small blocks."""
    from test_architectures import random_model

    folder = tmp_path_factory.mktemp("source") / "tiny"
    random_model("llama-gqa", folder)
    return folder


@pytest.fixture(scope="module")
def base(model: Path) -> Path:
    """Its dense GGUF."""
    out = model.parent / "base.gguf"
    result = run("convert", model, "-o", out, "--ratio", 1, "--quant", "F16")
    assert result.exit_code == 0, result.output
    return out


@dataclass
class Worker:
    """Runs attempts at a conversion."""

    process: subprocess.Popen[str]

    def attempt(self, out: Path, options: dict[str, Any], **how: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"out": str(out), "options": options, **how}), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def whole(self, out: Path, options: dict[str, Any]) -> tuple[dict[str, bytes], int]:
        """What an uninterrupted conversion writes, and its events."""
        out.parent.mkdir()
        answer = self.attempt(out, options)
        assert not answer["killed"] and answer["error"] is None, answer
        return contents(out.parent), answer["events"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in it; a folder, such as a job's, must not be there."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_done(answer: dict[str, Any]) -> None:
    """The attempt made the output, or found it where one that was killed had nothing left to do but to
    remove its job."""
    assert not answer["killed"]
    assert answer["error"] is None or "exists already" in answer["error"], answer


def start(*arguments: Path) -> Iterator[Worker]:
    script = Path(__file__).with_name("killed_conversions.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, str(script), *map(str, arguments)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True, env=env) as process:
        yield Worker(process)
        assert process.stdin is not None
        process.stdin.close()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def worker(model: Path, text: Path, base: Path) -> Iterator[Worker]:
    yield from start(model, text, base)


@pytest.fixture(scope="module")
def worker_without_base(model: Path, text: Path) -> Iterator[Worker]:
    yield from start(model, text)


@pytest.mark.trust
@pytest.mark.parametrize("name", OPTIONS)
def test_killed_at_random_points(
    name: str, worker: Worker, tmp_path: Path, record_property: Any
) -> None:
    """Before a random name is opened, renamed or removed."""
    options, dice = OPTIONS[name], random.Random(f"kill {name}")
    expected, events = worker.whole(tmp_path / "whole" / "out.gguf", options)
    kills, rounds, said = 0, 0, []
    longest = events // (3 if name == "auto" else 2)
    while kills < KILLS[name]:
        rounds += 1
        out = tmp_path / f"{rounds}" / "out.gguf"
        out.parent.mkdir()
        while True:
            answer = worker.attempt(out, options, event=dice.randint(1, longest))
            if not answer["killed"]:
                break
            kills += 1
        assert_done(answer)
        said += answer["said"]
        assert contents(out.parent) == expected, f"seed {name}, round {rounds}"
    record_property("shown", f"{kills} kills in {rounds} conversions of {events} events")
    if name in ("auto", "levels"):
        assert any("of 3 blocks are done" in text for text in said), said


@pytest.mark.trust
@pytest.mark.slow
def test_killed_at_every_point(
    worker: Worker, tmp_path: Path, thorough: bool, record_property: Any
) -> None:
    """Once before each event of a conversion, and once more in what then goes on; by default before every
    seventh, which meets each of the four that writing a file has."""
    expected, events = worker.whole(tmp_path / "whole" / "out.gguf", {})
    chosen = range(1, events + 1, 1 if thorough else 7)
    record_property("shown", f"before {len(chosen)} of {events} events")
    for event in chosen:
        out = tmp_path / f"{event}" / "out.gguf"
        out.parent.mkdir()
        assert worker.attempt(out, {}, event=event)["killed"]
        worker.attempt(out, {}, event=9)
        assert_done(worker.attempt(out, {}))
        assert contents(out.parent) == expected, event


@pytest.mark.trust
def test_killed_at_random_times(worker_without_base: Worker, tmp_path: Path) -> None:
    """The whole process group, in the middle of whatever it does; the base file is made too."""
    dice = random.Random(7)
    begun = time.monotonic()
    expected, _ = worker_without_base.whole(tmp_path / "whole" / "out.gguf", {})
    seconds = time.monotonic() - begun
    out = tmp_path / "killed" / "out.gguf"
    out.parent.mkdir()
    # the first ones hit llama.cpp's converter; later ones may find all done
    attempts = [worker_without_base.attempt(out, {}, delay=dice.uniform(0.05, longest) * seconds)
                for longest in (0.2, 0.3, 0.5, 0.7)]
    kills = sum(attempt["killed"] for attempt in attempts)
    print(f"{kills} kills of {len(attempts)} attempts, of {seconds:.1f} s a conversion")
    assert 2 * kills >= len(attempts)
    assert_done(worker_without_base.attempt(out, {}))
    assert contents(out.parent) == expected


def assert_full(answer: dict[str, Any], out: Path) -> None:
    """One sentence that says where the job is, which stays."""
    assert not answer["killed"]
    assert "could not be written (" in answer["error"] and "same command goes on" in answer["error"], answer
    assert str(job_folder(out)) in answer["error"] and job_folder(out).is_dir() and not out.exists()


@pytest.mark.trust
def test_full_disk(worker: Worker, tmp_path: Path) -> None:
    """No file may become larger than so much: each stage meets it, and goes on once there is room."""
    expected, events = worker.whole(tmp_path / "whole" / "out.gguf", {})
    out = tmp_path / "full" / "out.gguf"
    out.parent.mkdir()
    # what is there when it happens, and what must be there by then
    for size, event, there in (
        (100, 0, ""), (500_000, 0, "settings.json"), (100_000, events // 4, "statistics.unfinished"),
        (100_000, events // 4, "plan.json"), (400_000, events // 4, "factors-0000.npz"),
    ):
        if event:
            assert worker.attempt(out, {}, event=event)["killed"]
        assert_full(worker.attempt(out, {}, file_size=size), out)
        assert not there or job_folder(out).joinpath(there).exists(), (size, there)
    assert worker.attempt(out, {})["error"] is None
    assert contents(out.parent) == expected


@pytest.mark.trust
def test_full_disk_in_llama_cpps_converter(worker_without_base: Worker, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert_full(worker_without_base.attempt(out, {}, file_size=20_000), out)
    assert sorted(path.name for path in job_folder(out).iterdir()) == ["lock", "settings.json"]


@pytest.fixture(scope="module")
def killed(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The output of a conversion that was killed while its blocks were factored, and what one that was not
    writes."""
    folder = tmp_path_factory.mktemp("killed")
    expected, events = worker.whole(folder / "whole" / "out.gguf", {})
    out = folder / "out.gguf"
    assert worker.attempt(out, {}, event=events * 3 // 4)["killed"]
    return out, expected["out.gguf"]


@pytest.fixture
def unfinished(killed: tuple[Path, bytes], tmp_path: Path) -> Path:
    """A copy of it."""
    out = tmp_path / "out.gguf"
    shutil.copytree(job_folder(killed[0]), job_folder(out))
    return out


@pytest.fixture
def whole(killed: tuple[Path, bytes]) -> bytes:
    """What it would have been."""
    return killed[1]


@pytest.mark.parametrize(("options", "words"), [
    ({"ratio": 0.7}, ["--ratio (0.8; this one: 0.7)"]),
    ({"quant": "Q8_0"}, ["--quant (F16; this one: Q8_0)"]),
    ({"seed": 3}, ["--seed (none; this one: 3)"]),
    ({"compensate": False}, ["--no-compensation (False; this one: True)"]),
    ({"calibration": str(DEMO / "calibration.txt")}, ["another calibration text ("]),
    ({"source": None}, ["another model ("]),
])
def test_another_setting_is_refused_and_restart_begins_anew(
    options: dict[str, Any], words: list[str], unfinished: Path, model: Path, base: Path, text: Path,
    tmp_path: Path,
) -> None:
    from skipcat_edge import convert

    chosen = {"base": base, "calibration": text, "quant": "F16", **options}
    source = model if "source" not in chosen else DEMO / "model"
    chosen.pop("source", None)
    before = contents(job_folder(unfinished))
    with pytest.raises(UserError) as refused:
        convert(source, unfinished, **chosen)
    for word in [*words, "--restart"]:
        assert word in refused.value.message
    assert contents(job_folder(unfinished)) == before
    if options == {"ratio": 0.7}:
        convert(source, unfinished, restart=True, **chosen)
        convert(source, tmp_path / "fresh.gguf", **chosen)
        assert unfinished.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()
        assert not job_folder(unfinished).exists()


def test_progress_says_what_was_found(worker: Worker, unfinished: Path) -> None:
    said = worker.attempt(unfinished, {})["said"]
    assert len(said) == 1 and said[0].startswith("Resuming: ") and said[0].endswith(" of 3 blocks are done.")


@pytest.mark.parametrize("last_phase", [False, True])
def test_a_second_conversion_to_the_same_output_is_refused(
    last_phase: bool, model: Path, base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, from the first artifact to the last rename."""
    from skipcat_edge import convert

    out, refused = tmp_path / "out.gguf", []
    place, begin = Job.place, Job.write_json

    def second() -> None:
        command = "from skipcat_edge.cli import main; main()"
        arguments = ["convert", model, "-o", out, "--base", base, "--calibration", text, "--force"]
        done = subprocess.run([sys.executable, "-c", command, *map(str, arguments)], text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
        refused.append(done)

    def at_last(self: Job, *arguments: Any) -> None:
        place(self, *arguments)
        assert out.exists()
        second()

    def at_first(self: Job, *arguments: Any) -> None:
        begin(self, *arguments)
        if not refused:
            second()

    monkeypatch.setattr(Job, *(("place", at_last) if last_phase else ("write_json", at_first)))
    convert(model, out, base=base, calibration=text, quant="F16")
    (done,) = refused
    assert done.returncode == 2 and not done.stdout
    assert "Another process is converting to" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.md"]


def test_a_mistake_leaves_nothing(model: Path, base: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = run("convert", model, "-o", out, "--base", base, "--calibration", text, "--ratio", 0.001)
    assert result.exit_code == 2 and "smallest possible" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("artifacts", "error", "kept"), [
    ([], UserError, False),
    (["cheap"], UserError, False),
    (["cheap", "other"], UserError, True),
    (["cheap", "other"], UnreachableError, False),
    (["cheap", "other"], DamagedError, False),
    ([], RetryError, False),
    (["cheap"], RetryError, True),
])
def test_what_an_error_leaves(
    artifacts: list[str], error: type[UserError], kept: bool, tmp_path: Path
) -> None:
    """Hours of work stay, whatever the error seems to be about; what cost little, or is of no use, goes."""
    out = tmp_path / "out.gguf"
    with pytest.raises(error) as found, open_job(out, {}, cheap=["cheap"]) as job:
        for name in artifacts:
            job.write_json(name, 0)
        raise error("The disk is gone.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ([job_folder(out).name] if kept else [])
    if not kept or error is RetryError:
        assert found.value.message == "The disk is gone."
        return
    assert found.value.message == (f"The disk is gone; what is finished is kept in {job_folder(out)}: the "
                                   "same command goes on from it, and --restart begins anew.")
    with open_job(out, {}) as job:
        assert all(map(job.has, artifacts))


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output"), ImportError("no libgomp")])
def test_a_model_that_cannot_be_loaded_now(
    error: Exception, unfinished: Path, model: Path, base: Path, text: Path, whole: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It could be when the job was begun."""
    def fail(*_: Any, **__: Any) -> None:
        raise error

    command = ("convert", model, "-o", unfinished, "--base", base, "--calibration", text, "--quant", "F16")
    for partial in job_folder(unfinished).glob("*.partial-*"):
        partial.unlink()
    before = contents(job_folder(unfinished))
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
        result = run(*command)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "cannot be loaded" in result.output and "what is finished is kept" in result.output
    assert contents(job_folder(unfinished)) == before
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert unfinished.read_bytes() == whole


def test_as_many_threads_as_it_was_begun_with(
    unfinished: Path, model: Path, base: Path, text: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With others sums would come out otherwise; this process has its own again afterwards."""
    from skipcat_edge import convert

    begun = json.loads((job_folder(unfinished) / "settings.json").read_text())["number of threads"]
    assert begun["torch"] == 1 and set(begun["libraries"].values()) == {1}
    used, said = [], []
    write = pipeline.write_file

    def watched(*arguments: Any, **how: Any) -> None:
        used.append(Threads.here())
        write(*arguments, **how)

    monkeypatch.setattr(pipeline, "write_file", watched)
    with Threads(3, dict.fromkeys(begun["libraries"], 2)).used():
        before = Threads.here()
        assert asdict(before) != begun
        convert(model, unfinished, base=base, calibration=text, quant="F16", warn=said.append)
        assert Threads.here() == before
    assert [asdict(each) for each in used] == [begun]
    assert said[0].startswith("Resuming with 1 thread instead of 3 threads")
    assert unfinished.read_bytes() == whole


@pytest.mark.parametrize("package", ["gguf", "numpy", "scipy", "tokenizers", "transformers"])
def test_another_version_is_refused(
    package: str, unfinished: Path, model: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skipcat_edge import convert

    version = job_settings.version
    before = contents(job_folder(unfinished))
    monkeypatch.setattr(job_settings, "version", lambda name: "0.0" if name == package else version(name))
    with pytest.raises(UserError) as refused:
        convert(model, unfinished, base=base, calibration=text, quant="F16")
    assert f"another version of {package} ({version(package)}; this one: 0.0)" in refused.value.message
    assert contents(job_folder(unfinished)) == before


def without_a_part(path: Path) -> None:
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files if name != "0.0"}
    assert len(kept) == len(file.files) - 1
    with path.open("wb") as written:
        np.savez(written, **kept)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def of(value: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(value) and None


@pytest.mark.parametrize(("name", "damage"), [
    ("factors-0000.npz", without_a_part), ("factors-0000.npz", cut), ("factors-0000.npz", of("[]")),
    ("plan.json", of("[]")), ("plan.json", of('{"owners": [{"members": [{"x": 1}]}]}')),
])
def test_a_damaged_artifact(
    name: str, damage: Callable[[Path], None], unfinished: Path, model: Path, base: Path, text: Path
) -> None:
    damage(job_folder(unfinished) / name)
    command = ("convert", model, "-o", unfinished, "--base", base, "--calibration", text, "--quant", "F16")
    result = run(*command)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert str(job_folder(unfinished) / name) in result.output and "begins anew" in result.output
    assert not job_folder(unfinished).exists()


@pytest.mark.parametrize("damage", ["[]", "null", "{", '"x"', "1"])
def test_damaged_settings(damage: str, tmp_path: Path) -> None:
    """What they belong to stays until the user says that it may go."""
    out = tmp_path / "out.gguf"
    with pytest.raises(RetryError), open_job(out, {}) as job:
        job.write_json("artifact", 0)
        raise RetryError("Full.")
    settings = job_folder(out) / "settings.json"
    settings.write_text(damage)
    with pytest.raises(UserError, match=r"settings\.json is not what a conversion keeps; pass --restart"), \
            open_job(out, {}):
        pass
    assert job.has("artifact") and settings.read_text() == damage
    with open_job(out, {}, "yes") as job:
        assert not job.has("artifact")


@pytest.mark.parametrize("told", [
    {"torch": 0}, {"torch": "2"}, {"libraries": 3}, {"libraries": {"blas": -1}},
])
def test_damaged_number_of_threads(
    told: dict[str, Any], unfinished: Path, model: Path, base: Path, text: Path
) -> None:
    settings = job_folder(unfinished) / "settings.json"
    known = json.loads(settings.read_text())
    settings.write_text(json.dumps({**known, "number of threads": {**known["number of threads"], **told}}))
    result = run("convert", model, "-o", unfinished, "--base", base, "--calibration", text, "--quant", "F16")
    assert result.exit_code == 2 and "settings.json is not what a conversion keeps" in result.output
    assert settings.exists() and "--restart" in result.output


def test_statistics_that_cannot_be_read_now(
    unfinished: Path, model: Path, base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails is no damage of what is on it."""
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    statistics = job_folder(unfinished) / "statistics.safetensors"
    assert statistics.exists()
    monkeypatch.setattr("skipcat_converter.statistics_file.safe_open", fail)
    result = run("convert", model, "-o", unfinished, "--base", base, "--calibration", text, "--quant", "F16")
    assert result.exit_code == 2 and "cannot be read (" in result.output, result.output
    assert "Input/output error" in result.output
    assert statistics.exists()


def test_damaged_measurements(tmp_path: Path) -> None:
    """Layers with other fields, or with values of another kind."""
    layer = Layer(0, "attn_q", "model.q", 4, 4)
    groups = [[[Candidate((layer,), np.ones(4), {True: (np.arange(2), np.ones(2))})]]]
    with temporary_job(tmp_path / "out.gguf") as job:
        job_blocks.measured(job, 0, lambda: groups)
        (path,) = job.folder.glob("measured-*.npz")

        def never() -> Any:
            raise AssertionError

        (((found,),),) = job_blocks.measured(job, 0, never)
        assert found.members == (layer,)
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        for members in ([{"x": 1}], [{**asdict(layer), "m": "4"}], [{**asdict(layer), "member": 3}], 5):
            told = np.frombuffer(json.dumps([[[members]]]).encode(), np.uint8)
            with path.open("wb") as written:
                np.savez(written, **{**arrays, "told": told})
            with pytest.raises(DamagedError, match=f"{path.name} is not what a conversion keeps"):
                job_blocks.measured(job, 0, never)


def test_statistics_are_kept_across_kills(worker: Worker, tmp_path: Path) -> None:
    """With --stats: byte for byte the same, too."""
    expected, events = worker.whole(tmp_path / "whole" / "out.gguf",
                                    {"stats": str(tmp_path / "whole" / "statistics")})
    dice = random.Random(5)
    out = tmp_path / "killed" / "out.gguf"
    out.parent.mkdir()
    options = {"stats": str(out.parent / "statistics")}
    while worker.attempt(out, options, event=dice.randint(1, events))["killed"]:
        pass
    assert contents(out.parent) == expected


def test_lock_is_the_processes_and_its_folder_is_found_again(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with open_job(out, {"--ratio": 0.8}) as job:
        descriptor = os.open(job.path("lock"), os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        with pytest.raises(UserError, match="Another process is converting"), open_job(out, {}):
            pass
    assert not job_folder(out).exists()


def test_artifacts_are_whole_or_not_there(tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    out = tmp_path / "out.gguf"
    with pytest.raises(KilledError), open_job(out, {}) as job:
        job.write_json("number", 0.1)
        with job.artifact("half") as path:
            path.write_text("half")
            raise KilledError
    (job_folder(out) / "other.partial-1").write_text("of a process that was killed")
    with open_job(out, {}) as job:
        assert job.read_json("number") == 0.1
        assert not job.has("half") and not list(job.folder.glob("*partial*"))
        job.drop("number")
        assert not job.has("number")
