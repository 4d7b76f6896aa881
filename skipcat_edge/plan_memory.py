"""Memory that a model will need, from its dimensions: what `bench` would report as its peak."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skipcat_edge.session import BATCH, CONTEXT_STEP
from skipcat_edge.synth_plan import Role

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from skipcat_edge.model_table import ModelDimensions
    from skipcat_edge.synth_plan import Plan as PlannedModel

PROCESS_BYTES = 56_000_000
"""Resident before a model is there: Python, NumPy and the library. Measured with `bench` on x86-64 Linux."""
TOKEN_BYTES = 400
"""What a token's text and its merge cost in the file and in llama.cpp's tables together."""

# Type -> features of which one makes ggml keep a second copy of the weights in the order its kernels read
# them, as ggml_repack_get_optimal_repack_type of the pinned llama.cpp decides, and the rows it needs.
_REPACKED: dict[str, tuple[frozenset[str], int]] = {
    "Q4_0": (frozenset({"avx2", "asimddp"}), 8),
    "IQ4_NL": (frozenset({"avx2", "asimddp"}), 8),
    "Q4_K": (frozenset({"avx2", "asimddp"}), 8),
    "Q2_K": (frozenset({"avx512f"}), 8),
    "Q5_K": (frozenset({"asimddp"}), 8),
    "Q6_K": (frozenset({"asimddp"}), 8),
    "Q8_0": (frozenset({"asimddp"}), 4),
}


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes while a model runs."""

    file: int
    """The mapped file: its weights, and its vocabulary."""
    repacked: int
    """A second copy of the weights, in the order that the kernels read them."""
    kv: int
    """Keys and values of a full context."""
    compute: int
    """Intermediate results, and logits."""
    process: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.file + self.repacked + self.kv + self.compute + self.process


def memory_need(model: PlannedModel, context: int, features: Collection[str]) -> MemoryNeed:
    """What `model` needs with a context of `context` tokens on a CPU with `features` (device.FEATURES)."""
    dimensions = model.model
    vocabulary = TOKEN_BYTES * dimensions.n_vocab
    return MemoryNeed(
        file=model.nbytes, repacked=_repacked(model, features), kv=kv_bytes(dimensions, context),
        compute=compute_bytes(dimensions, context), process=PROCESS_BYTES + vocabulary,
    )


def kv_bytes(model: ModelDimensions, context: int) -> int:
    """Keys and values of `context` tokens (rounded up as llama.cpp does) in F16."""
    context = -(-context // CONTEXT_STEP) * CONTEXT_STEP
    return 2 * 2 * model.n_head_kv * model.head_dim * model.n_layer * context


def compute_bytes(model: ModelDimensions, context: int) -> int:
    """llama.cpp's compute buffer of a batch: the logits of all its tokens, which it reserves room for, or
    what a feed-forward holds at once; and the input of the head."""
    return 4 * BATCH * (max(model.n_vocab, 2 * model.n_ff) + 2 * model.n_embd)


def _repacked(model: PlannedModel, features: Collection[str]) -> int:
    copied = {Role.LINEAR, Role.HEAD} | ({Role.EMBEDDING} if model.model.tied_head else set())
    return sum(tensor.nbytes for tensor in model.tensors
               if tensor.role in copied and is_repacked(tensor.type, tensor.shape[0], features))


def is_repacked(type_: GGMLQuantizationType, rows: int, features: Collection[str]) -> bool:
    """Whether ggml keeps a repacked copy of a matrix on a CPU with `features`."""
    needed, multiple = _REPACKED.get(type_.name, (frozenset(), 1))
    return bool(needed & set(features)) and rows % multiple == 0
