"""Bytes that decoding a token reads from memory: what its speed is bound by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from skipcat_edge.format import ARCHITECTURE_PREFIX, KEY_ARCHITECTURE, field_value, tensors_at
from skipcat_edge.gguf_file import open_gguf

if TYPE_CHECKING:
    from gguf import GGUFReader

_TABLE, _HEAD = "token_embd.weight", "output.weight"
# looked up by a few rows: positions, and token types of encoders
_LOOKED_UP = {"position_embd.weight", "token_types.weight"}
_EXPERTS = re.compile(r"_exps\.(weight|bias)$")


def weight_bytes_per_token(path: Path, level: int = -1) -> int:
    """Bytes of the weights that decoding one token reads at the level of this place, the last one by default.

    All tensors that the level uses but tables that are looked up by row; the embedding table counts where it
    is the head too, and of experts only as many as are used. Raises UserError as `open_gguf`, FormatError.
    """
    return read_per_token(open_gguf(path), level)


def read_per_token(reader: GGUFReader, level: int = -1) -> int:
    """As `weight_bytes_per_token`, of an open file."""
    used = tensors_at(reader, level)
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors if tensor.name in used}
    skipped = _LOOKED_UP | ({_TABLE} if _HEAD in tensors else set())
    share = _experts_used(reader)
    return round(sum(nbytes * (share if _EXPERTS.search(name) else 1) for name, nbytes in tensors.items()
                     if name not in skipped))


def _experts_used(reader: GGUFReader) -> float:
    from gguf import Keys

    architecture = str(field_value(reader, KEY_ARCHITECTURE) or "").removeprefix(ARCHITECTURE_PREFIX)
    used, count = (field_value(reader, key.format(arch=architecture))
                   for key in (Keys.LLM.EXPERT_USED_COUNT, Keys.LLM.EXPERT_COUNT))
    return used / count if isinstance(used, int) and isinstance(count, int) and 0 < used <= count else 1.0
