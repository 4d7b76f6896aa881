"""Load a Hugging Face model for calibration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipcat_edge.errors import UserError, first_line


@dataclass(frozen=True)
class SourceModel:
    """A loaded model with its tokenizer."""

    name: str
    module: torch.nn.Module
    tokenizer: Any
    is_encoder: bool
    """Sees both sides of a token (BERT): calibrated on sentences instead of windows of text."""
    max_length: int
    """Longest sequence the model takes, in tokens."""
    pools_first_token: bool = False
    """An encoder's sentence embedding is its first token's, not the mean of all."""


def resolve_source(source: str) -> Path:
    """Local directory of `source`: a directory, or a hub id that is fetched.

    Raises UserError if it is neither.
    """
    path = Path(source)
    if path.is_file():
        hint = "it is already GGUF; give the Hugging Face directory it was made from" if _is_gguf(path) else (
            "give the directory that holds config.json and the weights")
        raise UserError(f"{source} is a file, but a Hugging Face model directory is expected: {hint}.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{source} has no config.json; give a Hugging Face model directory.")
        return path
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(f"{source}: no such directory, and not a hub id of the form owner/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unused = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]
    try:
        return Path(snapshot_download(source, ignore_patterns=unused))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{source} cannot be fetched from the hub ({first_line(error)}); give a local directory."
        ) from None


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def load_source(path: Path, device: str) -> SourceModel:
    """Load the model at `path` in float32 onto `device`, ready for calibration.

    Raises UserError if transformers cannot load it or `device` is not there.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("No CUDA device is available; use --device cpu.")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        causal = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
        is_encoder = not any(
            name in causal or name.endswith("ForConditionalGeneration") for name in config.architectures or []
        )
        loader = AutoModel if is_encoder else AutoModelForCausalLM
        module = loader.from_pretrained(path, config=config, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers, safetensors and pickle each raise their own
        raise UserError(f"{path} cannot be loaded by transformers: {first_line(error)}") from None
    max_length = int(getattr(config, "max_position_embeddings", 0) or 2048)
    return SourceModel(path.resolve().name, module.eval().to(device), tokenizer, is_encoder, max_length,
                       _pools_first_token(path))


def _pools_first_token(path: Path) -> bool:
    """What sentence-transformers' configuration says; the mean is its default."""
    try:
        pooling = json.loads((path / "1_Pooling" / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(pooling, dict) and bool(pooling.get("pooling_mode_cls_token", False))
