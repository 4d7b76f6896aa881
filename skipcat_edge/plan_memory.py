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

# Fitted to the peaks that `bench` reported on x86-64 Linux for random-weight models of Llama 3.2 1B,
# Qwen2.5 0.5B and TinyLlama; none was off by more than 2 %.
PROCESS_BYTES = 55_000_000
"""Resident before a model is there: Python, NumPy and the library."""
TOKEN_BYTES = 350
"""Of the vocabulary, for each token: its text, and tables of the tokenizer."""
_BATCH_FLOATS_PER_FF = 4.1
"""Intermediate results that a batch touches, for each token and output of the feed-forward. llama.cpp
reserves more, for the logits of all tokens, but memory that nobody writes to takes no room."""

# Type -> feature -> of what the rows must be a multiple for ggml to keep a second copy of the weights in the
# order that its kernels read: ggml_repack_get_optimal_repack_type of the pinned llama.cpp.
_REPACKED: dict[str, dict[str, int]] = {
    "Q4_0": {"avx2": 8, "asimddp": 4},
    "IQ4_NL": {"avx2": 8, "asimddp": 4},
    "MXFP4": {"avx2": 8, "asimddp": 4},
    "Q4_K": {"avx2": 8, "asimddp": 8},
    "Q2_K": {"avx512f": 8},
    "Q5_K": {"asimddp": 8},
    "Q6_K": {"asimddp": 8},
    "Q8_0": {"asimddp": 4},
    "Q1_0": {"asimddp": 4},
}


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes while a model runs."""

    weights: int
    """The mapped file."""
    repacked: int
    """A second copy of weights, in the order that the kernels read them."""
    kv: int
    """Keys and values of a full context."""
    compute: int
    """Intermediate results of the longest batch."""
    process: int
    """The program itself, and the vocabulary."""

    @property
    def peak(self) -> int:
        """The most that is resident at a time."""
        return self.weights + self.repacked + self.kv + self.compute + self.process


def memory_need(model: PlannedModel, context: int, prompt_tokens: int,
                features: Collection[str]) -> MemoryNeed:
    """What `model` needs with a context of `context` tokens and prompts of `prompt_tokens` on a CPU with
    `features` (device.FEATURES)."""
    dimensions = model.model
    return MemoryNeed(
        weights=model.nbytes, repacked=_repacked(model, features), kv=kv_bytes(dimensions, context),
        compute=round(4 * _BATCH_FLOATS_PER_FF * dimensions.n_ff * min(prompt_tokens, BATCH)),
        process=PROCESS_BYTES + TOKEN_BYTES * dimensions.n_vocab,
    )


def kv_bytes(model: ModelDimensions, context: int) -> int:
    """Keys and values of `context` tokens, rounded up as llama.cpp does."""
    return kv_bytes_per_token(model) * -(-context // CONTEXT_STEP) * CONTEXT_STEP


def kv_bytes_per_token(model: ModelDimensions) -> int:
    """Of a key and a value in F16, in all layers."""
    return 2 * 2 * model.n_head_kv * model.head_dim * model.n_layer


def _repacked(model: PlannedModel, features: Collection[str]) -> int:
    copied = {Role.LINEAR, Role.HEAD} | ({Role.EMBEDDING} if model.model.tied_head else set())
    return sum(tensor.nbytes for tensor in model.tensors
               if tensor.role in copied and is_repacked(tensor.type, tensor.shape[0], features))


def is_repacked(type_: GGMLQuantizationType, rows: int, features: Collection[str]) -> bool:
    """Whether ggml keeps a repacked copy of a matrix on a CPU with `features`."""
    multiples = _REPACKED.get(type_.name, {})
    return any(feature in features and rows % multiple == 0 for feature, multiple in multiples.items())
