"""The demo model from Hugging Face directory to text, through the command line alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conversion import DEMO
from test_architectures import llama_logits, put_factors_into, relative_error

from skipcat_edge.cli import main

torch = pytest.importorskip("torch", reason="the converter needs torch")

pytestmark = pytest.mark.runtime

TEXT = DEMO / "calibration.txt"
OPTIONS = "--quant", "Q8_0", "--calibration", TEXT, "--calib-tokens", 12_000


def run(*arguments: object, stdin: str | None = None) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dense, low-rank), both Q8_0 and each made from the Hugging Face directory."""
    folder = tmp_path_factory.mktemp("end-to-end")
    dense, low_rank = folder / "dense.gguf", folder / "skipcat.gguf"
    run("convert", DEMO / "model", "-o", dense, "--ratio", 1, "--quant", "Q8_0")
    run("convert", DEMO / "model", "-o", low_rank, *OPTIONS)
    return dense, low_rank


def test_a_second_run_gives_the_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    again = tmp_path / "skipcat.gguf"
    run("convert", DEMO / "model", "-o", again, *OPTIONS)
    assert again.read_bytes() == files[1].read_bytes()


def test_the_file_is_smaller_and_still_tells_stories(files: tuple[Path, Path]) -> None:
    dense, low_rank = files
    assert low_rank.stat().st_size < 0.9 * dense.stat().st_size
    ppl = [
        json.loads(run("eval", path, "--text", TEXT, "--max-tokens", 6000, "--json"))["ppl"] for path in files
    ]
    assert 1 < ppl[0] < ppl[1] < 1.3 * ppl[0]
    story = run("generate", low_rank, "-p", "Once upon a time", "-n", 60, "--temp", 0)
    assert story == run("generate", low_rank, "-p", "Once upon a time", "-n", 60, "--temp", 0)
    words = set(TEXT.read_text(encoding="utf-8").split())
    told = story.split()
    assert len(told) > 20
    assert sum(word in words for word in told) > 0.8 * len(told)


def test_chat_answers_and_leaves(files: tuple[Path, Path]) -> None:
    answer = run("chat", files[1], stdin="Once upon a time, there was a fox\n/exit\n")
    assert len(answer.split()) > 10


def test_bench_measures_both(files: tuple[Path, Path]) -> None:
    entries = json.loads(
        run("bench", *files, "--prompt-tokens", 32, "--gen-tokens", 8, "--repetitions", 2, "--json"))
    assert [Path(entry["file"]) for entry in entries] == list(files)
    for entry in entries:
        for key in ("prompt_tps", "decode_tps"):
            assert 0 < entry[f"{key}_min"] <= entry[key] <= entry[f"{key}_max"]
        assert entry["peak_rss_bytes"] > Path(entry["file"]).stat().st_size


def test_inspect_adds_up(files: tuple[Path, Path]) -> None:
    found = json.loads(run("inspect", files[1], "--json"))
    assert sum(owner["bytes"] for owner in found["owners"]) == found["totals"]["low_rank_bytes"]
    assert found["totals"]["ratio"] <= 0.8


def test_logits_are_those_of_transformers_with_the_same_factors(
    demo_low_rank_gguf: Path, demo_dense_gguf: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    put_factors_into(model, demo_low_rank_gguf, demo_dense_gguf)
    tokens = [1, *np.random.default_rng(0).integers(3, 2048, 60).tolist()]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert relative_error(llama_logits(demo_low_rank_gguf, tokens), expected) < 1e-2
