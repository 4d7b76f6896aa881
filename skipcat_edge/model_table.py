"""Dimensions of known models, as their authors publish them in config.json.

To add one, add an entry to `MODELS`; a new architecture must be one whose layers are those of
llama or qwen2 (RMSNorm, rotary positions, gated feed-forward) with `<arch>.*` keys in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies for contexts longer than the pretraining one."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one transformer block that read the same n inputs."""

    n: int
    members: Mapping[str, int]
    """GGUF name of a layer -> its outputs m."""

    @property
    def m(self) -> int:
        """Outputs of all members."""
        return sum(self.members.values())


@dataclass(frozen=True)
class ModelDimensions:
    """Everything a random-weight model needs; sizes are element counts."""

    name: str
    architecture: str
    """llama.cpp's name of the architecture."""
    vocabulary: str
    """Which `models/ggml-vocab-<vocabulary>.gguf` of llama.cpp holds the tokenizer."""
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    context_length: int
    rope_theta: float
    norm_eps: float
    rope_scaling: RopeScaling | None = None
    tied_head: bool = True
    """The output head is the embedding matrix."""
    qkv_bias: bool = False

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linear layers of one block, by the input they read."""
        n_attn, n_kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        return (
            LinearGroup(self.n_embd, {"attn_q": n_attn, "attn_k": n_kv, "attn_v": n_kv}),
            LinearGroup(n_attn, {"attn_output": self.n_embd}),
            LinearGroup(self.n_embd, {"ffn_gate": self.n_ff, "ffn_up": self.n_ff}),
            LinearGroup(self.n_ff, {"ffn_down": self.n_embd}),
        )


_LLAMA_3_2_ROPE = RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
)

_TABLE = (
    ModelDimensions(
        name="llama-3.2-1b", architecture="llama", vocabulary="llama-bpe", n_vocab=128256,
        n_embd=2048, n_layer=16, n_head=32, n_head_kv=8, head_dim=64, n_ff=8192,
        context_length=131072, rope_theta=500000.0, norm_eps=1e-5, rope_scaling=_LLAMA_3_2_ROPE,
    ),
    ModelDimensions(
        name="llama-3.2-3b", architecture="llama", vocabulary="llama-bpe", n_vocab=128256,
        n_embd=3072, n_layer=28, n_head=24, n_head_kv=8, head_dim=128, n_ff=8192,
        context_length=131072, rope_theta=500000.0, norm_eps=1e-5, rope_scaling=_LLAMA_3_2_ROPE,
    ),
    ModelDimensions(
        name="qwen2.5-0.5b", architecture="qwen2", vocabulary="qwen2", n_vocab=151936,
        n_embd=896, n_layer=24, n_head=14, n_head_kv=2, head_dim=64, n_ff=4864,
        context_length=32768, rope_theta=1000000.0, norm_eps=1e-6, qkv_bias=True,
    ),
    ModelDimensions(
        name="qwen2.5-1.5b", architecture="qwen2", vocabulary="qwen2", n_vocab=151936,
        n_embd=1536, n_layer=28, n_head=12, n_head_kv=2, head_dim=128, n_ff=8960,
        context_length=32768, rope_theta=1000000.0, norm_eps=1e-6, qkv_bias=True,
    ),
    ModelDimensions(
        name="tinyllama-1.1b", architecture="llama", vocabulary="llama-spm", n_vocab=32000,
        n_embd=2048, n_layer=22, n_head=32, n_head_kv=4, head_dim=64, n_ff=5632,
        context_length=2048, rope_theta=10000.0, norm_eps=1e-5, tied_head=False,
    ),
)

MODELS: dict[str, ModelDimensions] = {model.name: model for model in _TABLE}
