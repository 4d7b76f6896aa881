"""A source tree that holds nothing but a SentencePiece vocabulary, for models that `synth` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFWriter, TokenType


def write_vocabulary(tree: Path, words: Sequence[str]) -> int:
    """The vocabulary "tiny" of three special tokens, every byte and `words`; returns how many."""
    models = tree / "vendor" / "llama.cpp" / "models"
    models.mkdir(parents=True)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256,
             *[TokenType.NORMAL] * len(words)]
    writer = GGUFWriter(models / "ggml-vocab-tiny.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_bos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return len(tokens)
