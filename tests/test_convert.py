"""The convert command: what it writes, and what a person reads on bad input."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conversion import DEMO, convert_model, tensors
from gguf import GGMLQuantizationType, GGUFReader

from skipcat_edge import format as fmt
from skipcat_edge.cli import main
from skipcat_edge.errors import UserError
from skipcat_edge.inspection import inspect

torch = pytest.importorskip("torch", reason="the converter needs torch")

pytestmark = pytest.mark.runtime

TEXT = DEMO / "calibration.txt"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *(str(argument) for argument in arguments)])


def assert_refused(result: Result, out: Path, *words: str) -> None:
    """Exit code 2, one sentence with `words`, no traceback, and nothing left behind."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.output
    assert "Traceback" not in result.output
    assert [path for path in out.parent.iterdir() if "out.gguf" in path.name] == []


def test_same_inputs_give_the_same_bytes(
    demo_low_rank_gguf: Path, demo_dense_gguf: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.gguf"
    arguments = ["--base", demo_dense_gguf, "--quant", "F16", "--calibration", TEXT, "--method", "skipcat"]
    result = run(DEMO / "model", "-o", again, *arguments)
    assert result.exit_code == 0, result.output
    assert again.read_bytes() == demo_low_rank_gguf.read_bytes()


def test_provenance_is_in_the_file(demo_low_rank_gguf: Path, demo_dense_gguf: Path) -> None:
    reader, dense = GGUFReader(demo_low_rank_gguf), GGUFReader(demo_dense_gguf)
    assert fmt.field_value(reader, fmt.KEY_ARCHITECTURE) == "skipcat-llama"
    assert fmt.field_value(reader, fmt.KEY_FORMAT_VERSION) == 1
    assert fmt.field_value(reader, fmt.KEY_RATIO) == pytest.approx(0.8)
    assert fmt.field_value(reader, fmt.KEY_METHOD) == "skipcat"
    assert fmt.field_value(reader, fmt.KEY_SOURCE_NAME) == "model"
    digest = hashlib.sha256(TEXT.read_bytes()).hexdigest()
    assert fmt.field_value(reader, fmt.KEY_CALIBRATION_SHA256) == digest
    assert fmt.field_value(reader, fmt.KEY_RUNTIME_MIN) == "skipcat.1"
    assert fmt.field_value(reader, fmt.KEY_SEED) == 0
    for key, field in dense.fields.items():
        if key not in (fmt.KEY_ARCHITECTURE, "general.file_type") and not key.startswith("GGUF."):
            assert fmt.field_value(reader, key) == field.contents(), key


def test_what_is_not_factored_is_the_base_files(demo_low_rank_gguf: Path, demo_dense_gguf: Path) -> None:
    low_rank, dense = tensors(demo_low_rank_gguf), tensors(demo_dense_gguf)
    factored = {name for name in dense if name not in low_rank}
    assert len(factored) == 6 * 7
    for name in dense.keys() - factored:
        np.testing.assert_array_equal(low_rank[name], dense[name])


@pytest.mark.parametrize(
    ("quant", "method", "ratio"),
    [("Q8_0", "skipcat", 0.9), ("Q4_0", "skipcat", 0.9), ("IQ4_NL", "skip", 0.9), ("BF16", "cat", 0.9),
     ("F32", "skip", 0.5), ("Q5_1", "svd-llm", 0.7)],
)  # fmt: skip
def test_types(quant: str, method: str, ratio: float, demo_dense_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert_model(DEMO / "model", out, base=demo_dense_gguf, quant=quant, ratio=ratio, method=method,
                  head_quant="Q8_0", calibration=TEXT, calib_tokens=3000)
    wanted = GGMLQuantizationType[quant]
    grid = fmt.rank_grid(wanted, n=1)
    owners = fmt.read_owners(GGUFReader(out))
    for owner in owners:
        assert owner.rank % grid == 0
        columns = owner.n - owner.rank if owner.skip else owner.n
        assert owner.type == fmt.factor_type(wanted, columns)
        assert {member.type for member in owner.members} == {wanted}
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(out).tensors}
    assert types["token_embd.weight"] == GGMLQuantizationType.Q8_0
    # layers whose ranks do not fit the grid stay dense, in the same type
    factored = {(owner.layer, member.name) for owner in owners for member in owner.members}
    for layer in range(6):
        for name in fmt.GROUP_OF:
            dense = types.get(fmt.weight_name(layer, name))
            assert (dense is None) == ((layer, name) in factored or name == "attn_qkv")
            assert dense in (None, wanted)


def test_ratio_one_is_an_ordinary_file(demo_dense_gguf: Path) -> None:
    reader = GGUFReader(demo_dense_gguf)
    assert fmt.field_value(reader, fmt.KEY_ARCHITECTURE) == "llama"
    assert not any(key.startswith("skipcat.") for key in reader.fields)
    assert fmt.read_owners(reader) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["calibration text", "--calibration"]),
        (["--calibration", "missing.txt"], ["missing.txt", "cannot be read"]),
        (["--calibration", TEXT, "--ratio", "0"], ["ratio is 0"]),
        (["--calibration", TEXT, "--ratio", "1.5"], ["ratio is 1.5"]),
        (["--calibration", TEXT, "--quant", "Q9_9"], ["Q9_9"]),
        (["--calibration", TEXT, "--calib-tokens", "99999999"], ["99,999,999", "--calib-tokens"]),
        (["--calibration", TEXT, "--ratio", "0.001", "--calib-tokens", "500"],
         ["ratio of 0.001", "smallest possible"]),
        (["--calibration", TEXT, "--ratio", "0.001", "--method", "skip"], ["ratio 0.001", "--ratio"]),
        (["--calibration", TEXT, "--ratio", "0.8", "--bpw", "4"], ["--ratio", "--bpw"]),
        (["--calibration", TEXT, "--budget", "many"], ["'many' is not a size"]),
        (["--stats", "missing.safetensors"], ["--calibration"]),
        (["--calibration", TEXT, "--seq-len", "4096"], ["--seq-len is 4096", "512"]),
        (["--calibration", TEXT, "--quant", "Q4_K", "--ratio", "0.3", "--calib-tokens", "500"],
         ["grid of 256"]),
    ],
    ids=lambda value: " ".join(str(v) for v in value)[:40],
)
def test_refused(arguments: list[object], words: list[str], demo_dense_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert_refused(run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, *arguments), out, *words)


def test_empty_calibration_text(demo_dense_gguf: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "empty.txt", tmp_path / "out.gguf"
    text.write_text(" \n")
    result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--calibration", text)
    assert_refused(result, out, "empty.txt is empty")


def test_sources_that_are_no_model(demo_dense_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert_refused(run(demo_dense_gguf, "-o", out, "--calibration", TEXT), out, "already GGUF", "directory")
    assert_refused(run(tmp_path, "-o", out, "--calibration", TEXT), out, "no config.json")
    assert_refused(run(tmp_path / "nowhere", "-o", out, "--calibration", TEXT), out, "no such directory")


def test_existing_output_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    result = run(DEMO / "model", "-o", out, "--calibration", TEXT)
    assert result.exit_code == 2
    assert "--force" in result.output
    assert out.read_bytes() == b"precious"


def broken_model(folder: Path, tensor: str) -> Path:
    """The demo model with a NaN in `tensor`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO / "model", folder)
    state = load_file(folder / "model.safetensors")
    state[tensor][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("ratio", "quant"), [("0.8", "Q8_0"), ("1", "Q8_0"), ("1", "BF16"), ("1", "F16")])
def test_not_finite_weights_name_the_layer(ratio: str, quant: str, tmp_path: Path) -> None:
    source = broken_model(tmp_path / "model", "model.layers.3.mlp.down_proj.weight")
    out = tmp_path / "out.gguf"
    result = run(source, "-o", out, "--calibration", TEXT, "--ratio", ratio, "--quant", quant)
    assert_refused(result, out, "blk.3.ffn_down.weight")


def test_full_disk(demo_dense_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter

    written = []

    def write(self: GGUFWriter, tensor: np.ndarray, *_: object) -> None:
        written.append(tensor)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", write)
    out = tmp_path / "out.gguf"
    arguments = ["-o", out, "--base", demo_dense_gguf, "--calibration", TEXT, "--method", "skip",
                 "--calib-tokens", 500]
    result = run(DEMO / "model", *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "No space left on device" in result.output and "room" in result.output
    assert [path.name for path in tmp_path.iterdir()] == [".out.gguf.job"]
    monkeypatch.undo()
    result = run(DEMO / "model", *arguments)
    assert result.exit_code == 0, result.output
    assert "Resuming: " in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.md"]


def test_low_rank_base_is_refused(demo_low_rank_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="low-rank already"):
        convert_model(DEMO / "model", tmp_path / "out.gguf", base=demo_low_rank_gguf, calibration=TEXT)


def test_inspect_reads_what_convert_wrote(demo_low_rank_gguf: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(demo_low_rank_gguf), "--json"])
    assert result.exit_code == 0, result.output
    assert "skipcat-llama" in json.dumps(json.loads(result.output))


@pytest.fixture(scope="module")
def stats(demo_dense_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's statistics, from its calibration text."""
    folder = tmp_path_factory.mktemp("statistics")
    result = run(DEMO / "model", "-o", folder / "first.gguf", "--base", demo_dense_gguf,
                 "--calibration", TEXT, "--calib-tokens", 3000, "--quant", "F16",
                 "--stats", folder / "demo.safetensors", "--no-compensation")
    assert result.exit_code == 0, result.output
    assert "calibrated on 3,000 tokens" in result.output
    return folder / "demo.safetensors"


def no_model(*_: object) -> None:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("arguments", [
    ["--ratio", "0.6", "--quant", "F16"], ["--method", "skipcat"], ["--bpw", "4", "--quant", "Q4_0"],
    ["--ratio", "1", "--quant", "Q4_0"], ["--allocation", "energy"], ["--allocation", "flrc"],
    ["--allocation", "uniform"], ["--rounding", "plain"], ["--no-grad"],
    ["--calibration", TEXT, "--calib-tokens", 3000, "--no-compensation"],
    ["--method", "skipcat", "--allocation", "flrc"],
], ids=lambda arguments: " ".join(str(part) for part in arguments)[:30])  # fmt: skip
def test_statistics_need_no_model(
    arguments: list[object], stats: Path, demo_dense_gguf: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from skipcat_converter import calibrate

    monkeypatch.setattr(calibrate, "load_source", no_model)
    out = tmp_path / "out.gguf"
    result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--stats", stats, *arguments)
    assert result.exit_code == 0, result.output
    found = inspect(out)
    if "--bpw" in arguments:
        linear = found.totals.low_rank_bytes + found.totals.dense_layer_bytes
        assert 3.5 < 8 * linear / found.totals.dense_parameters <= 4
    elif "1" in arguments:
        assert found.architecture == "llama"
        assert not found.owners
    else:
        asked = 0.6 if "0.6" in arguments else 0.8
        assert asked - 0.08 < found.totals.ratio <= asked


def test_statistics_of_another_model_or_text_are_refused(
    stats: Path, demo_dense_gguf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    text = tmp_path / "other.txt"
    text.write_text("Once there was another text. " * 400)
    arguments = ["-o", out, "--base", demo_dense_gguf, "--stats", stats]
    result = run(DEMO / "model", *arguments, "--calibration", text)
    assert_refused(result, out, str(stats), "another calibration text")
    result = run(DEMO / "model", *arguments, "--calibration", TEXT)
    assert_refused(result, out, str(stats), "another --calib-tokens (3000; this conversion: 65536)")
    result = run(DEMO / "model", *arguments, "--calibration", TEXT, "--calib-tokens", 3000, "--seed", 1)
    assert_refused(result, out, str(stats), "another --seed")
    result = run(DEMO / "model", *arguments, "--calibration", TEXT, "--calib-tokens", 3000, "--seq-len", 64)
    assert_refused(result, out, str(stats), "another --seq-len")
    other = tmp_path / "model"
    shutil.copytree(DEMO / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert_refused(run(other, *arguments), out, str(stats), "another model")
    arguments[-1] = demo_dense_gguf
    assert_refused(run(DEMO / "model", *arguments), out, "does not hold calibration statistics")


def test_statistics_without_gradients_do_not_serve_those_with(demo_dense_gguf: Path, tmp_path: Path) -> None:
    out, stats = tmp_path / "out.gguf", tmp_path / "half.safetensors"
    arguments = ["-o", out, "--base", demo_dense_gguf, "--stats", stats]
    result = run(DEMO / "model", *arguments, "--calibration", TEXT, "--calib-tokens", 3000, "--no-grad")
    assert result.exit_code == 0, result.output
    assert "Without gradients" in result.output
    out.unlink()
    out.with_suffix(".md").unlink()
    assert_refused(run(DEMO / "model", *arguments), out, "without gradients", "--no-grad")


@pytest.mark.parametrize("quant", ["F16", "Q4_0"])
def test_budget_is_the_files_size(quant: str, stats: Path, demo_dense_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    budget = 5_000_000 if quant == "F16" else 3_300_000
    result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--stats", stats,
                 "--quant", quant, "--budget", f"{budget / 1e6}MB")
    assert result.exit_code == 0, result.output
    assert 0.97 * budget < out.stat().st_size <= budget


def test_a_budget_below_embeddings_and_norms_names_the_smallest_size(
    stats: Path, demo_dense_gguf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    arguments = [DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--stats", stats, "--quant", "F16"]
    result = run(*arguments, "--budget", "1MB")
    assert_refused(result, out, "1,000,000 bytes", "smallest possible")
    words = result.output.replace(",", "").split()
    smallest = int(words[words.index("bytes", words.index("bytes") + 1) - 1])
    result = run(*arguments, "--budget", str(smallest + 1))
    assert result.exit_code == 0, result.output
    assert out.stat().st_size <= smallest + 1


def test_types_that_need_importances_have_them_from_statistics(
    stats: Path, demo_dense_gguf: Path, tmp_path: Path
) -> None:
    """Rows of 768 are whole blocks of 256, those of 256 too."""
    out = tmp_path / "out.gguf"
    result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--stats", stats, "--ratio", "1",
                 "--quant", "IQ2_XXS")
    assert result.exit_code == 0, result.output
    kinds = {layer.type for layer in inspect(out).dense_layers}
    assert kinds == {"IQ2_XXS"}


def test_flrc_needs_gradients(stats: Path, demo_dense_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for other in (["--no-grad"], ["--method", "svd"]):
        result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--stats", stats,
                     "--allocation", "flrc", *other)
        assert_refused(result, out, "--allocation flrc", "gradients")


def test_a_large_budget_says_that_all_stays_dense(
    stats: Path, demo_dense_gguf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--stats", stats, "--budget", "1GB")
    assert result.exit_code == 0, result.output
    assert "no layer is low-rank" in result.output


def test_the_dense_file_runs_better_than_plainly_rounded_ones(
    stats: Path, demo_dense_gguf: Path, tmp_path: Path
) -> None:
    from skipcat_edge import divergence
    from skipcat_edge.perplexity import text_chunks

    kl = {}
    for rounding in ("feedback", "plain"):
        out = tmp_path / f"{rounding}.gguf"
        result = run(DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--stats", stats, "--ratio", "1",
                     "--quant", "Q4_0", "--rounding", rounding)
        assert result.exit_code == 0, result.output
        models = divergence.open_pair(out, demo_dense_gguf, 256)
        chunks = text_chunks(models[0], TEXT.read_text("utf-8"), 256, 3000)
        kl[rounding] = divergence.compare(*models, chunks)[1].kl
    assert (tmp_path / "feedback.gguf").stat().st_size == (tmp_path / "plain.gguf").stat().st_size
    assert kl["feedback"] < 0.75 * kl["plain"]
