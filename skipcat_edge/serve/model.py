"""Opening a model for the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skipcat_edge.serve.prompt import use_own_prompts
from skipcat_edge.session import ModelInfo, open_embedding, open_model

# Tokens of a prompt that are computed at once. Of a prompt that was seen before, whole batches are used
# again, and between two of them a client may leave; larger ones are hardly faster on a CPU.
BATCH = 128


def open_served(path: Path, info: ModelInfo, context: int, threads: int | None) -> Any:
    """Load `path` for `context` tokens. Raises UserError as `session.open_model`."""
    if info.embedding:
        return open_embedding(path, context, threads)
    llama = open_model(path, context=context, batch=BATCH, threads=threads)
    use_own_prompts(llama, context)
    return llama
