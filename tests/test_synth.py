"""Random-weight models: dimensions, layout, values, and what a person reads on bad input."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType, GGUFReader, quants
from vocabulary import write_vocabulary

from skipcat_edge import format as fmt
from skipcat_edge.cli import main
from skipcat_edge.errors import UserError
from skipcat_edge.model_table import MODELS, ModelDimensions, RopeScaling
from skipcat_edge.synth import write
from skipcat_edge.synth_plan import plan, rope_factors
from skipcat_edge.weight_types import weight_type

TINY = ModelDimensions(
    name="tiny", architecture="qwen2", vocabulary="tiny", n_vocab=300, n_embd=96, n_layer=2, n_head=4,
    n_head_kv=2, head_dim=32, n_ff=160, context_length=64, rope_theta=10000.0, norm_eps=1e-6,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 32), tied_head=False, qkv_bias=True,
)  # fmt: skip
LAYERS = {
    "attn_q": (128, 96), "attn_k": (64, 96), "attn_v": (64, 96), "attn_output": (96, 128),
    "ffn_gate": (160, 96), "ffn_up": (160, 96), "ffn_down": (96, 160),
}  # fmt: skip
OTHERS = {
    "token_embd.weight": (300, 96), "output.weight": (300, 96), "output_norm.weight": (96,),
    "rope_freqs.weight": (16,),
} | {
    f"blk.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "attn_norm.weight": (96,), "ffn_norm.weight": (96,),
        "attn_q.bias": (128,), "attn_k.bias": (64,), "attn_v.bias": (64,),
    }.items()
}  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree that holds nothing but a SentencePiece vocabulary of 290 tokens, for `tiny`."""
    monkeypatch.setitem(MODELS, "tiny", TINY)
    root = tmp_path / "tree"
    assert write_vocabulary(root, [f"▁w{i}" for i in range(31)]) == 290
    return root


def synth(tree: Path, out: Path, *options: str, name: str = "tiny") -> Result:
    return CliRunner().invoke(main, ["synth", name, "-o", str(out), "--source", str(tree), *options])


def shapes(reader: GGUFReader) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}


def test_dense(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense.gguf"
    result = synth(tree, out)
    assert result.exit_code == 0, result.output
    reader = GGUFReader(out)
    linear = {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in LAYERS.items()}
    assert shapes(reader) == OTHERS | linear
    matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2}
    assert matrices == {"Q8_0"}
    value = {key: field.contents() for key, field in reader.fields.items()}
    assert value["general.architecture"] == "qwen2"
    assert value["qwen2.attention.head_count_kv"] == 2
    assert not [key for key in value if key.startswith("skipcat.")]
    assert fmt.read_owners(reader) == []


def test_vocabulary_is_padded_to_the_embedding(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense.gguf"
    synth(tree, out)
    value = {key: field.contents() for key, field in GGUFReader(out).fields.items()}
    tokens = value["tokenizer.ggml.tokens"]
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert tokens[289:] == ["▁w30"] + [f"[PAD{i}]" for i in range(290, 300)]
    assert value["tokenizer.ggml.token_type"][288:] == [1, 1] + [5] * 10
    assert value["tokenizer.ggml.scores"][288:] == [-288.0, -289.0] + [-1000.0] * 10
    assert value["tokenizer.ggml.bos_token_id"] == 1


@pytest.mark.parametrize("ratio", [0.8, 0.5])
@pytest.mark.parametrize(("quant", "grid"), [("Q8_0", 32), ("F16", 8)])
def test_low_rank(tree: Path, tmp_path: Path, ratio: float, quant: str, grid: int) -> None:
    out = tmp_path / "low-rank.gguf"
    result = synth(tree, out, "--ratio", str(ratio), "--quant", quant, "--seed", "7")
    assert result.exit_code == 0, result.output
    reader = GGUFReader(out)
    owners = fmt.read_owners(reader)
    groups = {
        "attn_in": ["attn_q", "attn_k", "attn_v"], "attn_output": ["attn_output"],
        "ffn_in": ["ffn_gate", "ffn_up"], "ffn_down": ["ffn_down"],
    }  # fmt: skip
    found = sorted((owner.layer, owner.name) for owner in owners)
    assert found == [(layer, name) for layer in (0, 1) for name in sorted(groups)]
    for owner in owners:
        assert {member.name: member.m for member in owner.members} == {
            name: LAYERS[name][0] for name in groups[owner.name]
        }
        assert owner.n == LAYERS[owner.members[0].name][1]
        assert owner.skip
        assert {owner.type.name, *(member.type.name for member in owner.members)} == {quant}
        assert owner.rank % grid == 0
        more = owner.rank + grid
        assert owner.ratio <= ratio < more * (owner.m + owner.n - more) / (owner.m * owner.n)
    factors = {name for name in shapes(reader) if ".lr_" in name or name.endswith(".skip_mask")}
    assert shapes(reader).keys() - factors == OTHERS.keys()
    expected = {
        "general.architecture": "skipcat-qwen2", "skipcat.format_version": 1, "skipcat.method": "skipcat",
        "skipcat.ratio": pytest.approx(ratio), "skipcat.source.name": "tiny", "skipcat.seed": 7,
        "skipcat.runtime_min": fmt.RUNTIME_MIN, "skipcat.calibration.tokens": 0, "qwen2.block_count": 2,
    }  # fmt: skip
    assert {key: fmt.field_value(reader, key) for key in expected} == expected


def test_levels(tree: Path, tmp_path: Path) -> None:
    levels = [0.2, 0.6, 0.98]
    out = tmp_path / "levels.gguf"
    result = synth(tree, out, "--levels", ",".join(map(str, levels)), "--quant", "F16")
    assert result.exit_code == 0, result.output
    reader = GGUFReader(out)
    assert fmt.field_value(reader, fmt.KEY_FORMAT_VERSION) == 2
    assert fmt.field_value(reader, fmt.KEY_RUNTIME_MIN) == "skipcat.5"
    assert fmt.field_value(reader, fmt.KEY_RATIO) == pytest.approx(levels[-1])
    assert fmt.read_levels(reader) == tuple(levels)
    owners = fmt.read_owners(reader)
    assert {owner.levels for owner in owners} == {(place, len(levels) - 1) for place in range(len(levels))}
    masks = set()
    for owner in owners:
        used = None if owner.levels[0] == 0 else owner.levels
        masks.add(tensor_bytes(reader, fmt.skip_mask_name(owner.layer, owner.name, used)))
        # what is added is Q8_0: whole blocks, 8.5 of 16 bits
        grid, price = (8, 1.0) if owner.levels[0] == 0 else (32, 8.5 / 16)
        assert owner.type.name == ("F16" if owner.levels[0] == 0 else "Q8_0")
        assert owner.skip and owner.rank % grid == 0
        stages = [other for other in owners if (other.layer, other.name) == (owner.layer, owner.name)
                  and other.levels[0] <= owner.levels[0]]
        kept = sum(stage.parameters * (1.0 if stage.levels[0] == 0 else price) for stage in stages) / (
            owner.m * owner.n)
        more = owner.rank + grid
        step = price * (more * (owner.m + owner.n - more) - owner.parameters) / (owner.m * owner.n)
        assert kept <= levels[owner.levels[0]] < kept + step or more >= owner.n
    assert len(masks) == len(owners)  # each has a skip set of its own
    dense = 2 * sum(m * n for m, n in LAYERS.values())
    for place, level in enumerate(levels):
        kept = sum(owner.parameters * (8.5 / 16 if owner.levels[0] else 1.0)
                   for owner in owners if owner.used_at(place)) / dense
        assert f"level {level:g} at {kept:.3f}" in result.output


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_0"])
def test_each_level_of_a_large_model_has_its_ratio(quant: str) -> None:
    planned = plan(MODELS["llama-3.2-1b"], GGMLQuantizationType[quant], 0.8, 0, (0.6, 0.8))
    # a step of the rank, 64, is at most 5 % of an owner of 2,048 inputs
    assert 0.55 < planned.kept_at(0) <= 0.6 and 0.75 < planned.kept_at(1) <= 0.8
    assert planned.kept_at(1) == planned.kept


def tensor_bytes(reader: GGUFReader, name: str) -> bytes:
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == name)
    return bytes(tensor.data.tobytes())


def test_outputs_of_levels_add_up_to_a_dense_layers(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "levels.gguf"
    assert synth(tree, out, "--levels", "0.5,0.9", "--quant", "F16").exit_code == 0
    for tensor in GGUFReader(out).tensors:
        if ".lr_b." in tensor.name:
            weights = quants.dequantize(tensor.data, tensor.tensor_type)
            assert weights.std() * math.sqrt(tensor.shape[0]) == pytest.approx(math.sqrt(0.25), rel=0.1)


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_weights_are_gaussian(tree: Path, tmp_path: Path, quant: str) -> None:
    out = tmp_path / "model.gguf"
    assert synth(tree, out, "--quant", quant, "--ratio", "0.8").exit_code == 0
    for tensor in GGUFReader(out).tensors:
        if len(tensor.shape) == 2:
            weights = quants.dequantize(tensor.data, tensor.tensor_type)
            assert weights.shape == tuple(reversed(tensor.shape))
            # z = x_S + T x_R has the variance 2, and what B makes of it 1, as a dense layer's output.
            expected = math.sqrt(0.5) if ".lr_b." in tensor.name else 1
            # The smallest factor has 3,072 elements: its deviation is known to about 1.3 %.
            assert weights.std() * math.sqrt(tensor.shape[0]) == pytest.approx(expected, rel=0.1), tensor.name
            assert abs(weights.mean()) < 0.1 * weights.std()
        elif tensor.name.endswith("norm.weight"):
            assert (tensor.data == 1).all()


def test_seed_decides_every_byte(tree: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.gguf" for i in range(3)]
    for file, seed in zip(files, "112", strict=True):
        assert synth(tree, file, "--ratio", "0.8", "--seed", seed).exit_code == 0
    first, second, third = (file.read_bytes() for file in files)
    assert first == second
    assert first != third
    data = {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(files[0]).tensors}
    assert data["blk.0.ffn_gate.lr_b.weight"] != data["blk.0.ffn_up.lr_b.weight"]
    assert data["blk.0.ffn_in.skip_mask"] != data["blk.1.ffn_in.skip_mask"]


@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_plan_counts_what_is_written(tree: Path, tmp_path: Path, ratio: float) -> None:
    planned = plan(TINY, GGMLQuantizationType.Q4_0, ratio, seed=0)
    written = []
    write(planned, tmp_path / "model.gguf", tree, advance=written.append)
    reader = GGUFReader(tmp_path / "model.gguf")
    size = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    assert planned.nbytes == sum(size.values())
    assert planned.bytes_per_token == sum(size.values()) - size["token_embd.weight"]
    dense = 2 * sum(m * n for m, n in LAYERS.values())
    assert planned.kept == planned.linear_parameters / dense
    owners = fmt.read_owners(reader)
    assert planned.linear_parameters == (sum(owner.parameters for owner in owners) if owners else dense)
    constant = ("norm.weight", "rope_freqs.weight", "skip_mask")
    assert sum(written) == sum(nbytes for name, nbytes in size.items() if not name.endswith(constant))


@pytest.mark.parametrize("name", list(MODELS))
def test_table_is_consistent(name: str) -> None:
    model = MODELS[name]
    assert model.name == name
    assert model.n_head % model.n_head_kv == 0
    # The graphs of llama and qwen2 read the attention's output as n_embd values.
    assert model.n_head * model.head_dim == model.n_embd
    assert model.architecture in {"llama", "qwen2"}
    assert model.qkv_bias == (model.architecture == "qwen2")
    assert model.n_embd % 32 == model.n_ff % 32 == 0


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_published_parameter_totals(name: str, published: int) -> None:
    assert plan(MODELS[name], GGMLQuantizationType.Q8_0, 1.0, seed=0).parameters == published


def test_weights_off_the_block_are_f16() -> None:
    planned = plan(MODELS["qwen2.5-0.5b"], GGMLQuantizationType.Q4_K, 0.6, seed=0)
    types = {tensor.name: tensor.type.name for tensor in planned.tensors}
    assert types["token_embd.weight"] == "F16"  # 896 columns
    assert types["blk.0.attn_in.lr_a.weight"] == "F16"  # 896 - 256
    assert types["blk.0.attn_q.lr_b.weight"] == "Q4_K"
    assert types["blk.0.ffn_down.lr_a.weight"] == "Q4_K"  # 4864 - 512
    fallen = {tensor.name for tensor in planned.fallbacks}
    assert fallen == {name for name, type_ in types.items() if type_ == "F16"}


def test_rope_factors_are_llama_3s() -> None:
    expected = []
    for i in range(0, 64, 2):
        wavelength = 2 * math.pi * 500000.0 ** (i / 64)
        if wavelength < 8192 / 4:
            expected.append(1.0)
        elif wavelength > 8192 / 1:
            expected.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 32 + smooth))
    factors = rope_factors(RopeScaling(32.0, 1.0, 4.0, 8192), 64, 500000.0)
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt-5", [], "llama-3.2-1b, llama-3.2-3b, qwen2.5-0.5b, qwen2.5-1.5b, tinyllama-1.1b"),
        ("tiny", ["--ratio", "0"], "above 0 and at most 1"),
        ("tiny", ["--ratio", "1.01"], "above 0 and at most 1"),
        ("tiny", ["--ratio", "nan"], "above 0 and at most 1"),
        ("tiny", ["--ratio", "0.01"], "blk.0.attn_in: no rank of Q8_0 (a multiple of 32)"),
        ("tiny", ["--levels", "0.01,0.5"], "keeps a ratio of 0.01 or less; choose a larger first level"),
        ("tiny", ["--levels", "0.5,0.51"], "fits between the levels 0.5 and 0.51; choose others or a"),
        ("tiny", ["--levels", "0.5"], "--levels needs 2 to 8 rising ratios"),
        ("tiny", ["--levels", "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"], "--levels needs 2 to 8 rising ratios"),
        ("tiny", ["--levels", "0.5,1"], "must be below 1"),
        ("tiny", ["--levels", "0,0.5"], "above 0 and at most 1"),
        ("tiny", ["--levels", "low,high"], "--levels is 'low,high'; give numbers with commas between them."),
        ("tiny", ["--levels", "0.5,0.7", "--ratio", "0.8"], "leave out --ratio"),
        ("tiny", ["--quant", "Q4_Z"], "Q4_0"),
        ("tiny", ["--quant", "I32"], "'I32' is not a type"),
        ("llama-3.2-1b", [], "ggml-vocab-llama-bpe.gguf is missing"),
    ],
)
def test_bad_input(tree: Path, tmp_path: Path, name: str, options: list[str], message: str) -> None:
    out = tmp_path / "out" / "model.gguf"
    out.parent.mkdir()
    result = synth(tree, out, *options, name=name)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(out.parent.iterdir())


def test_existing_output(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("precious")
    result = synth(tree, out)
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert out.read_text() == "precious"
    assert synth(tree, out, "--force").exit_code == 0
    assert shapes(GGUFReader(out)).keys() >= OTHERS.keys()


def test_failed_write_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.gguf"
    out.parent.mkdir()

    def full(nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        write(plan(TINY, weight_type("q8_0"), 1.0, seed=0), out, tree, advance=full)
    assert not list(out.parent.iterdir())
    with pytest.raises(UserError, match="does not exist; create it first"):
        write(plan(TINY, weight_type("q8_0"), 1.0, seed=0), tmp_path / "missing" / "model.gguf", tree)
