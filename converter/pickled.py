"""Weights that are pickles, programs to whoever unpickles them: refused unless the user allows them.

Where they are, transformers and llama.cpp's converter read them with torch.load(weights_only=True), whose
unpickler builds tensors and containers only. What remains is a flaw in that unpickler.
"""

from __future__ import annotations

from pathlib import Path

import torch

from skipcat_edge.errors import RetryError, UserError

from .source_files import pickles

# CVE-2025-32434: before it, weights_only kept nothing out.
_SOUND_TORCH = (2, 6)


def has_pickled_weights(model: Path, allow_pickle: bool) -> bool:
    """Whether the weights of the Hugging Face directory `model` are pickles only.

    Raises UserError where they are and may not be read, and where there are no weights at all.
    """
    if any(path.is_file() for pattern in ("*.safetensors", "*.safetensors.index.json")
           for path in model.glob(pattern)):
        return False
    found = pickles(model)
    if not found:
        raise UserError(f"{model} has no weights as safetensors (*.safetensors); give a model that has them. "
                        "Where it has pickles only, on the hub, `convert --allow-pickle` fetches those.")
    if not allow_pickle:
        raise RetryError(f"{model} has its weights as pickles only ({found[0]}), which can hold programs; "
                         "take a copy of the model with safetensors, or trust its author and pass "
                         "`convert --allow-pickle`.")
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SOUND_TORCH:
        raise UserError(f"PyTorch {torch.__version__} runs what a pickle says even where it should read "
                        "numbers only (CVE-2025-32434); --allow-pickle needs 2.6 or newer.")
    return True
