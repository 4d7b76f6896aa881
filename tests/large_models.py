"""Hugging Face directories of random weights, written shard by shard: they may be larger than memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from conversion import DEMO
from safetensors.torch import save_file
from skipcat_converter import memory
from skipcat_converter.layers import Layer


@dataclass(frozen=True)
class Dimensions:
    """Of a Llama model; the names are transformers'."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one block's tensors."""
        hidden, wide = self.hidden_size, self.intermediate_size
        keys = self.num_key_value_heads * self.head_dim
        return {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
        }  # fmt: skip


_MEMBERS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
LLAMA_1B = Dimensions(2048, 8192, 16, 32, 8, 128_256)
LLAMA_3B = Dimensions(3072, 8192, 28, 24, 8, 128_256)
LLAMA_8B = Dimensions(4096, 14336, 32, 32, 8, 128_256, tie_word_embeddings=False)


def plan_dimensions(model: Dimensions) -> memory.Dimensions:
    """What --max-memory plans from."""
    shapes = {name: shape for name, shape in model.block_shapes().items() if len(shape) == 2}
    block = [Layer(0, _MEMBERS[name.rpartition(".")[2]], "", *shape) for name, shape in shapes.items()]
    elements = sum(math.prod(shape) for shape in shapes.values())
    return memory.Dimensions([block], elements, model.vocab_size * model.hidden_size, model.hidden_size,
                             model.vocab_size)


def write_model(folder: Path, dimensions: Dimensions, seed: int = 0) -> None:
    """A model in BF16, a shard for each block and one for the rest, with the demo model's tokenizer."""
    folder.mkdir(parents=True)
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, folder)
    folder.joinpath("config.json").write_text(json.dumps({
        **asdict(dimensions), "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }))
    generator = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(_shards(dimensions)):
        name = f"model-{number:05d}.safetensors"
        shard = {tensor: _random(shape, generator) for tensor, shape in shapes.items()}
        save_file(shard, folder / name, {"format": "pt"})
        where |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": where}
    folder.joinpath("model.safetensors.index.json").write_text(json.dumps(index))


def _shards(dimensions: Dimensions) -> Iterator[dict[str, tuple[int, ...]]]:
    outside = (dimensions.vocab_size, dimensions.hidden_size)
    yield {"model.embed_tokens.weight": outside, "model.norm.weight": (dimensions.hidden_size,)}
    if not dimensions.tie_word_embeddings:
        yield {"lm_head.weight": outside}
    for index in range(dimensions.num_hidden_layers):
        yield {f"model.layers.{index}.{name}.weight": shape
               for name, shape in dimensions.block_shapes().items()}


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations of about size one; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weights = torch.empty(shape, dtype=torch.bfloat16)
    return weights.normal_(std=shape[1] ** -0.5, generator=generator)
