"""Unusual but sound files load, as they do in stock llama.cpp; a failed assertion is an error code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType, TokenType
from gguf_edit import GGUF, Tensor
from hostile_seeds import encoder_file, levels_file, skip_file

pytestmark = [pytest.mark.runtime, pytest.mark.trust]

WORKER = Path(__file__).with_name("api_worker.py")
TOKENS = "tokenizer.ggml.tokens"


def call(file: GGUF, path: Path, way: str, *more: str) -> dict[str, Any]:
    """What tests/api_worker.py says of `file`, written to `path`."""
    command = [sys.executable, str(WORKER), way, str(file.write(path)), *more]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"GGML_NO_BACKTRACE": "1"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def with_number(file: GGUF, key: str, number: int) -> GGUF:
    file.set(key, number, GGUFValueType.UINT32)
    return file


def test_a_type_without_a_number_of_its_own(tmp_path: Path) -> None:
    """LlamaFileType.GUESSED, which we write for MXFP4."""
    file = with_number(skip_file(), "general.file_type", 1024)
    assert call(file, tmp_path / "a.gguf", "tokenize", "a")["loaded"]


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_special_token_that_the_vocabulary_lacks_is_the_default(name: str, tmp_path: Path) -> None:
    file = with_number(skip_file(), f"tokenizer.ggml.{name}_token_id", 32000)
    found = call(file, tmp_path / "a.gguf", "tokenize", "a")
    assert found["loaded"], found["errors"]
    assert found["tokens"] == [1, 4]  # <s> and ' a'


def test_a_special_token_without_a_default_is_refused(tmp_path: Path) -> None:
    """WordPiece's own number of the token at the end is 102, of 40 tokens."""
    key = "tokenizer.ggml.seperator_token_id"
    found = call(with_number(encoder_file(), key, 40), tmp_path / "a.gguf", "tokenize", "a")
    assert not found["loaded"] and f"key '{key}'" in found["errors"]


def without_bytes() -> GGUF:
    """The SentencePiece vocabulary of skip_file, its bytes taken by other tokens."""
    file = skip_file()
    _, type_, item = file.keys[TOKENS]
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "\u2581a", "a", *(f"word{i}" for i in range(256))]
    file.keys[TOKENS] = tokens, type_, item
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.NORMAL] * 259]
    file.keys["tokenizer.ggml.token_type"] = [int(kind) for kind in kinds], type_, GGUFValueType.INT32
    return file


def test_a_byte_without_a_token_is_the_unknown_token(tmp_path: Path) -> None:
    found = call(without_bytes(), tmp_path / "a.gguf", "tokenize", "a z")
    assert found["loaded"], found["errors"]
    assert found["tokens"] == [1, 4, 3, 0]  # <s>, ' a', ' ', <unk>


def test_bytes_with_tokens_are_spelled(tmp_path: Path) -> None:
    found = call(skip_file(), tmp_path / "a.gguf", "tokenize", "a\u00e9")
    assert found["tokens"] == [1, 4, 6 + 0xC3, 6 + 0xA9]


def test_a_small_model_with_a_large_vocabulary(tmp_path: Path) -> None:
    """As many tokens and merges as Llama 3 has."""
    n_tokens, n_merges = 128_256, 280_147
    file = levels_file()
    _, type_, item = file.keys[TOKENS]
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*file.keys[TOKENS][0], *(f"t{i}" for i in range(n_tokens - 40))]
    file.keys[TOKENS] = tokens, type_, item
    file.keys["tokenizer.ggml.token_type"] = [1] * n_tokens, type_, GGUFValueType.INT32
    pairs = [f"t{i} {letter}" for i in range(n_merges // 26 + 1) for letter in letters][:n_merges]
    file.keys["tokenizer.ggml.merges"] = pairs, type_, item
    file.set("llama.vocab_size", n_tokens, GGUFValueType.UINT32)
    file.tensors["token_embd.weight"] = Tensor.zeros((n_tokens, 64), Type.Q4_0)
    assert np.prod(file.tensors["token_embd.weight"].shape) < 10 * 2**20
    found = call(file, tmp_path / "a.gguf", "tokenize", "a")
    assert found["loaded"], found["errors"]


def test_a_failed_assertion_is_an_error_of_decode_and_encode(tmp_path: Path) -> None:
    found = call(encoder_file(), tmp_path / "a.gguf", "misuse")
    assert (found["decode"], found["encode"]) == (-3, -3)
    assert found["errors"].count("llama.cpp's assertion failed: ") == 2, found["errors"]
    assert "do not fit its architecture" not in found["errors"]
