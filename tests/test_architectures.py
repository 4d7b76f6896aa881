"""Low rank in llama.cpp is the low rank that was computed: logits against transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversion import DEMO, convert_model, multiplied_out, tensors
from gguf import GGMLQuantizationType, GGUFReader

from skipcat_edge.format import read_owners
from skipcat_edge.runtime.source import stock_tree

torch = pytest.importorskip("torch", reason="the converter needs torch")
transformers = pytest.importorskip("transformers", reason="the converter needs transformers")

from skipcat_converter.layers import map_layers  # noqa: E402

pytestmark = pytest.mark.runtime

SIZES = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama-mha": (transformers.LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-gqa": (transformers.LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config,
              {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}),
}  # fmt: skip


def random_model(name: str, directory: Path, **sizes: int) -> Any:
    """A random model with weights and biases large enough to matter, saved with the demo tokenizer."""
    config_class, extra = MODELS[name]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **sizes}, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif parameter.dim() == 2:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
    save(model, directory)
    return model


def save(model: Any, directory: Path) -> None:
    """Write a Hugging Face directory with the demo tokenizer."""
    model.save_pretrained(directory)
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, directory)


def row_permutation(file: np.ndarray, module: np.ndarray) -> np.ndarray:
    """Rows of the module's weight in the file's order (llama.cpp permutes some for RoPE)."""
    distances = ((file[:, None, :] - module[None, :, :]) ** 2).sum(-1)
    order = distances.argmin(1)
    assert sorted(order) == list(range(len(file)))
    return order


def put_factors_into(model: Any, low_rank: Path, dense: Path) -> None:
    """Replace the module's weights by the file's factors multiplied out."""
    original, layers = tensors(dense), map_layers(GGUFReader(dense), model, stock_tree())
    weights = multiplied_out(low_rank)
    assert weights
    modules = {layer.tensor: layer.module for group in layers.groups for layer in group}
    with torch.no_grad():
        for name, W in weights.items():
            parameter = model.get_submodule(modules[name]).weight
            order = row_permutation(original[name], parameter.numpy())
            parameter[torch.from_numpy(order)] = torch.from_numpy(W)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def llama_logits(path: Path, tokens: list[int]) -> np.ndarray:
    from skipcat_edge.decoding import all_logits
    from skipcat_edge.session import open_generative

    llama = open_generative(path, 128, threads=2)
    try:
        return np.array(all_logits(llama, tokens))
    finally:
        llama.close()


@pytest.mark.parametrize("method", ["skipcat", "svd-llm"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, method: str, tmp_path: Path) -> None:
    model = random_model(name, tmp_path / "hf")
    dense, low_rank = tmp_path / "dense.gguf", tmp_path / "low.gguf"
    convert_model(tmp_path / "hf", dense, ratio=1.0, quant="F32")
    result = convert_model(
        tmp_path / "hf", low_rank, base=dense, method=method, ratio=0.7, quant="F16",
        calibration=DEMO / "calibration.txt", calib_tokens=2000, seq_len=64,
    )
    assert not result.dense
    assert len(result.owners) == 3 * (4 if method == "skipcat" else 7)
    tokens = [1, *np.random.default_rng(0).integers(3, 2048, 40).tolist()]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        untouched = model(ids).logits[0].numpy()
        put_factors_into(model, low_rank, dense)
        expected = model(ids).logits[0].numpy()
    assert relative_error(llama_logits(dense, tokens), untouched) < 1e-2
    assert relative_error(llama_logits(low_rank, tokens), expected) < 1e-2
    # the factors change the model by far more than the tolerance
    assert relative_error(untouched, expected) > 0.1


def test_experts_stay_dense_and_are_named(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    save(model, tmp_path / "hf")
    dense, low_rank = tmp_path / "dense.gguf", tmp_path / "low.gguf"
    convert_model(tmp_path / "hf", dense, ratio=1.0, quant="F32")
    result = convert_model(tmp_path / "hf", low_rank, base=dense, ratio=0.7,
                           calibration=DEMO / "calibration.txt", calib_tokens=1000, seq_len=64)
    assert {reason for name, reason in result.dense.items() if "_exps" in name} == {"a matrix per expert"}
    assert {report.owner.name for report in result.owners} == {"attn_in", "attn_output"}
    tokens = [1, *np.random.default_rng(0).integers(3, 2048, 40).tolist()]
    with torch.no_grad():
        put_factors_into(model, low_rank, dense)
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert relative_error(llama_logits(low_rank, tokens), expected) < 1e-2


def test_k_quants_where_the_rank_allows(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    model = random_model("llama-mha", tmp_path / "hf", **sizes)
    dense, low_rank = tmp_path / "dense.gguf", tmp_path / "low.gguf"
    convert_model(tmp_path / "hf", dense, ratio=1.0, quant="F32")
    convert_model(tmp_path / "hf", low_rank, base=dense, ratio=0.8, quant="Q4_K",
                  calibration=DEMO / "calibration.txt", calib_tokens=2000)
    owners = read_owners(GGUFReader(low_rank))
    assert {owner.type for owner in owners} == {GGMLQuantizationType.Q4_K}
    assert all(owner.rank % 256 == 0 for owner in owners)
    tokens = [1, *np.random.default_rng(0).integers(3, 2048, 40).tolist()]
    with torch.no_grad():
        put_factors_into(model, low_rank, dense)
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    # llama.cpp rounds activations to 8 bits before a K-quant product, three times a layer here
    assert relative_error(llama_logits(low_rank, tokens), expected) < 0.1
    assert relative_error(llama_logits(dense, tokens), expected) > 0.5


def test_methods_share_projections_and_skip_as_named(tmp_path: Path, demo_dense_gguf: Path) -> None:
    expected = {"skipcat": (4, True), "skip": (7, True), "cat": (4, False), "svd": (7, False)}
    for method, (owners, skip) in expected.items():
        out = tmp_path / f"{method}.gguf"
        convert_model(DEMO / "model", out, base=demo_dense_gguf, method=method,
                      calibration=DEMO / "calibration.txt", calib_tokens=1000)
        found = [owner for owner in read_owners(GGUFReader(out)) if owner.layer == 0]
        assert len(found) == owners
        assert {owner.skip for owner in found} == {skip}
        assert all(owner.ratio <= 0.8 for owner in found)
