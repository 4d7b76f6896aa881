"""Load a Hugging Face model for calibration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipcat_edge.errors import RetryError, UserError, first_line

from .resident import Residency, stream_weights, without_weights
from .source_files import hub_patterns
from .without_model_code import without_model_code


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
    residency: Residency | None = None
    """Where weights are in memory only while they are used."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.module.parameters()).device if self.residency is None else self.residency.device

    def bring(self, unit: torch.nn.Module) -> None:
        """Have the weights of a block in memory, and no other block's where they are streamed."""
        if self.residency is not None:
            self.residency.bring(unit)

    def release(self) -> None:
        """Have no block's weights in memory where they are streamed."""
        if self.residency is not None:
            self.residency.release()


def resolve_source(source: str, allow_pickle: bool = False) -> Path:
    """Local directory of `source`: a directory, or a hub id that is fetched.

    Pickles are fetched only with `allow_pickle`. Raises UserError if it is neither.
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

    unused = ["original/*", "onnx/*", "openvino/*"]
    try:
        return Path(snapshot_download(source, allow_patterns=hub_patterns(allow_pickle),
                                      ignore_patterns=unused))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{source} cannot be fetched from the hub ({first_line(error)}); give a local directory."
        ) from None


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def load_source(path: Path, device: str, allow_pickle: bool = False, stream: bool = False) -> SourceModel:
    """Load the model at `path` in float32 onto `device`, ready for calibration.

    `device`: `cpu`, `cuda`, or `auto` for all GPUs together, each with some of the blocks, and the CPU where
    there is none. `stream`: its weights are read from safetensors when they are used, block by block. Raises
    UserError if transformers cannot load it, `device` is not there, the GPUs cannot hold it, or its weights
    are pickles and not allowed, or cannot be streamed.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise RetryError("No CUDA device is available; use --device cpu.")
    placed = {"device_map": "auto"} if device == "auto" else {}
    with without_model_code(path, allow_pickle) as safe:
        if stream and safe.pickled:
            raise UserError(f"{path} has its weights as pickles only, which are read as a whole; leave out "
                            "--max-memory, or take a copy of the model with safetensors.")
        # False and not left out: transformers would ask the user whether to run the model's code
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(safe.folder, **local)
            causal = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
            is_encoder = not any(
                name in causal or name.endswith("ForConditionalGeneration")
                for name in config.architectures or []
            )
            loader = AutoModel if is_encoder else AutoModelForCausalLM
            if stream:
                module = without_weights(loader.from_config, config)
            else:
                module = loader.from_pretrained(safe.folder, config=config, dtype=torch.float32,
                                                use_safetensors=not safe.pickled, weights_only=True,
                                                **placed, **local)
            tokenizer = AutoTokenizer.from_pretrained(safe.folder, **local)
        except Exception as error:  # transformers, safetensors and pickle each raise their own
            problem = safe.explain(path, first_line(error))
            raise UserError(f"{path} cannot be loaded by transformers: {problem}") from None
    residency = stream_weights(module, path, device) if stream else None
    if device == "auto":
        _require_no_offload(path, getattr(module, "hf_device_map", {}))
    elif not stream:
        module = module.to(device)
    max_length = int(getattr(config, "max_position_embeddings", 0) or 2048)
    return SourceModel(path.resolve().name, module.eval(), tokenizer, is_encoder, max_length,
                       _pools_first_token(path), residency)


def _require_no_offload(path: Path, device_map: dict[str, Any]) -> None:
    """Raise UserError where weights that no device has room for are fetched whenever they are needed: hooks
    would see none."""
    places = {str(place) for place in device_map.values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise RetryError(f"The devices together have too little memory for {path} in float32; leave out "
                         "--device-map to calibrate on the CPU.")


def _pools_first_token(path: Path) -> bool:
    """What sentence-transformers' configuration says; the mean is its default."""
    try:
        pooling = json.loads((path / "1_Pooling" / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(pooling, dict) and bool(pooling.get("pooling_mode_cls_token", False))
