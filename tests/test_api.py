"""From Python: the functions of the package return what the commands print."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from command_line import run, run_json
from gguf import GGUFValueType, PoolingType
from gguf_edit import GGUF

import skipcat_edge
from skipcat_edge.card import card_path
from skipcat_edge.errors import UserError

DEMO = Path(__file__).resolve().parent.parent / "converter" / "demo"


def test_the_package_loads_nothing_before_it_is_asked() -> None:
    code = ("import sys, skipcat_edge; assert callable(skipcat_edge.inspect); "
            "sys.exit(bool({'torch', 'llama_cpp', 'rich', 'transformers'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names() -> None:
    assert all(callable(getattr(skipcat_edge, name)) for name in skipcat_edge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        skipcat_edge.compress  # noqa: B018
    # a module of the same name would replace the function where it is imported
    folder = Path(skipcat_edge.__file__).parent
    assert not [name for name in skipcat_edge.__all__ if (folder / f"{name}.py").exists()]


def test_inspect(demo_low_rank_gguf: Path) -> None:
    found = skipcat_edge.inspect(str(demo_low_rank_gguf))
    assert is_dataclass(found) and found.to_json() == run_json("inspect", demo_low_rank_gguf)


@pytest.mark.runtime
def test_bench(demo_dense_gguf: Path, demo_low_rank_gguf: Path) -> None:
    results = skipcat_edge.bench([demo_dense_gguf, demo_low_rank_gguf], prompt_tokens=16, gen_tokens=4,
                                 repetitions=1)
    assert [result.file for result in results] == [str(demo_dense_gguf), str(demo_low_rank_gguf)]
    assert all(is_dataclass(result) and result.decode_tps is not None for result in results)


@pytest.mark.runtime
def test_evaluate(demo_dense_gguf: Path, demo_low_rank_gguf: Path) -> None:
    text = DEMO / "calibration.txt"
    found = skipcat_edge.evaluate(str(demo_low_rank_gguf), text.read_text("utf-8"), max_tokens=512, threads=1,
                                  reference=str(demo_dense_gguf))
    told = run_json("eval", demo_low_rank_gguf, "--text", text, "--max-tokens", 512, "--threads", 1,
                    "--reference", demo_dense_gguf)
    assert is_dataclass(found) and found.to_json() == told


@pytest.fixture
def encoders(tmp_path: Path, demo_dense_gguf: Path, demo_low_rank_gguf: Path) -> tuple[Path, Path]:
    """The demo model, low-rank and dense, as embedding models."""
    found = []
    for file in (demo_low_rank_gguf, demo_dense_gguf):
        edited = GGUF.read(file)
        edited.set("llama.pooling_type", int(PoolingType.MEAN), GGUFValueType.UINT32)
        found.append(tmp_path / file.name)
        edited.write(found[-1])
    return found[0], found[1]


@pytest.mark.runtime
def test_evaluate_an_embedding_model(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    model, dense = encoders
    text = tmp_path / "lines.txt"
    text.write_text("The dog ran to the park.\n\nTom had a red ball.\nIt was a sunny day.\n", "utf-8")
    steps: list[str] = []
    found = skipcat_edge.evaluate(model, text.read_text("utf-8"), reference=dense, threads=1,
                                  begin=lambda title, total: lambda: steps.append(f"{title} of {total}"))
    assert found.similarity is not None and found.perplexity is None
    assert 0.5 < found.similarity.cosine_min < found.similarity.cosine_mean < 0.9999
    assert steps == ["lines of 3"] * 3
    assert found.to_json() == run_json("eval", model, "--text", text, "--reference", dense, "--threads", 1)
    told = run("eval", model, "--text", text, "--reference", dense, "--threads", 1).stdout
    similarity = found.similarity
    assert told == (f"mean cosine {similarity.cosine_mean:.4f} ± {similarity.cosine_se:.4f}, lowest "
                    f"{similarity.cosine_min:.4f}, over 3 lines\n")
    assert run("eval", model, "--text", text, "--reference", dense, "--card").exit_code == 0
    figure = f"| {similarity.cosine_mean:.4f} ± {similarity.cosine_se:.4f} |"
    assert figure in card_path(model).read_text("utf-8")
    for options, message in (({}, "give its dense GGUF"), ({"samples": 1}, "writes no text"),
                             ({"max_tokens": 9}, "every line"), ({"tasks": "x"}, "answers no tasks")):
        with pytest.raises(UserError, match=message):
            skipcat_edge.evaluate(model, "One line.", **options)


@pytest.mark.runtime
def test_evaluate_tasks(demo_dense_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "data.jsonl"
    data.write_text('{"context": "The dog ran to the", "choices": [" park", " moon"], "answer": 0}\n' * 3)
    task = tmp_path / "task.yaml"
    task.write_text(f"task: dog\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
                    "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\n"
                    "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\ntarget_delimiter: ''\n"
                    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n")
    found = skipcat_edge.evaluate(demo_dense_gguf, tasks=str(task), limit=2, threads=1)
    assert capfd.readouterr() == ("", "")
    assert found.perplexity is None
    assert [(row.task, row.metric, row.samples) for row in found.tasks] == [("dog", "acc", 2)]
    assert found.to_json() == run_json("eval", demo_dense_gguf, "--tasks", task, "--limit", 2, "--threads", 1)
    # before the text is measured
    steps: list[str] = []
    with pytest.raises(UserError, match="no task nothing"):
        skipcat_edge.evaluate(demo_dense_gguf, (DEMO / "calibration.txt").read_text("utf-8"),
                              tasks=["nothing"], task_path=tmp_path, threads=1,
                              begin=lambda title, total: lambda: steps.append(title))
    assert not steps


@pytest.mark.parametrize(("name", "options", "message"), [
    ("evaluate", {"window": 1}, "window is 1, but it must be 2 or more"),
    ("evaluate", {"max_tokens": 0}, "max_tokens is 0"),
    ("evaluate", {"samples": -1}, "samples is -1"),
    ("evaluate", {"sample_tokens": 0}, "sample_tokens is 0"),
    ("evaluate", {"threads": -2}, "threads is -2"),
    ("evaluate", {"text": None}, "nothing to measure on"),
    ("bench", {"repetitions": 0}, "repetitions is 0"),
    ("bench", {"prompt_tokens": 0}, "prompt_tokens is 0"),
    ("bench", {"gen_tokens": -1}, "gen_tokens is -1"),
    ("bench", {"threads": [2, 0]}, "threads is 0"),
    ("bench", {"files": []}, "no file to measure"),
    ("plan", {"ratios": [2]}, "ratio is 2"),
    ("plan", {"ratios": [float("nan")]}, "ratio is nan"),
    ("plan", {"max_ram": -5}, "max_ram is -5"),
    ("plan", {"min_speed": float("nan")}, "min_speed is nan"),
    ("convert", {"budget": -5}, "budget is -5"),
    ("convert", {"bpw": 0.0}, "--bpw"),
    ("convert", {"calib_tokens": -5}, "calib_tokens is -5"),
    ("convert", {"seq_len": 1}, "seq_len is 1"),
    ("convert", {"seed": -1}, "seed is -1"),
    ("convert", {"device": "tpu"}, "no device tpu"),
])
def test_numbers_out_of_range_are_refused_before_any_work(
    name: str, options: dict[str, object], message: str, demo_dense_gguf: Path, tmp_path: Path,
) -> None:
    usual: dict[str, dict[str, object]] = {
        "evaluate": {"file": demo_dense_gguf, "text": "Once upon a time. " * 200},
        "bench": {"files": demo_dense_gguf},
        "plan": {"source": "llama-3.2-1b", "device": "rpi5"},
        "convert": {"source": DEMO / "model", "output": tmp_path / "x.gguf",
                    "calibration": DEMO / "calibration.txt"},
    }
    with pytest.raises(skipcat_edge.UserError, match=message):
        getattr(skipcat_edge, name)(**usual[name] | options)
    assert not list(tmp_path.iterdir())


def test_the_packages_are_typed() -> None:
    import skipcat_converter

    for package in (skipcat_edge, skipcat_converter):
        assert package.__file__ is not None and Path(package.__file__).with_name("py.typed").exists()


def test_plan() -> None:
    found = skipcat_edge.plan("llama-3.2-1b", device="rpi5")
    plain = json.loads(json.dumps(found.to_json()))
    assert is_dataclass(found) and plain == run_json("plan", "llama-3.2-1b", "--device", "rpi5")


@pytest.mark.runtime
@pytest.mark.slow
def test_convert(tmp_path: Path, demo_dense_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="the converter needs torch")
    out = tmp_path / "out.gguf"
    result = skipcat_edge.convert(DEMO / "model", str(out), ratio=0.7, quant="F16", method="skipcat",
                                  base=demo_dense_gguf, calibration=str(DEMO / "calibration.txt"),
                                  calib_tokens=1024, gradients=False)
    assert capfd.readouterr() == ("", "")
    assert is_dataclass(result) and result.output_bytes == out.stat().st_size
    assert skipcat_edge.inspect(out).totals.ratio == pytest.approx(result.kept)
    with pytest.raises(UserError, match="no method qr"):
        skipcat_edge.convert(DEMO / "model", tmp_path / "other.gguf", method="qr")
    with pytest.raises(UserError, match="no allocation some"):
        skipcat_edge.convert(DEMO / "model", tmp_path / "other.gguf", allocation="some",
                             calibration=DEMO / "calibration.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.md"]
    with pytest.raises(UserError, match="no rounding exact"):
        skipcat_edge.convert(DEMO / "model", tmp_path / "other.gguf", rounding="exact",
                             calibration=DEMO / "calibration.txt")
