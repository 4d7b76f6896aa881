"""`eval --tasks`: lm-eval's own `hf` model on the same weights is the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run, run_json
from conversion import DEMO

pytestmark = pytest.mark.runtime

STORIES = (DEMO / "calibration.txt").read_text("utf-8").split("\n\n")
HEADER = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {type}
"""
CHOICE = """\
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
UNTIL = """\
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [".", "!"], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
SHORT_CONTEXT = 64
"""Tokens: most samples are longer."""
RELATIVE = 2**-10
"""Of a log-likelihood. Activations, keys and values are rounded to F16 on their way into ggml's products,
each by up to 2^-11 of itself; the largest difference seen is half of that. One BOS too many changes them by
a hundred times as much."""


def write_task(folder: Path, name: str, type_: str, body: str, samples: list[dict[str, Any]]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples), "utf-8")
    (folder / f"{name}.yaml").write_text(HEADER.format(name=name, data=data, type=type_) + body, "utf-8")


def choices() -> Iterator[dict[str, Any]]:
    """Endings that share words, of one and of many tokens, after short, long and no contexts."""
    yield {"context": "The dog ran to the", "choices": [" park", " park with a ball", " moon"], "answer": 0}
    yield {"context": "Once upon a time, there was a little girl who was  ",  # its spaces move to the endings
           "choices": ["very happy.", "very sad.", "tax law."], "answer": 0}
    yield {"context": "", "choices": ["Once upon a time", "Upon once a", "Łódź 東京 <unk>"], "answer": 0}
    for story, other in zip(STORIES[:4], STORIES[4:8], strict=True):
        words, wrong = story.split(), other.split()
        yield {"context": " ".join(words[:60]), "answer": 1,
               "choices": [" " + " ".join(wrong[60:70]), " " + " ".join(words[60:70])]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three task files with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "choose", "multiple_choice", CHOICE, [*choices()])
    write_task(folder, "roll", "loglikelihood_rolling", ROLLING,
               [{"text": STORIES[0]}, {"text": "\n".join(STORIES[1:6])}, {"text": "Tom."}])
    write_task(folder, "write", "generate_until", UNTIL,
               [{"prompt": prompt, "answer": "a little boy named Tim"} for prompt in (
                   "Once upon a time, there was", STORIES[3][:150], "\n".join(STORIES[4:9]))])
    return folder


def answers(model: Any, folder: Path, *names: str) -> dict[str, Any]:
    """Task -> what lm-eval's `simple_evaluate` logs of `model`'s answers to each sample, and its results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, tasks=[*names], task_manager=manager, bootstrap_iters=0)
    return {"results": found["results"], **{name: [sample["resps"] for sample in found["samples"][name]]
                                            for name in names}}


def hugging_face(**options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(DEMO / "model"), dtype="float32", device="cpu", **options)


@pytest.fixture(scope="module", params=[None, SHORT_CONTEXT], ids=["whole context", "short context"])
def both(request: pytest.FixtureRequest, folder: Path, demo_dense_gguf: Path) -> Iterator[tuple[Any, Any]]:
    """The answers of our model and of lm-eval's, from the same weights."""
    import huggingface_hub.constants

    from skipcat_edge.lm_eval_adapter import GgufLM

    names, length = ("choose", "roll", "write"), request.param
    model = GgufLM(demo_dense_gguf, length=length, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield answers(model, folder, *names), answers(hugging_face(max_length=length), folder, *names)
    model.close()


@pytest.mark.slow
def test_answers_are_those_of_lm_evals_own_model(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    pairs = [(mine, dense) for sample, other in zip(ours["choose"], theirs["choose"], strict=True)
             for ((mine,), (dense,)) in zip(sample, other, strict=True)]
    assert len(pairs) > 15
    for (mine, greedy), (dense, their_greedy) in pairs:
        assert mine == pytest.approx(dense, rel=RELATIVE)
        assert greedy == their_greedy
    assert {greedy for (_, greedy), _ in pairs} == {True, False}
    for name in ("acc", "acc_norm"):
        assert ours["results"]["choose"][f"{name},none"] == theirs["results"]["choose"][f"{name},none"]


@pytest.mark.slow
def test_whole_texts_have_the_likelihood_that_lm_evals_own_model_gives_them(both: tuple[Any, Any]) -> None:
    ours, theirs = (np.ravel(found["roll"]) for found in both)
    assert ours == pytest.approx(theirs, rel=RELATIVE)


@pytest.mark.slow
def test_written_answers_are_those_of_lm_evals_own_model(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    assert ours["write"] == theirs["write"]
    assert any(text for ((text,),) in ours["write"])


@pytest.mark.slow
@pytest.mark.parametrize("both", [None], ids=["whole context"], indirect=True)
def test_the_command_tells_what_lm_eval_computed(
    both: tuple[Any, Any], folder: Path, demo_dense_gguf: Path, demo_low_rank_gguf: Path,
) -> None:
    found = run_json("eval", demo_low_rank_gguf, "--tasks", "choose,roll,write", "--task-path", folder,
                     "--reference", demo_dense_gguf, "--threads", 1)
    rows = {(row["task"], row["metric"]): row for row in found["tasks"]}
    assert rows.keys() == {("choose", "acc"), ("choose", "acc_norm"), ("roll", "word_perplexity"),
                           ("write", "exact_match")}
    for (task, metric), row in rows.items():
        assert row["reference"] == pytest.approx(both[1]["results"][task][f"{metric},none"], rel=RELATIVE)
        assert row["difference"] == pytest.approx(row["value"] - row["reference"])
    assert abs(rows["roll", "word_perplexity"]["difference"]) > 0.01  # it is not the reference twice
    share, samples = rows["choose", "acc"]["value"], rows["choose", "acc"]["samples"]
    assert rows["choose", "acc"]["value_se"] == pytest.approx((share * (1 - share) / (samples - 1)) ** 0.5)
    assert rows["roll", "word_perplexity"]["value_se"] is None


def test_bos_is_put_where_the_file_wants_it_and_never_twice(demo_dense_gguf: Path) -> None:
    from skipcat_edge.lm_eval_adapter import GgufLM

    model = GgufLM(demo_dense_gguf)
    bos = model.prefix_token_id
    assert model.tok_encode("Tom")[0] == bos
    assert model.tok_encode("<s>Tom").count(bos) == 1
    assert bos not in model.tok_encode("Tom", add_special_tokens=False)
    model.close()


@pytest.mark.parametrize("goes_back", [True, False], ids=["", "recurrent"])
def test_shared_beginnings_are_read_once_and_change_nothing(demo_dense_gguf: Path, goes_back: bool,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    from skipcat_edge import scoring
    from skipcat_edge.generation import encode
    from skipcat_edge.scoring import score
    from skipcat_edge.session import open_model

    llama = open_model(demo_dense_gguf, context=512, threads=1)
    requests = []
    for sample in choices():
        context = encode(llama, sample["context"] or "Tom")
        requests += [(context, encode(llama, choice, add_bos=False)) for choice in sample["choices"]]
        requests += [(context[:1], context[1:]), (context, context[:1])]
    read: list[int] = []
    decode = scoring.last_logits

    def counting(model: Any, tokens: list[int], *more: int) -> Any:
        read.append(len(tokens))
        return decode(model, tokens, *more)

    monkeypatch.setattr(scoring, "last_logits", counting)
    if not goes_back:
        monkeypatch.setattr(llama_cpp, "llama_memory_seq_rm", lambda *_: False)
    plain = score(llama, requests, reuse=False)
    without, read[:] = sum(read), []
    reused = score(llama, requests)
    assert (sum(read) < 0.6 * without) == goes_back
    for one, other in zip(plain, reused, strict=True):
        # ggml takes other kernels for other numbers of tokens
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=RELATIVE)
        assert one.greedy == other.greedy
    llama.close()


OFFLINE = """
import socket, sys, time
time.sleep = lambda _: None  # before the hub is asked again
asked = []
def refuse(*arguments, **_):
    asked.append(arguments)
    raise OSError("no network here")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from skipcat_edge.cli import main
try:
    main(sys.argv[1:])
finally:
    print("asked for", asked, "torch" if "torch" in sys.modules else "")
"""


@pytest.mark.slow
def test_a_local_task_file_needs_no_network_and_makes_no_noise(folder: Path, demo_dense_gguf: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "eval", demo_dense_gguf, "--tasks", "choose", "--task-path", folder,
         "--limit", "3", "--text", DEMO / "calibration.txt", "--max-tokens", "300", "--threads", "1"],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *told, asked = done.stdout.splitlines()
    assert asked.startswith("asked for []")
    assert told[0].startswith("perplexity ")
    assert [line.split()[:3] for line in told if line.startswith("choose")] == [
        ["choose", "acc", "3"], ["choose", "acc_norm", "3"]
    ]


@pytest.mark.slow
def test_a_task_from_the_hub_is_refused_in_a_sentence_without_a_network(demo_dense_gguf: Path,
                                                                        tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text(HEADER.format(name="far", data="x", type="multiple_choice").replace(
        "dataset_path: json", "dataset_path: nobody/nothing-at-all") + CHOICE, "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "eval", demo_dense_gguf, "--tasks", str(tmp_path / "far.yaml")],
        capture_output=True, text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "data of task" in done.stderr
    assert "cannot be reached" in done.stderr


def test_wrong_tasks_are_refused_in_a_sentence(folder: Path, demo_dense_gguf: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        result = run("eval", demo_dense_gguf, *arguments)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
        return result.stderr

    assert "give --text FILE or --tasks NAMES" in refused()
    assert "name some with --tasks" in refused("--text", "x", "--limit", 3)
    assert "names no task" in refused("--tasks", " ,")
    assert "give one with --text" in refused("--tasks", "choose", "--samples", 1)
    assert "is not a folder" in refused("--tasks", "choose", "--task-path", tmp_path / "nowhere")
    long = refused("--tasks", "choose", "--task-path", folder, "--context", 513)
    assert "use --context 512 or less" in long

    choose, write = ((folder / f"{name}.yaml").read_text("utf-8") for name in ("choose", "write"))

    def with_file(name: str, content: str) -> str:
        path = tmp_path / name
        path.write_text(content, "utf-8")
        return refused("--tasks", path)

    assert "cannot be loaded: " in with_file("broken.yaml", "task: [")
    for base, old, new, told in (
        (choose, "multiple_choice", "guess", "Got invalid output_type 'guess'"),
        (choose, "choose.jsonl", "not_there.jsonl", "not_there.jsonl"),
        (choose, "metric: acc,", "metric: guess,", "has no metric guess"),
        (choose, "{{choices}}", "{{choices.nothing.at_all}}", "'nothing'"),
        (write, "do_sample: false", "num_beams: 4", "num_beams"),
        (write, "max_gen_toks: 24", "max_gen_toks: 512", "512 new tokens"),
    ):
        assert old in base
        assert told in with_file("changed.yaml", base.replace(old, new))


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_what_is_meant(folder: Path, demo_dense_gguf: Path,
                                                       tmp_path: Path) -> None:
    near = run("eval", demo_dense_gguf, "--tasks", "arc_esay", "--task-path", folder)
    assert near.exit_code == 2
    assert "did you mean arc_easy" in near.stderr
    (tmp_path / "mine.yaml").write_text("task: [", "utf-8")
    unread = run("eval", demo_dense_gguf, "--tasks", "mine", "--task-path", tmp_path)
    assert unread.exit_code == 2
    assert "mine.yaml cannot be read" in unread.stderr


def test_tasks_are_not_for_embedding_models_and_need_the_extra(
    demo_dense_gguf: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gguf import GGUFWriter

    encoder = tmp_path / "encoder.gguf"
    writer = GGUFWriter(encoder, "bert")
    writer.add_causal_attention(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    result = run("eval", encoder, "--tasks", "choose", "--task-path", folder)
    assert result.exit_code == 2
    assert "is an embedding model and answers no tasks" in result.stderr

    monkeypatch.setattr("skipcat_edge.extra.find_spec", lambda _: None)
    result = run("eval", demo_dense_gguf, "--tasks", "choose", "--task-path", folder)
    assert result.exit_code == 2
    assert "pip install 'skipcat-edge[eval]'" in result.stderr
