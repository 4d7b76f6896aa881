"""`inspect` on files made here: sound ones, and each way to break one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader, GGUFWriter

from skipcat_edge import format as fmt
from skipcat_edge.cli import main
from skipcat_edge.gguf_file import open_gguf

Tensors = dict[str, np.ndarray]
Break = Callable[[Tensors], object]

INPUTS, OUTPUTS, RANK = 64, 48, 16
LAYER = 2
LR_A, MASK = fmt.lr_a_name(LAYER, "ffn_in"), fmt.skip_mask_name(LAYER, "ffn_in")
GATE, UP = fmt.lr_b_name(LAYER, "ffn_gate"), fmt.lr_b_name(LAYER, "ffn_up")


def low_rank_tensors() -> Tensors:
    skip = np.zeros(INPUTS, dtype=bool)
    skip[:RANK] = True
    return {
        "token_embd.weight": np.zeros((10, INPUTS), np.float32),
        fmt.weight_name(LAYER, "attn_output"): np.zeros((INPUTS, INPUTS), np.float16),
        LR_A: np.zeros((RANK, INPUTS - RANK), np.float16),
        MASK: fmt.pack_skip_mask(skip),
        GATE: np.zeros((OUTPUTS, RANK), np.float16),
        UP: np.zeros((OUTPUTS, RANK), np.float16),
    }


def write(path: Path, architecture: str, tensors: Tensors, version: int | None = None) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_uint32("llama.block_count", LAYER + 1)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(300)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(300)])
    writer.add_array("general.tags", ["one", "two"])
    if version is not None:
        writer.add_uint32(fmt.KEY_FORMAT_VERSION, version)
        writer.add_float32(fmt.KEY_RATIO, 0.8)
        writer.add_string(fmt.KEY_METHOD, "skipcat")
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def run_json(path: Path) -> dict[str, Any]:
    result = run(path, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def assert_one_sentence(result: Result, *parts: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


@pytest.fixture
def low_rank(tmp_path: Path) -> Path:
    return write(tmp_path / "low.gguf", "skipcat-llama", low_rank_tensors(), version=1)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tensors = {"token_embd.weight": np.zeros((10, INPUTS), np.float32)}
    tensors |= {fmt.weight_name(i, "attn_q"): np.zeros((32, INPUTS), np.float16) for i in range(2)}
    return write(tmp_path / "dense.gguf", "llama", tensors)


def test_low_rank_json(low_rank: Path) -> None:
    found = run_json(low_rank)
    (owner,) = found["owners"]
    assert owner == {
        "layer": LAYER, "owner": "ffn_in", "m": 96, "n": 64, "rank": 16, "full_rank": 64, "skip": True,
        "ratio": pytest.approx((16 * 48 + 96 * 16) / (96 * 64)), "type": "F16",
        "bytes": 2 * 16 * 48 + 2 * 4 + 2 * 96 * 16,
        "members": [{"name": name, "m": 48, "type": "F16", "bytes": 2 * 48 * 16}
                    for name in ("ffn_gate", "ffn_up")],
    }
    (layer,) = found["dense_layers"]
    assert (layer["name"], layer["bytes"]) == ("attn_output", 2 * 64 * 64)
    assert found["totals"] == {
        "dense_parameters": 96 * 64 + 64 * 64,
        "stored_parameters": 16 * 48 + 96 * 16 + 64 * 64,
        "ratio": pytest.approx((16 * 48 + 96 * 16 + 64 * 64) / (96 * 64 + 64 * 64)),
        "low_rank_bytes": owner["bytes"],
        "dense_layer_bytes": 2 * 64 * 64,
        "other_bytes": 4 * 10 * 64,
        "tensor_bytes": owner["bytes"] + 2 * 64 * 64 + 4 * 10 * 64,
    }
    assert found["architecture"] == "skipcat-llama"
    assert found["file_bytes"] == low_rank.stat().st_size
    assert found["keys"] == {fmt.KEY_FORMAT_VERSION: 1, fmt.KEY_RATIO: 0.8, fmt.KEY_METHOD: "skipcat"}


def test_dense_json(dense: Path) -> None:
    found = run_json(dense)
    assert (found["owners"], found["keys"]) == ([], {})
    layers = [(layer["layer"], layer["m"], layer["n"]) for layer in found["dense_layers"]]
    assert layers == [(0, 32, 64), (1, 32, 64)]
    assert found["totals"]["ratio"] == 1.0
    assert found["totals"]["other_bytes"] == 4 * 10 * 64


def test_table_is_aligned_and_complete_in_a_pipe(low_rank: Path) -> None:
    lines = run(low_rank).stdout.splitlines()
    (header,) = [line for line in lines if line.startswith("layer")]
    rows = [line for line in lines if line.startswith(f"{LAYER} ")]
    assert [row.split()[1] for row in rows] == ["attn_output", "ffn_in"]
    assert "gate up" in rows[1]
    assert "16/64" in rows[1]
    end = header.index("rank") + len("rank")
    assert [row[:end].split()[-1] for row in rows] == ["dense", "16/64"]
    assert f"{fmt.KEY_METHOD}: skipcat" in lines


def test_llama_cpp_is_not_needed(low_rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert run(low_rank).exit_code == 0


def set_bits(count: int) -> Break:
    skip = np.zeros(INPUTS, dtype=bool)
    skip[:count] = True
    return lambda tensors: tensors.update({MASK: fmt.pack_skip_mask(skip)})


BREAKS: dict[str, tuple[Break, str]] = {
    "popcount": (set_bits(RANK - 1), MASK),
    "no lr_a": (lambda tensors: tensors.pop(LR_A), GATE),
    "no lr_a but a mask": (lambda tensors: [tensors.pop(name) for name in (LR_A, GATE, UP)], MASK),
    "no lr_b": (lambda tensors: [tensors.pop(name) for name in (GATE, UP)], LR_A),
    "rank": (lambda tensors: tensors.update({UP: np.zeros((OUTPUTS, RANK + 8), np.float16)}), UP),
    "mask words": (lambda tensors: tensors.update({MASK: np.zeros(5, np.int32)}), MASK),
    "mask type": (lambda tensors: tensors.update({MASK: np.zeros(2, np.float32)}), MASK),
    "vector": (lambda tensors: tensors.update({LR_A: np.zeros(RANK, np.float16)}), LR_A),
    "later stage": (lambda tensors: tensors.update({f"blk.{LAYER}.ffn_in.lr_a.0": tensors.pop(LR_A)}),
                    f"blk.{LAYER}.ffn_in.lr_a.0"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_file_names_the_tensor(kind: str, tmp_path: Path) -> None:
    change, name = BREAKS[kind]
    tensors = low_rank_tensors()
    change(tensors)
    path = write(tmp_path / "broken.gguf", "skipcat-llama", tensors, version=1)
    assert_one_sentence(run(path), str(path), name)


@pytest.mark.parametrize("version", [None, 3])
def test_other_format_version(version: int | None, tmp_path: Path) -> None:
    path = write(tmp_path / "newer.gguf", "skipcat-llama", low_rank_tensors(), version=version)
    assert_one_sentence(run(path), str(path), fmt.KEY_FORMAT_VERSION, str(version))


def test_truncated_anywhere(low_rank: Path, tmp_path: Path) -> None:
    whole = low_rank.read_bytes()
    last = GGUFReader(low_rank).tensors[-1]
    path = tmp_path / "cut.gguf"
    for size in [*range(4, 2000, 97), *range(2000, last.data_offset + last.n_bytes, 1009)]:
        path.write_bytes(whole[:size])
        assert_one_sentence(run(path), str(path), "cut short or damaged")


def test_metadata_that_is_not_utf8(low_rank: Path, tmp_path: Path) -> None:
    path = tmp_path / "bytes.gguf"
    path.write_bytes(low_rank.read_bytes().replace(b"skipcat-llama", b"skipcat-\xff\xfe\xff\xfe\xff"))
    assert_one_sentence(run(path), str(path), "damaged")


@pytest.mark.parametrize(
    ("content", "part"), [(b"", "not a GGUF"), (b"hello", "not a GGUF"), (None, "no such file")]
)
def test_not_a_gguf(content: bytes | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    if content is not None:
        path.write_bytes(content)
    assert_one_sentence(run(path), str(path), part)


def test_directory(tmp_path: Path) -> None:
    assert_one_sentence(run(tmp_path), str(tmp_path), "directory")


def test_long_arrays_are_stepped_over_and_all_else_is_the_same(low_rank: Path) -> None:
    ours, theirs = open_gguf(low_rank), GGUFReader(low_rank)
    assert list(ours.fields) == list(theirs.fields)
    long = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores"}
    for key, field in theirs.fields.items():
        assert ours.fields[key].contents() == ([] if key in long else field.contents())
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for our, their in zip(ours.tensors, theirs.tensors, strict=True):
        assert our.data.dtype == their.data.dtype
        assert np.array_equal(our.data, their.data)
