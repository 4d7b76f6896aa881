"""`runtime selftest`: the stored logits are right, a sound build passes, and a broken one is named."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conversion import multiplied_out, tensors
from gguf import GGUFReader
from gguf_edit import GGUF, Tensor

from skipcat_edge.cli import main
from skipcat_edge.format import field_value, parse_weight_name, read_owners
from skipcat_edge.runtime import selftest
from skipcat_edge.runtime.check import runtime_status

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.runtime

ROOT = Path(__file__).resolve().parent.parent
TYPES = list(selftest.TOLERANCES)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["runtime", "selftest", "--threads", "1", *arguments])


def problems(result: Result) -> dict[str, str]:
    """The models that failed, each with its sentence; every one of them is printed."""
    found = {row["model"]: row["problem"] for row in json.loads(result.stdout) if row["problem"]}
    assert result.exit_code == (1 if found else 0), result.output
    assert all(problem in result.stderr.splitlines() for problem in found.values())
    return found


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored data, which the command reads instead."""
    copy = tmp_path / "golden"
    shutil.copytree(selftest.GOLDEN, copy)
    monkeypatch.setattr(selftest, "GOLDEN", copy)
    return copy


def stored(directory: Path) -> dict[str, np.ndarray]:
    with np.load(directory / selftest.LOGITS) as file:
        return dict(file)


# The data


def test_the_data_is_small_and_in_the_package() -> None:
    folder = resources.files("skipcat_edge.runtime") / "golden"
    files = {file.name: len(file.read_bytes()) for file in folder.iterdir() if file.name != ".gitignore"}
    assert set(files) == {selftest.LOGITS, *(f"{name}.gguf" for name in TYPES)}
    assert sum(files.values()) < 1_500_000
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    packed = {path.name for pattern in settings["package-data"]["skipcat_edge.runtime"]
              for path in (ROOT / "skipcat_edge" / "runtime").glob(pattern)}
    assert packed == set(files)


def test_git_does_not_ignore_the_data() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    paths = [str(path) for path in selftest.GOLDEN.iterdir()]
    done = subprocess.run([git, "-C", str(ROOT), "check-ignore", *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("name", TYPES)
def test_every_form_is_there(name: str) -> None:
    reader = GGUFReader(selftest.GOLDEN / f"{name}.gguf")
    owners = read_owners(reader)
    forms = {(len(owner.members) > 1, owner.skip) for owner in owners}
    # a rank of whole K-quant blocks leaves no input of 256 for the rest
    assert forms == ({(True, False), (False, True)} if name == "Q4_K"
                     else {(shared, skip) for shared in (True, False) for skip in (True, False)})
    assert any(parse_weight_name(tensor.name) for tensor in reader.tensors)
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2} == {name}


@pytest.mark.parametrize("name", TYPES)
def test_the_logits_are_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    transformers = pytest.importorskip("transformers")
    path = selftest.GOLDEN / f"{name}.gguf"
    reader, arrays = GGUFReader(path), tensors(path) | multiplied_out(path)

    def key(name: str) -> Any:
        return field_value(reader, f"llama.{name}")

    heads, heads_kv, size = (
        key("attention.head_count"), key("attention.head_count_kv"), key("attention.key_length"))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=key("vocab_size"), hidden_size=key("embedding_length"), head_dim=size,
        intermediate_size=key("feed_forward_length"), num_hidden_layers=key("block_count"),
        num_attention_heads=heads, num_key_value_heads=heads_kv, rms_norm_eps=key(
            "attention.layer_norm_rms_epsilon"), rope_theta=key("rope.freq_base"), tie_word_embeddings=True,
    )).eval().double()

    def halves(W: np.ndarray) -> np.ndarray:
        """A head's pairs are neighbours in the file; transformers has their halves one after the other."""
        return W.reshape(-1, size // 2, 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)

    block = model.model.layers[0]
    attention, ffn = block.self_attn, block.mlp
    places = {
        "token_embd": model.model.embed_tokens, "output_norm": model.model.norm,
        "blk.0.attn_norm": block.input_layernorm, "blk.0.ffn_norm": block.post_attention_layernorm,
        "blk.0.attn_q": attention.q_proj, "blk.0.attn_k": attention.k_proj, "blk.0.attn_v": attention.v_proj,
        "blk.0.attn_output": attention.o_proj, "blk.0.ffn_gate": ffn.gate_proj, "blk.0.ffn_up": ffn.up_proj,
        "blk.0.ffn_down": ffn.down_proj,
    }  # fmt: skip
    with torch.no_grad():
        for place, module in places.items():
            W = arrays[f"{place}.weight"]
            if place[-6:] in ("attn_q", "attn_k"):
                W = halves(W)
            module.weight.copy_(torch.from_numpy(W.astype(np.float64)))
        data = stored(selftest.GOLDEN)
        tokens = torch.from_numpy(data[selftest.TOKENS].astype(np.int64))
        expected = model(tokens[None]).logits[0].numpy()
    assert len(tokens) % 2 and data[name].shape == (len(tokens), key("vocab_size"))
    distances = np.linalg.norm(data[name] - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert distances.max() < 1e-4


# The verdict


def test_this_build_passes() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    rows = {line.split()[0]: line for line in lines[2:]}
    assert list(rows) == TYPES and all(row.endswith(" ok") for row in rows.values())
    assert "shared, shared Skip, single, single Skip, dense" in rows["Q4_0"]
    assert len({len(line) for line in lines}) == 1
    assert result.stderr == ""


def test_json_of_a_build_that_passes() -> None:
    result = run("--json")
    assert problems(result) == {}
    for row in json.loads(result.stdout):
        assert 0 < row["prompt_error"] < 0.7 * row["tolerance"]
        assert 0 < row["decode_error"] < 0.7 * row["tolerance"]
        assert row["tokens_ok"] == row["tokens"] > selftest.DECODED


@pytest.mark.parametrize("name", ["F16", "Q4_K"])
def test_other_logits_fail(name: str, golden: Path) -> None:
    arrays = stored(golden)
    # one token of the prompt, by twice what is allowed, in a direction that changes no argmax
    arrays[name][20] *= 1 + 2 * selftest.TOLERANCES[name]
    np.savez(golden / selftest.LOGITS, **arrays)  # type: ignore[arg-type]
    found = problems(run("--json"))
    assert list(found) == [name]
    assert f"{name} gives wrong logits (prompt error " in found[name]
    assert "decode" not in found[name] and "runtime build --install" in found[name]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_other_weights_fail(name: str, golden: Path) -> None:
    path = golden / f"{name}.gguf"
    changed = GGUF.read(path)
    tensor = changed.tensors["blk.0.ffn_down.lr_a.weight"]
    changed.tensors["blk.0.ffn_down.lr_a.weight"] = Tensor.zeros(tensor.shape, tensor.type)
    changed.write(path)
    result = run()
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines() if line.endswith("FAILED")] == [name]
    first, last = result.stderr.splitlines()
    assert first.startswith(f"{name} gives wrong logits (prompt error ") and ", decode error " in first
    assert last == selftest.ADVICE


def test_every_matrix_matters(tmp_path: Path) -> None:
    names: dict[str, str] = {}
    for name in TYPES:
        sound = GGUF.read(selftest.GOLDEN / f"{name}.gguf")
        for tensor, stored_tensor in sound.tensors.items():
            if len(stored_tensor.shape) == 2:
                changed = sound.copy()
                changed.tensors[tensor] = Tensor.zeros(stored_tensor.shape, stored_tensor.type)
                names[str(changed.write(tmp_path / f"{name} without {tensor}"))] = name
    data = stored(selftest.GOLDEN)
    for path, answers in selftest._run(names, data[selftest.TOKENS].tolist(), threads=1).items():
        outcome = selftest._compare(names[path], (), data[names[path]], answers)
        assert outcome.prompt_error is not None and outcome.decode_error is not None
        assert min(outcome.prompt_error, outcome.decode_error) > 3 * outcome.tolerance, path
        assert outcome.problem is not None and "gives wrong logits" in outcome.problem


def test_logits_that_are_not_numbers_fail(golden: Path) -> None:
    path = golden / "F16.gguf"
    broken = GGUF.read(path)
    norm = broken.tensors["output_norm.weight"]
    broken.tensors["output_norm.weight"] = Tensor.of(np.full(norm.shape, np.nan, np.float32))
    broken.write(path)
    result = run("--json")
    assert "prompt error not a number, decode error not a number" in problems(result)["F16"]
    assert json.loads(result.stdout)[0]["prompt_error"] is None


def test_next_tokens_count_where_the_lead_is_clear() -> None:
    expected = np.zeros((10, 4), np.float32)
    expected[:, 0], expected[:, 1] = 1.0, 0.5
    expected[5:, 1] = 0.999  # within the tolerance
    found = expected.copy()
    found[:, 1] = 1.0001 * found[:, 0]  # the second is ahead everywhere
    answers = selftest._Answers("decode", {"prompt": found.tolist(), "decode": expected[:9].tolist()})
    outcome = selftest._compare("Q4_0", (), expected, answers)
    assert (outcome.tokens, outcome.tokens_ok) == (10, 5)
    assert outcome.problem is not None and "5 of 10 next tokens differ" in outcome.problem


# Builds that are broken, stock or missing


WORKER = """
import json, os, signal, sys
from skipcat_edge import session
from skipcat_edge.runtime import check, selftest_worker

kill = lambda name: os.kill(os.getpid(), getattr(signal, name))
{}
selftest_worker.serve(selftest_worker.Job(**json.loads(sys.stdin.readline())), sys.stdout)
"""
BUILD = "build it here with `skipcat-edge runtime build --install`."
LACKS = f": this build uses instructions that this CPU lacks; {BUILD}"


def use_worker(monkeypatch: pytest.MonkeyPatch, statements: str) -> None:
    """Run `statements` before the worker's own code, in its process."""
    monkeypatch.setattr(selftest, "WORKER", (sys.executable, "-c", WORKER.format(statements)))


@pytest.mark.parametrize(("name", "why"), [
    ("SIGILL", LACKS), ("SIGSEGV", f"; {BUILD}"), ("SIGKILL", "; free some memory and try again."),
])
def test_a_crash_is_a_sentence(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_worker(monkeypatch, f"""
real = selftest_worker.one_by_one
def crash(llama, tokens):
    return kill({name!r}) if "Q4_0" in llama.model_path else real(llama, tokens)
selftest_worker.one_by_one = crash
""")
    result = run("--json")
    assert problems(result) == {"Q4_0": f"The runtime crashed with {name} while decoding in Q4_0{why}"}
    row = json.loads(result.stdout)[TYPES.index("Q4_0")]
    assert row["prompt_error"] < row["tolerance"] and row["decode_error"] is None


def test_a_crash_while_loading_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    use_worker(monkeypatch, """
real = session.open_model
def crash(path, **options):
    if path.stem == "F16":
        print("GGML_ASSERT(x) failed", file=sys.stderr)
        kill("SIGABRT")
    return real(path, **options)
session.open_model = crash
""")
    said = "The runtime crashed with SIGABRT (GGML_ASSERT(x) failed) while loading F16"
    assert problems(run("--json")) == {"F16": f"{said}; {BUILD}"}


@pytest.mark.parametrize(("statement", "said"), [
    ("kill('SIGILL')", f"The runtime crashed with SIGILL while being imported{LACKS}"),
    ("sys.exit('no such thing')",
     f"The runtime ended with exit code 1 (no such thing) while being imported; {BUILD}"),
    ("check._call = lambda *_: None", "is not patched; run `skipcat-edge runtime build --install`."),
    ("check.import_module = lambda name: __import__('no_such_module')",
     "The runtime is missing: llama_cpp cannot be imported (No module named 'no_such_module'); run "
     "`skipcat-edge runtime build --install`."),
])
def test_no_runtime_is_a_sentence(statement: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_worker(monkeypatch, statement)
    result = run()
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ") and result.stderr.endswith(f"{said}\n")
    assert len(result.stderr.splitlines()) == 1


def test_a_worker_that_hangs_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    use_worker(monkeypatch, """
import time
print('{"ready": true}', flush=True)
time.sleep(600)
""")
    monkeypatch.setattr(selftest, "_TIMEOUT_S", 2)
    monkeypatch.setattr(selftest, "TOLERANCES", {"Q8_0": selftest.TOLERANCES["Q8_0"]})
    found = problems(run("--json"))
    assert found == {"Q8_0": f"The runtime did not answer for 2 seconds while loading Q8_0; {BUILD}"}


def test_a_model_that_is_refused_is_a_sentence(golden: Path) -> None:
    path = golden / "Q8_0.gguf"
    broken = GGUF.read(path)
    del broken.tensors["blk.0.attn_norm.weight"]
    broken.write(path)
    assert "attn_norm" in problems(run("--json"))["Q8_0"]


@pytest.mark.parametrize("name", [selftest.LOGITS, "Q4_K.gguf"])
def test_damaged_data_is_a_sentence(name: str, golden: Path) -> None:
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:5000]), Path.unlink):
        damage(golden / name)
        result = run()
        assert (result.exit_code, result.stdout) == (2, "")
        assert "missing or damaged" in result.stderr and "install skipcat-edge again" in result.stderr


BROKEN = {"x86_64": {"return": b"\xc3", "SIGILL": b"\x0f\x0b"},
          "aarch64": {"return": b"\xc0\x03\x5f\xd6", "SIGILL": bytes(4)}}


def break_function(library: Path, function: str, code: bytes) -> None:
    """Write `code` over the first instructions of `function`."""
    address = ctypes.cast(getattr(ctypes.CDLL(str(library)), function), ctypes.c_void_p).value
    assert address is not None
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if start <= address < end:
            offset = address - start + int(fields[2], 16)
            break
    data = bytearray(library.read_bytes())
    data[offset : offset + len(code)] = code
    library.unlink()  # this process has the old one mapped
    library.write_bytes(data)


GATHER, MUL_MAT = "ggml_compute_forward_skip_gather", "ggml_compute_forward_skip_mul_mat"


@pytest.fixture
def break_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes a kernel return at once, or die, in the library that the self-test runs."""
    from skipcat_edge.runtime.library import library_dir

    if sys.platform != "linux" or platform.machine() not in BROKEN:
        pytest.skip(f"knows no instructions of {platform.machine()}")
    libraries = tmp_path / "lib"
    shutil.copytree(library_dir(), libraries)
    library = libraries / "libggml-cpu.so"
    if not library.is_file():
        pytest.skip("the CPU backend is in variants")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(libraries))
    return lambda kernel, how: break_function(library, kernel, BROKEN[platform.machine()][how])


@pytest.mark.parametrize("how", ["return", "SIGILL"])
@pytest.mark.parametrize(("kernel", "fused"), [(GATHER, "0"), (MUL_MAT, "1")])
def test_a_broken_kernel_is_found(
    kernel: str, fused: str, how: str, break_kernel: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_kernel(kernel, how)
    monkeypatch.setenv("SKIPCAT_FUSED", fused)
    found = problems(run("--json"))
    assert list(found) == TYPES
    for name, problem in found.items():
        assert (f"crashed with {signal.SIGILL.name} while running a prompt in {name}" in problem
                if how == "SIGILL" else f"{name} gives wrong logits" in problem)


@pytest.mark.parametrize(("kernel", "fused"), [(GATHER, "1"), (MUL_MAT, "0")])
def test_the_form_of_the_graph_can_be_forced(
    kernel: str, fused: str, break_kernel: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kernel(kernel, "SIGILL")
    monkeypatch.setenv("SKIPCAT_FUSED", fused)
    assert problems(run("--json")) == {}


@pytest.mark.parametrize("fused", [None, "yes"])
def test_the_form_of_the_graph_that_is_chosen(
    fused: str | None, break_kernel: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused is None:
        monkeypatch.delenv("SKIPCAT_FUSED", raising=False)
    else:
        monkeypatch.setenv("SKIPCAT_FUSED", fused)
    if "AVX2" not in runtime_status().cpu_features:
        pytest.skip("other types are repacked")
    break_kernel(GATHER, "return")  # prompts of types that are not repacked
    assert list(problems(run("--json"))) == ["F16", "Q8_0"]
    break_kernel(MUL_MAT, "return")  # decoding too, and repacked prompts
    assert list(problems(run("--json"))) == TYPES


def test_nothing_heavy_is_loaded() -> None:
    code = ("from skipcat_edge.runtime.selftest import selftest\nselftest(1)\nimport sys\n"
            "print({'torch', 'transformers', 'llama_cpp', 'rich'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    code = "import skipcat_edge.commands.runtime, sys\nprint({'numpy', 'gguf', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
