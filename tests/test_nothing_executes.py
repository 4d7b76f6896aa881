"""Model directories and jobs that run a program where they are read carelessly: convert reads none of it.

Each trap is shown to spring first.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from conversion import DEMO
from traps import Trap, copy_of

torch = pytest.importorskip("torch", reason="the converter needs torch")
transformers = pytest.importorskip("transformers", reason="the converter needs transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from skipcat_converter import compression, job_blocks  # noqa: E402
from skipcat_converter.source_files import hub_patterns  # noqa: E402
from skipcat_converter.source_model import load_source  # noqa: E402
from skipcat_converter.without_model_code import without_model_code  # noqa: E402

from skipcat_edge.errors import UserError  # noqa: E402
from skipcat_edge.runtime.source import stock_tree  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that nothing is wrong with."""
    from test_architectures import random_model

    folder = tmp_path_factory.mktemp("source") / "tiny"
    random_model("llama-gqa", folder)
    return folder


def convert(source: object, folder: Path, *options: object, stdin: str | None = None) -> Any:
    """`convert` to a dense file in `folder`, of which nothing stays where it fails."""
    out = folder / "out.gguf"
    result = run("convert", source, "-o", out, "--ratio", 1, "--quant", "F16", *options, stdin=stdin)
    assert (result.exit_code == 0) == out.exists(), result.output
    if result.exit_code:
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        assert not [*folder.glob(".out.gguf*")]
    return result


def plain(line: str, folder: Path, **environment: str) -> None:
    """Run Python as a careless program would; whatever comes of it."""
    caches = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", line], env={**os.environ, **caches, **environment}, input="y\n",
                   capture_output=True, text=True, check=False)


def pickled(model: Path, folder: Path, *extra: Any) -> Path:
    """The same weights as a pickle, with more objects in it."""
    copy = copy_of(model, folder, "*.safetensors")
    weights: dict[str, Any] = dict(load_file(model / "model.safetensors"))
    torch.save(weights | {f"extra.{place}": each for place, each in enumerate(extra)},
               copy / "pytorch_model.bin")
    return copy


# Pickles


def test_a_pickle_is_refused_and_not_run(model: Path, trap: Trap, tmp_path: Path) -> None:
    source = pickled(model, tmp_path / "pickled", trap.pickled())
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert trap.was_sprung()
    result = convert(source, tmp_path)
    assert "pytorch_model.bin" in result.output and "--allow-pickle" in result.output
    with pytest.raises(UserError, match="--allow-pickle"):
        load_source(source, "cpu")
    assert not trap.was_sprung()
    # allowed, it is still read as numbers only, by llama.cpp's converter and by transformers
    assert "cannot convert" in convert(source, tmp_path, "--allow-pickle").output
    with pytest.raises(UserError, match="cannot be loaded"):
        load_source(source, "cpu", allow_pickle=True)
    assert not trap.was_sprung()


def test_an_allowed_pickle_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    bytes_of = []
    for source, options in ((model, ()), (pickled(model, tmp_path / "tiny"), ("--allow-pickle",))):
        assert convert(source, tmp_path, *options, "--force").exit_code == 0
        bytes_of.append((tmp_path / "out.gguf").read_bytes())
    assert bytes_of[0] == bytes_of[1]
    theirs = load_source(tmp_path / "tiny", "cpu", allow_pickle=True).module.state_dict()
    ours = load_source(model, "cpu").module.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_pickles_beside_safetensors_are_not_looked_at(model: Path, trap: Trap, tmp_path: Path) -> None:
    source = copy_of(model, tmp_path / "both")
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "mask_embedding.pt", "a.pkl"):
        (source / name).write_bytes(pickle.dumps(trap.pickled()))
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "other/model"}', "utf-8")
    pickle.loads((source / "training_args.bin").read_bytes())
    assert trap.was_sprung()
    with without_model_code(source) as safe:
        names = {file.name for file in safe.folder.iterdir()}
    assert names == {file.name for file in model.iterdir()}
    assert convert(source, tmp_path, "--allow-pickle").exit_code == 0
    assert not trap.was_sprung()


@pytest.mark.parametrize("part", ["../out/model.safetensors", "/etc/passwd", "pytorch_model.bin", 3])
def test_an_index_names_only_its_own_folders_weights(part: object, model: Path, trap: Trap,
                                                     tmp_path: Path) -> None:
    source = copy_of(model, tmp_path / "indexed", "model.safetensors")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(trap.pickled()))
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": part}}), "utf-8")
    assert "model.safetensors.index.json" in convert(source, tmp_path).output
    assert not trap.was_sprung()


def test_no_weights_at_all(model: Path, tmp_path: Path) -> None:
    source = copy_of(model, tmp_path / "empty", "model.safetensors")
    assert "has no weights as safetensors" in convert(source, tmp_path).output


def test_no_code_is_fetched_from_the_hub() -> None:
    from huggingface_hub.utils import filter_repo_objects

    read = ["README.md", "LICENSE", "config.json", "1_Pooling/config.json", "tokenizer.model", "vocab.txt",
            "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    pickles = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    unread = ["modeling.py", "training_args.bin", "adapter_model.bin", "optimizer.pt", "a.pkl", "x.gguf",
              "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "setup.sh"]
    for allowed, expected in ((False, {*read}), (True, {*read, *pickles})):
        found = {*filter_repo_objects([*read, *pickles, *unread], allow_patterns=hub_patterns(allowed))}
        # small, and not read without the weights
        assert found - {"pytorch_model.bin.index.json"} == expected - {"pytorch_model.bin.index.json"}


# A model's own code


@pytest.fixture
def foreign(model: Path, trap: Trap, tmp_path: Path) -> Path:
    """A model that transformers does not know, which brings its own code for everything."""
    source = copy_of(model, tmp_path / "foreign", "*.safetensors")
    # what llama.cpp's converter wants to see before it loads the tokenizer
    save_file({"transformer.wte.weight": torch.zeros(512, 64)}, source / "model.safetensors")
    for name, kinds in (("config.json", ("AutoConfig", "AutoModel", "AutoModelForCausalLM")),
                        ("tokenizer_config.json", ("AutoTokenizer",))):
        value = json.loads((source / name).read_text("utf-8"))
        value |= {"auto_map": dict.fromkeys(kinds, "code.Own")}
        if "AutoTokenizer" in kinds:
            value |= {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}
        else:
            value |= {"model_type": "foreign", "architectures": ["QWenLMHeadModel"]}
        (source / name).write_text(json.dumps(value), "utf-8")
    (source / "code.py").write_text(f"{trap.python}\nfrom transformers import PretrainedConfig\n"
                                    "class Own(PretrainedConfig):\n    model_type = 'foreign'\n", "utf-8")
    return source


def test_transformers_runs_none_of_a_models_code(foreign: Path, trap: Trap, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    load = f"import transformers; transformers.AutoConfig.from_pretrained({str(foreign)!r}"
    plain(f"{load}, trust_remote_code=True)", tmp_path)
    assert trap.was_sprung()
    plain(f"{load})", tmp_path)  # asks, and gets the answer y
    assert trap.was_sprung()
    for name in ("TRUST_REMOTE_CODE", "HF_TRUST_REMOTE_CODE", "HF_DATASETS_TRUST_REMOTE_CODE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115, PTH123
    with pytest.raises(UserError, match="Python code that comes with it, which is never run") as told:
        load_source(foreign, "cpu")
    assert str(foreign) in told.value.message and "skipcat-model-" not in told.value.message
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.\n" * 100, "utf-8")
    result = run("convert", foreign, "-o", tmp_path / "low.gguf", "--calibration", text, stdin="y\n")
    assert result.exit_code == 2 and not (tmp_path / "low.gguf").exists()
    assert not trap.was_sprung()


def test_llama_cpps_converter_runs_none_of_it(foreign: Path, trap: Trap, tmp_path: Path) -> None:
    script = stock_tree() / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    words = [str(script), str(foreign), "--outfile", str(tmp_path / "plain.gguf")]
    path = str(script.parent / "gguf-py")
    plain(f"import runpy, sys; sys.argv = {words!r}; sys.path.insert(0, {str(script.parent)!r}); "
          f"runpy.run_path({str(script)!r}, run_name='__main__')", tmp_path, PYTHONPATH=path)
    assert trap.was_sprung()
    assert "cannot convert" in convert(foreign, tmp_path, stdin="y\n").output
    assert not trap.was_sprung()


def test_a_known_model_needs_none_of_its_code(model: Path, trap: Trap, tmp_path: Path) -> None:
    source = copy_of(model, tmp_path / "tiny")
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["auto_map"] = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "other/repository--code.Own"}
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    (source / "code.py").write_text(trap.python, "utf-8")
    assert convert(source, tmp_path).exit_code == 0
    written = (tmp_path / "out.gguf").read_bytes()
    assert convert(model, tmp_path, "--force").exit_code == 0
    assert (tmp_path / "out.gguf").read_bytes() == written
    assert not trap.was_sprung()


def test_no_compiled_code_of_the_hub(model: Path, trap: Trap, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("transformers.integrations.hub_kernels")
    monkeypatch.setattr(kernels, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda *_: True)

    def get_kernel(*_: object, **__: object) -> None:
        exec(trap.python)
        raise RuntimeError

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    source = copy_of(model, tmp_path / "kernel")
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["attn_implementation"] = "anybody/kernel"
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(Exception):  # noqa: B017  it is get_kernel's
        transformers.AutoModelForCausalLM.from_pretrained(source)
    assert trap.was_sprung()
    assert load_source(source, "cpu").module.config._attn_implementation != "anybody/kernel"
    assert not trap.was_sprung()


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\xff"])
def test_a_configuration_that_is_not_json(content: str, model: Path, tmp_path: Path) -> None:
    source = copy_of(model, tmp_path / "broken")
    (source / "config.json").write_text(content, "latin-1")
    assert "config.json cannot be read as JSON" in convert(source, tmp_path).output


def test_only_files_are_opened(model: Path, tmp_path: Path) -> None:
    source = copy_of(model, tmp_path / "pipes")
    os.mkfifo(source / "vocab.txt")  # who opens it waits forever
    (source / "merges.txt").symlink_to("/dev/zero")
    (source / "lost.json").symlink_to("nowhere")
    with without_model_code(source) as safe:
        names = {file.name for file in safe.folder.iterdir()}
    assert names == {file.name for file in model.iterdir()}


# Names


@pytest.mark.parametrize("name", ["$(touch sprung)`touch sprung`; touch sprung #", "--outfile=x"])
def test_a_directorys_name_is_no_command(name: str, model: Path, trap: Trap, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "touch" in name:
        subprocess.run(["sh", "-c", f"ls {name}"], capture_output=True, check=False)
        assert trap.was_sprung()
    copy_of(model, tmp_path / name)
    result = convert(f"./{name}", tmp_path)
    assert result.exit_code == 0, result.output
    # what the card says to type
    card = (tmp_path / "out.md").read_text("utf-8")
    assert name.replace("`", "'") in card
    assert not trap.was_sprung()


# Jobs and statistics


def poison_array(path: Path, trap: Trap) -> None:
    with path.open("wb") as file:
        np.savez(file, told=np.array([trap.pickled()], object))


def poison_file(path: Path, trap: Trap) -> None:
    path.write_bytes(pickle.dumps(trap.pickled()))


POISONS = [poison_array, poison_file]


def load_carelessly(path: Path) -> None:
    loaded = np.load(path, allow_pickle=True)
    if hasattr(loaded, "files"):
        loaded["told"]


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_job(poison: Callable[[Path, Trap], None], model: Path, trap: Trap, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "calibration.txt").read_text("utf-8")[:2000], "utf-8")
    out = tmp_path / "out.gguf"
    command = ("convert", model, "-o", out, "--calibration", text, "--no-grad", "--quant", "F16")

    def keep_and_stop(*arguments: Any) -> None:
        job_blocks.keep_stored(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / ".out.gguf.job" / "output"))

    with monkeypatch.context() as patched:
        patched.setattr(compression, "keep_stored", keep_and_stop)
        assert run(*command).exit_code == 2
    (stored, *_) = sorted((tmp_path / ".out.gguf.job").glob("factors-*.npz"))
    poison(stored, trap)
    load_carelessly(stored)
    assert trap.was_sprung()
    result = run(*command)
    assert result.exit_code == 2 and stored.name in result.output and "begins anew" in result.output
    assert not trap.was_sprung()
    assert run(*command).exit_code == 0


def test_poisoned_statistics(model: Path, trap: Trap, tmp_path: Path) -> None:
    stats = tmp_path / "statistics"
    for poison in POISONS:
        poison(stats, trap)
        load_carelessly(stats)
        assert trap.was_sprung()
        result = run("convert", model, "-o", tmp_path / "out.gguf", "--stats", stats)
        assert result.exit_code == 2 and "does not hold calibration statistics" in result.output
        assert not trap.was_sprung()


# The source itself

_PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
_RUNNING = {"eval", "exec", "compile", "__import__"}


def faults(tree: ast.AST) -> Iterator[str]:
    """What in a module could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (f"imports {name}" for name in named if (name or "").partition(".")[0] in _PICKLING)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in _RUNNING or called in ("os.system", "os.popen", "subprocess.getoutput"):
            yield called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if called.endswith("from_pretrained") and given.get("trust_remote_code", "False") != "False":
            yield "trust_remote_code"
        if "trust_remote_code" in given and given["trust_remote_code"] != "False":
            yield "trust_remote_code"
        if given.get("allow_pickle", "False") == "True" and called in ("np.load", "numpy.load"):
            yield "numpy.load with allow_pickle"
        if given.get("shell", "False") != "False":
            yield "shell=True"
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield called


@pytest.mark.parametrize("line", [
    "import pickle", "from joblib import load", "eval(text)", "os.system(name)", "torch.load(path)",
    "torch.load(path, weights_only=False)", "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "np.load(path, allow_pickle=True)", "subprocess.run(line, shell=True)", "yaml.load(text)",
])
def test_the_search_finds_each_fault(line: str) -> None:
    assert [*faults(ast.parse(line))]


def test_no_module_runs_what_it_reads() -> None:
    modules = [*(ROOT / "converter").glob("*.py"), *(ROOT / "skipcat_edge").rglob("*.py")]
    assert len(modules) > 100
    found = {str(path.relative_to(ROOT)): [*faults(ast.parse(path.read_text("utf-8")))] for path in modules}
    assert {path: each for path, each in found.items() if each} == {}
