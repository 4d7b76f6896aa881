"""Calibration with the model's blocks on several devices: the same bytes as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import run
from conversion import DEMO, convert_model

torch = pytest.importorskip("torch", reason="the converter needs torch")
transformers = pytest.importorskip("transformers", reason="the converter needs transformers")
accelerate = pytest.importorskip("accelerate", reason="needs the extra convert")


pytestmark = pytest.mark.runtime

SOURCES = ("llama-gqa", "qwen3")


@pytest.fixture(scope="module", params=SOURCES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three small blocks, its dense GGUF, and the low-rank file that one device makes."""
    from test_architectures import random_model

    folder: Path = tmp_path_factory.mktemp("source")
    random_model(request.param, folder / "model")
    convert_model(folder / "model", folder / "base.gguf", ratio=1.0)
    convert(folder, "here.gguf")
    return folder


def convert(folder: Path, name: str, **options: Any) -> bytes:
    """With statistics of its own, two-sided and compensated: all that runs the model."""
    out = folder / name
    convert_model(folder / "model", out, base=folder / "base.gguf", calib_tokens=512, method="auto",
                  quant="Q8_0", calibration=DEMO / "calibration.txt", force=True, **options)
    return out.read_bytes()


def spread(monkeypatch: pytest.MonkeyPatch, devices: list[str]) -> None:
    """Let `auto` place the blocks on `devices` in turn, each with hooks as if the next were elsewhere."""
    known = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, device_map: str | None = None, **kwargs: Any) -> Any:
        model = known(*args, **kwargs)
        assert device_map == "auto"
        places = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.ModuleList):
                places |= {f"{name}.{index}": devices[index % len(devices)] for index in range(len(module))}
            elif not list(module.children()) and not any(name.startswith(f"{place}.") for place in places):
                places[name] = devices[0]
        return accelerate.dispatch_model(model, places, main_device=devices[0], force_hooks=True)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)


def test_auto_without_a_gpu_is_the_cpu(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert convert(folder, "auto.gguf", device_map="auto") == (folder / "here.gguf").read_bytes()


def test_hooked_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks' forward is accelerate's, which moves what enters them."""
    calls = []
    known = accelerate.hooks.AlignDevicesHook.pre_forward

    def pre_forward(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return known(self, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.AlignDevicesHook, "pre_forward", pre_forward)
    spread(monkeypatch, ["cpu"])
    assert convert(folder, "hooked.gguf", device_map="auto") == (folder / "here.gguf").read_bytes()
    blocks = [name for name in calls if name in ("LlamaDecoderLayer", "Qwen3DecoderLayer")]
    # forwards and on the way back, in the dense and in the compressed flow
    assert len(blocks) > 4 * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = convert(folder, "one.gguf", device="cuda")
    spread(monkeypatch, ["cuda:0", "cuda:1"])
    assert convert(folder, "two.gguf", device="cuda", device_map="auto") == one


@pytest.mark.parametrize("places", [{"": "disk"}, {"model.layers.0": 0, "model.layers.1": "cpu"}])
def test_weights_that_fit_nowhere(folder: Path, places: dict[str, Any], tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    known = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, device_map: str | None = None, **kwargs: Any) -> Any:
        model = known(*args, **kwargs)
        model.hf_device_map = places
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    result = run("convert", folder / "model", "-o", tmp_path / "out.gguf", "--base", folder / "base.gguf",
                 "--calibration", DEMO / "calibration.txt", "--device-map", "auto")
    assert result.exit_code == 2 and "too little memory" in result.stderr
    assert not (tmp_path / "out.gguf").exists()
