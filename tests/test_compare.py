"""`compare` through the command line: mistakes, resuming, and the demo model from end to end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from conversion import DEMO

pytest.importorskip("matplotlib", reason="the extra `compare` is not installed")
pytest.importorskip("jinja2", reason="the extra `compare` is not installed")

TEXT = DEMO / "calibration.txt"
TINY = ("--max-tokens", 300, "--window", 64, "--prompt-tokens", 16, "--gen-tokens", 4, "--repetitions", 2,
        "--threads", 1)


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    """A part of the demo's text that is not calibrated with."""
    path = tmp_path / "other.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[-6000:], encoding="utf-8")
    return path


TEXTS = "--text {text} --calibration {text}"


@pytest.mark.parametrize(("arguments", "words"), [
    ("{demo} -o {new} --text {missing} --calibration {text}", ["missing.txt", "cannot be read"]),
    ("{demo} -o {new} --text {text}", ["--calibration"]),
    ("{demo} -o {new} --text {text} --calibration {missing}", ["missing.txt"]),
    ("{demo} -o {new} --text {empty} --calibration {text}", ["empty.txt is empty"]),
    (f"{{demo}} -o {{new}} {TEXTS} --types ,", ["names no type"]),
    (f"{{demo}} -o {{new}} {TEXTS} --types Q9_9", ["Q9_9"]),
    (f"{{demo}} -o {{new}} {TEXTS} --ratios 2", ["ratio is 2"]),
    (f"{{demo}} -o {{full}} {TEXTS}", ["no comparison", "--force"]),
    (f"{{demo}} -o {{text}} {TEXTS}", ["is a file"]),
    (f"{{demo}} -o {{new}}/deep {TEXTS}", ["create it first"]),
    (f"{{demo}} -o /proc/new {TEXTS}", ["/proc/new cannot be used", "can be written"]),
    (f"{{demo}} -o {'x' * 300} {TEXTS}", ["cannot be used (File name too long)"]),
    (f"{{demo}} -o {{new}} {TEXTS} --file {{missing}}", ["missing.txt: no such file"]),
    (f"{{gone}} -o {{new}} {TEXTS}", ["no such directory"]),
    ("{text} -o {new} --text {text}", ["not a GGUF file"]),
])
def test_compare_refuses(arguments: str, words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the converter needs torch")
    full = tmp_path / "full"
    full.mkdir()
    (full / "report.html").write_text("somebody's", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    names = {"demo": DEMO / "model", "new": tmp_path / "new", "missing": tmp_path / "missing.txt",
             "full": full, "text": TEXT, "empty": tmp_path / "empty.txt", "gone": tmp_path / "gone"}
    result = run("compare", *(argument.format(**names) for argument in arguments.split()))
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.stderr
    assert result.stderr.count("\n") == 1
    assert (full / "report.html").read_text(encoding="utf-8") == "somebody's"
    assert not (tmp_path / "new").exists()


class Counted:
    """Which files were evaluated, and how often all were benched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from skipcat_edge.compare import job

        self.evaluated: list[str] = []
        self.benched = 0
        self.interrupt: Callable[[str], bool] = lambda _: False
        evaluate, bench = job.Evaluator.__call__, job.bench_all

        def counted(evaluator: Any, path: Path, step: Any) -> Any:
            if self.interrupt(path.name):
                raise KeyboardInterrupt
            self.evaluated.append(path.name)
            return evaluate(evaluator, path, step)

        def counted_bench(*arguments: Any) -> Any:
            if self.interrupt("bench"):
                raise KeyboardInterrupt
            self.benched += 1
            return bench(*arguments)

        monkeypatch.setattr(job.Evaluator, "__call__", counted)
        monkeypatch.setattr(job, "bench_all", counted_bench)

    def since(self) -> tuple[list[str], int]:
        found = self.evaluated, self.benched
        self.evaluated, self.benched = [], 0
        return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.mark.runtime
def test_files_are_compared_with_a_dense_one_and_only_what_changed_is_measured_again(
    demo_dense_gguf: Path, demo_low_rank_gguf: Path, other_text: Path, tmp_path: Path, counted: Counted
) -> None:
    folder = tmp_path / "out"

    def compare(*more: object) -> Any:
        return run("compare", demo_dense_gguf, "-o", folder, "--text", other_text,
                   "--file", demo_low_rank_gguf, *TINY, *more)

    counted.interrupt = lambda name: name == "bench"
    result = compare()
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    assert counted.since() == (["dense.gguf", "skipcat.gguf"], 0)
    counted.interrupt = lambda _: False
    result = compare()
    assert result.exit_code == 0, result.output
    assert counted.since() == ([], 1)
    assert "skipcat.gguf" in result.stdout and str(folder / "report.html") in result.stdout
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "low rank" in page and "F16 reference" in page
    assert {path.name for path in folder.iterdir()} == {
        "compare.json", "report.html", "size.png", "first-token.png", "decode.png"}
    first = (folder / "size.png").read_bytes()
    assert first.startswith(b"\x89PNG")

    assert compare().exit_code == 0 and counted.since() == ([], 0)
    assert compare("--gen-tokens", 5).exit_code == 0 and counted.since() == ([], 1)
    assert compare("--gen-tokens", 5, "--max-tokens", 200).exit_code == 0
    assert counted.since() == (["dense.gguf", "skipcat.gguf"], 0)
    other_text.write_text("Once upon a time there was a fox. " * 60, encoding="utf-8")
    assert compare("--gen-tokens", 5, "--max-tokens", 200).exit_code == 0
    assert counted.since() == (["dense.gguf", "skipcat.gguf"], 0)


@pytest.mark.runtime
def test_the_figures_are_those_of_eval(
    demo_dense_gguf: Path, demo_low_rank_gguf: Path, other_text: Path, tmp_path: Path
) -> None:
    import json

    from command_line import run_json

    folder = tmp_path / "out"
    result = run("compare", demo_dense_gguf, "-o", folder, "--text", other_text, "--file", demo_low_rank_gguf,
                 *TINY)
    assert result.exit_code == 0, result.output
    told = run_json("eval", demo_low_rank_gguf, "--text", other_text, "--reference", demo_dense_gguf,
                    "--window", 64, "--max-tokens", 300, "--threads", 1)
    steps = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["steps"]
    found = steps[f"eval {demo_low_rank_gguf.resolve()}"]["result"]
    assert found["loss"] == pytest.approx(told["kl"], rel=1e-6)
    assert found["ppl"] == pytest.approx(told["ppl"], rel=1e-6)


@pytest.mark.runtime
def test_a_file_that_computes_no_numbers_is_left_out(
    demo_dense_gguf: Path, demo_low_rank_gguf: Path, other_text: Path, tmp_path: Path, counted: Counted
) -> None:
    from gguf import GGUFReader

    broken, folder = tmp_path / "broken.gguf", tmp_path / "out"
    broken.write_bytes(demo_dense_gguf.read_bytes())
    tensors = {tensor.name: tensor for tensor in GGUFReader(broken, "r+").tensors}
    tensors["output_norm.weight"].data[:] = float("nan")
    tensors["output_norm.weight"].data.flush()

    def compare(source: Path, *files: Path) -> Any:
        return run("compare", source, "-o", folder, "--text", other_text,
                   *(part for file in files for part in ("--file", file)), *TINY)

    result = compare(demo_dense_gguf, broken, demo_low_rank_gguf)
    assert result.exit_code == 0, result.output
    assert "broken.gguf is left out: The model's logits are not finite" in result.stdout
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert ">broken.gguf</td>" not in page and ">skipcat.gguf</td>" in page
    counted.since()
    assert compare(demo_dense_gguf, broken, demo_low_rank_gguf).exit_code == 0 and counted.since() == ([], 0)
    folder = tmp_path / "other"
    result = compare(broken, demo_low_rank_gguf)
    assert result.exit_code == 2 and "not finite" in result.stderr


@pytest.mark.runtime
def test_names_that_are_no_text_are_shown(
    demo_dense_gguf: Path, demo_low_rank_gguf: Path, other_text: Path, tmp_path: Path
) -> None:
    import os

    from skipcat_edge.compare.report import PAGE

    strange, text = tmp_path / "ä <b>\"&'.gguf", tmp_path / os.fsdecode(b"<i>\xff.txt")
    strange.write_bytes(demo_low_rank_gguf.read_bytes())
    text.write_bytes(other_text.read_bytes())
    result = run("compare", demo_dense_gguf, "-o", tmp_path / "out", "--text", text, "--file", strange, *TINY,
                 "--repetitions", 1)
    assert result.exit_code == 0, result.output
    assert "Speeds were measured once" in result.stdout
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "ä &lt;b&gt;" in page and "&lt;i&gt;?.txt" in page and "<b>" not in page and "<i>" not in page


@pytest.mark.runtime
def test_an_interrupt_while_the_report_is_written_is_one_too(
    demo_dense_gguf: Path, demo_low_rank_gguf: Path, other_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("compare", demo_dense_gguf, "-o", tmp_path / "out", "--text", other_text,
                 "--file", demo_low_rank_gguf, *TINY)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("skipcat_edge.compare.report.html", interrupt)
        result = run(*arguments, "--force")
    assert result.exit_code == 130 and "the same command without --force goes on" in result.stderr
    assert not list((tmp_path / "out").glob(".*")) and not (tmp_path / "out" / "report.html").exists()
    assert run(*arguments).exit_code == 0


@pytest.mark.runtime
@pytest.mark.parametrize(("arguments", "words"), [
    ([], ["--file"]),
    (["--file", "{low}", "--ratios", "0.8"], ["leave out --ratios"]),
    (["--file", "{dense}"], ["leave it out of --file"]),
])
def test_compare_with_a_dense_file_refuses(
    arguments: list[str], words: list[str], demo_dense_gguf: Path, demo_low_rank_gguf: Path, tmp_path: Path
) -> None:
    names = {"low": demo_low_rank_gguf, "dense": demo_dense_gguf}
    result = run("compare", demo_dense_gguf, "-o", tmp_path / "out", "--text", TEXT,
                 *(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr
    low = run("compare", demo_low_rank_gguf, "-o", tmp_path / "out", "--text", TEXT)
    assert low.exit_code == 2 and "is low-rank" in low.stderr


@pytest.mark.runtime
def test_another_model_needs_force(
    demo_dense_gguf: Path, demo_low_rank_gguf: Path, other_text: Path, tmp_path: Path
) -> None:
    other, folder = tmp_path / "other.gguf", tmp_path / "out"
    other.write_bytes(demo_dense_gguf.read_bytes())
    rest = ("-o", folder, "--text", other_text, "--file", demo_low_rank_gguf, *TINY)
    assert run("compare", demo_dense_gguf, *rest).exit_code == 0
    result = run("compare", other, *rest)
    assert result.exit_code == 2 and "holds the comparison of" in result.stderr
    assert run("compare", other, *rest, "--force").exit_code == 0


@pytest.mark.runtime
def test_one_folder_is_not_shared(
    demo_dense_gguf: Path, demo_low_rank_gguf: Path, other_text: Path, tmp_path: Path
) -> None:
    import fcntl
    import os

    folder = tmp_path / "out"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        result = run("compare", demo_dense_gguf, "-o", folder, "--text", other_text,
                     "--file", demo_low_rank_gguf)
    finally:
        os.close(handle)
    assert result.exit_code == 2 and "in use" in result.stderr


@pytest.mark.slow
@pytest.mark.runtime
def test_the_demo_model_from_end_to_end(
    other_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the converter needs torch")
    from skipcat_edge.compare.build import Builder

    folder = tmp_path / "out"
    made: list[str] = []
    entry = Builder.entry

    def interrupted(builder: Any, which: Any, step: Any) -> Any:
        made.append(which.path.name)
        if len(made) == 3:
            # as a signal would: within the conversion
            monkeypatch.setattr("skipcat_converter.pipeline.write_file", signal)
        return entry(builder, which, step)

    def signal(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = ("compare", DEMO / "model", "-o", folder, "--text", other_text, "--calibration", TEXT,
                 "--calib-tokens", 2000, "--types", "F16,Q4_0", "--ratios", "0.8,0.01", *TINY)
    with monkeypatch.context() as patch:
        patch.setattr(Builder, "entry", interrupted)
        assert run(*arguments).exit_code == 130
    monkeypatch.undo()
    assert made == ["low-rank-F16-0.8.gguf", "low-rank-F16-0.01.gguf", "plain-Q4_0.gguf"]
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.suffix != ".json"}
    # a job, from which the conversion that was interrupted goes on
    assert finished.pop(".plain-Q4_0.gguf.job")
    assert set(finished) == {"dense-F16.gguf", "statistics", "low-rank-F16-0.8.gguf"}

    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert not list(folder.glob(".*"))
    for name, time in finished.items():
        assert (folder / name).stat().st_mtime_ns == time
    names = ["dense-F16", "low-rank-F16-0.8", "plain-Q4_0", "feedback-Q4_0", "low-rank-Q4_0-0.8"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name in names:
        assert f"{name}.gguf" in result.stdout and f"{name}.gguf" in page
        assert (folder / f"{name}.gguf").exists()
    assert "There is no low-rank-F16-0.01: A ratio of 0.01 is too little" in result.stdout
    assert not (folder / "low-rank-Q4_0-0.01.gguf").exists()
    assert re.search(r"Q4_0: error feedback is the better choice", result.stdout)

    from test_compare_page import CHROMIUM, Look, playwright

    if CHROMIUM is None:
        pytest.skip("no chromium here: apt install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            Look(browser, folder / "report.html").check(3)
        finally:
            browser.close()
