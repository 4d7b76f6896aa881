"""What compare does again and what it does not, with steps that only count."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from skipcat_edge.compare.progress import Step
from skipcat_edge.compare.request import entries, parse_ratios, parse_types
from skipcat_edge.compare.state import NAME, Job, State, source_identity
from skipcat_edge.errors import UserError


class Work:
    """Three steps, a -> b -> c, of which the first two write files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options = {"a": 1, "b": 1, "c": 1}
        self.done: Counter[str] = Counter()
        self.impossible: set[str] = set()
        self.interrupt = ""

    def jobs(self) -> list[Job]:
        def job(key: str, needs: tuple[str, ...]) -> Job:
            def run(step: Step) -> dict[str, object]:
                if self.interrupt == key:
                    raise KeyboardInterrupt
                self.done[key] += 1
                if key in self.impossible:
                    return {"impossible": "no"}
                if key != "c":
                    (self.folder / key).write_text(str(self.done[key]), encoding="utf-8")
                return {"found": self.options[key]}

            return Job(key, key, 1, needs, lambda: {"option": self.options[key], "pair": (1, 2)}, run,
                       None if key == "c" else self.folder / key)

        return [job("a", ()), job("b", ("a",)), job("c", ("b",))]

    def run(self) -> str:
        """Keys of the steps that were done."""
        before, state = Counter(self.done), State(self.folder)
        state.begin("source")
        for job in state.to_do(self.jobs()):
            state.keep(job, job.inputs(), job.run(Step(lambda _: None)))
        return "".join(sorted((self.done - before).elements()))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_nothing_is_done_twice(work: Work) -> None:
    assert work.run() == "abc"
    assert work.run() == ""


def test_an_interrupted_run_goes_on(work: Work) -> None:
    work.interrupt = "b"
    with pytest.raises(KeyboardInterrupt):
        work.run()
    work.interrupt = ""
    assert work.run() == "bc"


@pytest.mark.parametrize(("changed", "again"), [("a", "abc"), ("b", "bc"), ("c", "c")])
def test_a_changed_option_redoes_what_depends_on_it(work: Work, changed: str, again: str) -> None:
    work.run()
    work.options[changed] = 2
    assert work.run() == again
    assert State(work.folder).result(changed) == {"found": 2}


@pytest.mark.parametrize(("name", "again"), [("a", "abc"), ("b", "bc")])
def test_a_file_that_is_gone_or_touched_is_made_again(work: Work, name: str, again: str) -> None:
    work.run()
    (work.folder / name).unlink()
    assert work.run() == again
    (work.folder / name).write_text("another's", encoding="utf-8")
    assert work.run() == again


def test_what_cannot_be_had_is_not_tried_again(work: Work) -> None:
    work.impossible.add("b")
    assert work.run() == "abc"
    assert work.run() == ""
    assert State(work.folder).result("b") == {"impossible": "no"}


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 99, "source": "x", "steps": {}}'])
def test_a_broken_state_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="--force"):
        State(tmp_path)


def test_the_state_is_plain_json(work: Work) -> None:
    work.run()
    found = json.loads((work.folder / NAME).read_text(encoding="utf-8"))
    assert set(found["steps"]) == {"a", "b", "c"} and found["source"] == "source"
    assert not list(work.folder.glob(".*"))


def test_a_source_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    before = source_identity(tmp_path)
    assert source_identity(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("x", encoding="utf-8")
    assert source_identity(tmp_path) != before


def test_steps_of_a_conversion_fill_their_part_of_the_bar() -> None:
    shown: list[float] = []
    step = Step(shown.append)
    for title in ("Loading the model", "Measuring layers", "Factoring"):
        with step.phase(title, 4) as advance:
            for _ in range(4):
                advance(1)
    assert shown == sorted(shown)
    assert 0.9 < shown[-1] <= 1
    assert any(0.4 < share < 0.6 for share in shown)


def test_options_are_read() -> None:
    assert parse_ratios("0.6,0.9, 1") == (0.9, 0.6)
    assert parse_types(" q4_0,F16,Q4_0") == ("Q4_0", "F16")
    for wrong in ("0.9,many", "1.5", "0", ""):
        with pytest.raises(UserError):
            parse_ratios(wrong)
    for wrong in ("", " , ", "Q9_9"):
        with pytest.raises(UserError):
            parse_types(wrong)


def test_files_of_each_type(tmp_path: Path) -> None:
    from skipcat_edge.compare.request import Request

    def names(*types: str) -> list[str]:
        request = Request(tmp_path, "model", tmp_path, tmp_path, tmp_path, (0.8,), types)
        return [request.reference.stem, *(entry.path.stem for entry in entries(request))]

    assert names("F16", "Q4_0") == ["dense-F16", "low-rank-F16-0.8", "plain-Q4_0", "feedback-Q4_0",
                                    "low-rank-Q4_0-0.8"]
    assert names("F16", "F32") == ["dense-F32", "plain-F16", "low-rank-F16-0.8", "low-rank-F32-0.8"]


def test_given_files_have_labels_of_their_own(tmp_path: Path) -> None:
    from skipcat_edge.compare.request import distinct_names, short_labels

    folder = tmp_path / "runs"
    paths = [folder / "a" / "x" / "m.gguf", folder / "b" / "x" / "m.gguf", folder / "n.gguf"]
    assert distinct_names(paths) == ["a/x/m.gguf", "b/x/m.gguf", "n.gguf"]
    assert distinct_names([Path("bad\udcff<b>.gguf")]) == ["bad?<b>.gguf"]
    long = [f"Llama-3.2-1B-Instruct-{type_}-made-with-an-imatrix" for type_ in ("Q4_K_M", "Q5_K_M", "Q5_K_S")]
    labels = short_labels([*long, "short"])
    assert len(set(labels)) == 4 and all(len(label) <= 28 for label in labels)
    assert labels[0].startswith("…4_K") and labels[3] == "short"
    assert short_labels(["x" * 40, "x" * 41, "", ""])[2:] == ["", ""]


def test_a_model_is_called_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skipcat_edge.compare.job import _model_name

    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert [_model_name(source) for source in (".", "..", "owner/name", "../deep/")] == [
        "deep", tmp_path.name, "name", "deep"]


def test_the_command_is_shown_without_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    from skipcat_edge.commands.compare import _shown

    monkeypatch.setenv("HOME", "/home/alice")
    typed = ["/home/alice/My models/x", "--text=/home/alice/t.txt", "-o", "a b", "/srv/home/alice/x"]
    shown = " ".join(map(_shown, typed))
    assert shown.count("alice") == 1
    read = subprocess.run(["sh", "-c", f"printf '%s\\n' {shown}"], capture_output=True, text=True, check=True)
    assert read.stdout.splitlines() == typed
    monkeypatch.setenv("HOME", "/")
    assert _shown("/home/alice/x") == "/home/alice/x"
