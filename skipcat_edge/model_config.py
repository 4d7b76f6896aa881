"""A model's dimensions from its config alone: a Hugging Face directory's, the hub's, or a GGUF file's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipcat_edge.errors import UserError, first_line
from skipcat_edge.format import ARCHITECTURE_PREFIX, KEY_ARCHITECTURE, field_value
from skipcat_edge.gguf_file import open_gguf
from skipcat_edge.model_table import MODELS, ModelDimensions

_QKV_BIAS = {"llama": False, "mistral": False, "qwen2": True, "qwen3": False}
"""Architectures with q, k, v, an output and a gated feed-forward -> whether q, k and v have a bias."""
_MOST = 2**31 - 1


def read_dimensions(source: str) -> ModelDimensions:
    """The dimensions of `source`: a name of `model_table`, a directory with config.json, a GGUF file, or a
    model on the hub, of which config.json alone is fetched.

    The architecture is `llama` or `qwen2`, whose layers have these shapes. Raises UserError for what is
    missing, unreadable, or of another architecture.
    """
    path = Path(source)
    if source in MODELS:
        return MODELS[source]
    if os.path.isdir(source):  # noqa: PTH112 (False, not an error, for what no file can be called)
        return _from_config(path / "config.json", path.resolve().name)
    if os.path.isfile(source) or path.suffix == ".gguf":  # noqa: PTH113
        return _from_gguf(path)
    if source.count("/") == 1 and not source.startswith((".", "/")):
        return _from_config(_fetch(source), source)
    raise UserError(f"{source} is neither a directory, a GGUF file, a hub id (user/model), nor one of "
                    f"{', '.join(MODELS)}.")


def _fetch(repository: str) -> Path:
    """config.json of the hub's `repository`."""
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        raise UserError(f"Reading {repository} from the hub needs huggingface_hub; install it with "
                        "`pip install huggingface_hub`.") from None
    try:
        return Path(hf_hub_download(repository, "config.json"))
    except Exception as error:  # of many kinds: no network, no such model, no permission
        raise UserError(f"config.json of {repository} cannot be fetched ({first_line(error)}); check the id, "
                        "your connection and `hf auth login`.") from None


def _from_config(path: Path, name: str) -> ModelDimensions:
    try:
        config: Any = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({first_line(error)}).") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model's configuration.")
    kind = str(config.get("model_type"))
    _require_known(path, kind)

    def number(key: str, default: int | None = None) -> int:
        return _number(path, config, key, default)

    n_embd, n_head = number("hidden_size"), number("num_attention_heads")
    tied = config.get("tie_word_embeddings", False)
    bias = bool(config.get("attention_bias", _QKV_BIAS[kind]))
    return ModelDimensions(
        name=name, architecture="qwen2" if bias else "llama", vocabulary="", n_vocab=number("vocab_size"),
        n_embd=n_embd, n_layer=number("num_hidden_layers"), n_head=n_head,
        # of the others transformers has defaults of its own
        n_head_kv=number("num_key_value_heads", n_head if kind == "llama" else None),
        head_dim=number("head_dim", 128 if kind == "qwen3" else n_embd // n_head),
        n_ff=number("intermediate_size"), context_length=number("max_position_embeddings", 2048),
        rope_theta=10000.0, norm_eps=1e-5, tied_head=bool(tied), qkv_bias=bias,
    )


def _from_gguf(path: Path) -> ModelDimensions:
    from gguf import Keys

    reader = open_gguf(path)
    kind = str(field_value(reader, KEY_ARCHITECTURE) or "").removeprefix(ARCHITECTURE_PREFIX)
    _require_known(path, kind)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} has no token_embd.weight; it is not a whole model.")
    keys = {
        "n_embd": Keys.LLM.EMBEDDING_LENGTH, "n_layer": Keys.LLM.BLOCK_COUNT,
        "n_head": Keys.Attention.HEAD_COUNT, "n_head_kv": Keys.Attention.HEAD_COUNT_KV,
        "head_dim": Keys.Attention.KEY_LENGTH, "n_ff": Keys.LLM.FEED_FORWARD_LENGTH,
        "context_length": Keys.LLM.CONTEXT_LENGTH,
    }
    found = {name: field_value(reader, key.format(arch=kind)) for name, key in keys.items()}
    if field_value(reader, Keys.LLM.EXPERT_COUNT.format(arch=kind)):
        raise UserError(f"{path} is a mixture of experts, which cannot be planned; measure it with "
                        "`skipcat-edge bench`.")

    def number(name: str, default: int | None = None) -> int:
        return _number(path, found, name, default)

    n_embd, n_head = number("n_embd"), number("n_head")
    bias = any(name.endswith("attn_q.bias") for name in tensors)
    return ModelDimensions(
        name=path.stem, architecture="qwen2" if bias else "llama", vocabulary="",
        n_vocab=int(tensors["token_embd.weight"].shape[1]), n_embd=n_embd, n_layer=number("n_layer"),
        n_head=n_head, n_head_kv=number("n_head_kv", n_head), head_dim=number("head_dim", n_embd // n_head),
        n_ff=number("n_ff"), context_length=number("context_length", 2048), rope_theta=10000.0, norm_eps=1e-5,
        tied_head="output.weight" not in tensors, qkv_bias=bias,
    )


def _require_known(path: Path, kind: str) -> None:
    if kind not in _QKV_BIAS:
        raise UserError(f"{path} describes a model of type {kind}; those that can be planned are "
                        f"{', '.join(_QKV_BIAS)}.")


def _number(path: Path, values: Mapping[str, Any], key: str, default: int | None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= _MOST:
        raise UserError(f"{path}: `{key}` is {value!r}, but it must be a number from 1 to {_MOST}.")
    return value
