"""`plan`: dimensions from configs, memory, and what is recommended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run, run_json
from gguf import GGUFValueType
from gguf_edit import GGUF

from skipcat_edge import plan_memory
from skipcat_edge.device import load_device
from skipcat_edge.errors import UserError
from skipcat_edge.model_config import read_dimensions
from skipcat_edge.model_table import MODELS
from skipcat_edge.plan_memory import MemoryNeed, is_repacked, memory_need
from skipcat_edge.planner import Candidate, plan, recommend
from skipcat_edge.probe import Cost, Probe, TypeCosts
from skipcat_edge.runtime.source import stock_tree
from skipcat_edge.synth_plan import Plan as PlannedModel
from skipcat_edge.synth_plan import plan as plan_model
from skipcat_edge.weight_types import weight_type

DEMO = Path(__file__).resolve().parent.parent / "converter" / "demo" / "model"

LLAMA_1B = {  # as Meta publishes it
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
QWEN_05B = {  # without head_dim and attention_bias, as Alibaba publishes it
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip


def write_config(directory: Path, config: dict[str, Any]) -> str:
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize("config, name", [(LLAMA_1B, "llama-3.2-1b"), (QWEN_05B, "qwen2.5-0.5b")])
def test_a_config_gives_the_dimensions_of_the_table(
    tmp_path: Path, config: dict[str, Any], name: str
) -> None:
    found, known = read_dimensions(write_config(tmp_path, config)), MODELS[name]
    for field in ("n_vocab", "n_embd", "n_layer", "n_head", "n_head_kv", "head_dim", "n_ff", "context_length",
                  "tied_head", "qkv_bias", "groups"):
        assert getattr(found, field) == getattr(known, field), field


def test_a_file_gives_the_dimensions_of_its_config(demo_dense_gguf: Path, demo_low_rank_gguf: Path) -> None:
    config = read_dimensions(str(DEMO))
    for file in (demo_dense_gguf, demo_low_rank_gguf):
        found = read_dimensions(str(file))
        assert (found.groups, found.n_vocab, found.n_layer, found.tied_head) == (
            config.groups, config.n_vocab, config.n_layer, config.tied_head)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "mamba"}, "type mamba"),
    ({"hidden_size": None}, "`hidden_size` is None"),
    ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
    ({"vocab_size": "many"}, "`vocab_size` is 'many'"),
    ({"hidden_size": 10**15}, "`hidden_size` is 1000000000000000"),
    ({"model_type": "mistral", "num_key_value_heads": None}, "`num_key_value_heads` is None"),
])  # fmt: skip
def test_a_wrong_config_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_dimensions(write_config(tmp_path, {**LLAMA_1B, **change}))


def test_experts_are_refused(tmp_path: Path, demo_dense_gguf: Path) -> None:
    edited, path = GGUF.read(demo_dense_gguf), tmp_path / "experts.gguf"
    edited.set("llama.expert_count", 8, GGUFValueType.UINT32)
    edited.write(path)
    with pytest.raises(UserError, match="mixture of experts"):
        read_dimensions(str(path))


def test_context_and_prompt() -> None:
    assert plan("tinyllama-1.1b", device="rpi5").wishes.context == 2048  # what it was trained for
    for options, message in (({"context": 4096}, "trained for a context of 2,048"),
                             ({"prompt_tokens": 4096}, "does not fit")):
        with pytest.raises(UserError, match=message):
            plan("tinyllama-1.1b", device="rpi5", **options)


def test_no_source_is_one_sentence(tmp_path: Path) -> None:
    for source in (str(tmp_path), str(tmp_path / "missing.gguf"), "llama-9b", "x" * 300):
        result = run("plan", source)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr


def test_weights_and_cache_by_hand() -> None:
    model = plan_model(MODELS["llama-3.2-1b"], weight_type("Q8_0"), 1.0, 0)
    need = memory_need(model, 4000, 512, load_device("rpi4").features)
    matrices = 128256 * 2048 + 16 * (2048 * (2048 + 2 * 512) + 2048 * 2048 + 3 * 2048 * 8192)
    assert need.weights == matrices * 34 // 32 + 4 * (33 * 2048 + 32)  # norms and rotary factors in F32
    assert need.kv == 2 * 16 * 8 * 64 * 2 * 4096  # llama.cpp rounds the context up to a multiple of 256
    assert need.repacked == 0
    repacked = memory_need(model, 4000, 512, load_device("rpi5").features).repacked
    assert repacked == matrices * 34 // 32


@pytest.mark.parametrize("type_, device, expected", [
    ("Q4_0", "rpi4", False), ("Q4_0", "rpi5", True), ("Q8_0", "rpi5", True), ("F16", "rpi5", False),
    ("Q4_K", "rpi5", True), ("Q8_0", "rpi4", False),
])  # fmt: skip
def test_which_weights_are_repacked(type_: str, device: str, expected: bool) -> None:
    assert is_repacked(weight_type(type_), 64, load_device(device).features) == expected
    assert not is_repacked(weight_type(type_), 63, load_device(device).features)


def test_what_is_repacked_is_what_the_pinned_source_says() -> None:
    """Types and rows of ggml_repack_get_optimal_repack_type, by feature."""
    source = stock_tree() / "vendor/llama.cpp/ggml/src/ggml-cpu/repack.cpp"
    text = source.read_text("utf-8").split("get_optimal_repack_type(", 1)[1]
    text = text[: text.index("\n}\n")]
    features = {"avx2": "avx2", "avx512": "avx512f", "dotprod": "asimddp"}
    found = {}
    for branch in re.split(r"cur->type == GGML_TYPE_", text)[1:]:
        name = re.match(r"\w+", branch)
        assert name is not None
        check = r"ggml_cpu_has_(avx2|avx512|dotprod)\(\)[^{]*\{\s*if \(cur->ne\[1\] % (\d+)"
        found[name[0]] = {features[has]: int(rows) for has, rows in re.findall(check, branch)}
    assert found == plan_memory._REPACKED


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.parametrize("type_, ratio", [("Q8_0", 1.0), ("Q4_0", 1.0), ("Q4_0", 0.8)])
def test_memory_is_what_bench_measures(tmp_path: Path, type_: str, ratio: float) -> None:
    """Within 5 %."""
    file = tmp_path / "model.gguf"
    written = run("synth", "qwen2.5-0.5b", "-o", file, "--quant", type_, "--ratio", ratio)
    assert written.exit_code == 0, written.output
    measured = run_json("bench", file, "--prompt-tokens", 512, "--gen-tokens", 1, "--repetitions", 1,
                        "--no-bandwidth")[0]
    file.unlink()
    model = plan_model(MODELS["qwen2.5-0.5b"], weight_type(type_), ratio, 0)
    need = memory_need(model, 512, 512, load_device("host").features)
    assert need.peak == pytest.approx(measured["peak_rss_bytes"], rel=0.05)
    for part, name in ((need.repacked, "REPACK"), (need.kv, "KV")):
        assert part == pytest.approx(
            sum(size for buffer, size in measured["buffers"].items() if name in buffer), rel=0.01, abs=2**19)


def candidate(type_: str, ratio: float, *misses: str, tps: float = 100.0) -> Candidate:
    return Candidate(type_, ratio, ratio, MemoryNeed(1, 0, 0, 0, 0), tps, 1.0, 10.0, 9.0, misses)


def test_the_smallest_memory_that_is_enough() -> None:
    """Four fifths of it are for the model."""
    found = plan("llama-3.2-3b", device="rpi5")
    sold = load_device("rpi5").memory.ram_bytes
    for each in found.candidates:
        assert each.least_ram in sold
        assert next(size for size in sold if 0.8 * size >= each.memory.peak - 1) == each.least_ram
    assert len({each.least_ram for each in found.candidates}) > 1
    table = run("plan", "llama-3.2-3b", "--device", "rpi5", "--max-ram", "4GB").stdout.splitlines()
    lines = [line.strip() for line in table[2:12] if line and "─" not in line]
    titles, dense, *_, smallest = (re.split(r"\s{2,}", line) for line in lines)
    left, least = titles.index("left of 4.0 GB"), titles.index("rpi5 with")
    peak = found.candidates[-1].memory.peak
    assert (dense[titles.index("memory") :][1:3], dense[-1]) == (["-", "16 GiB"], "misses memory")
    assert (smallest[left], smallest[least]) == (f"{(4e9 - peak) / 1e9:.1f} GB", "4 GiB")


def test_the_most_bits_that_suit_are_recommended() -> None:
    dense = [candidate("F16", 1), candidate("Q8_0", 1), candidate("Q4_0", 1)]
    best, reason = recommend(dense)
    assert best == dense[1] and "Q8_0 dense: F16 suits too, in a file twice as large" in reason
    best, _ = recommend([candidate("F16", 1), candidate("Q8_0", 1, "memory"), candidate("Q4_0", 1)])
    assert best is not None and best.type == "F16"


def test_low_rank_only_where_no_dense_file_suits() -> None:
    low_rank = candidate("Q4_0", 0.8, tps=130.0)
    best, reason = recommend([candidate("Q4_0", 1), low_rank])
    assert best is not None and best.ratio == 1 and "1.3 times as fast with Q4_0 at ratio 0.8" in reason
    best, reason = recommend([candidate("Q4_0", 1, "first token"), low_rank])
    assert best == low_rank and "no dense file suits" in reason


def test_where_nothing_suits_the_closest_is_named() -> None:
    best, reason = recommend(
        [candidate("Q8_0", 1, "memory", "decode speed"), candidate("Q4_0", 0.6, "memory")])
    assert best is None and "Q4_0 at ratio 0.6 comes closest and misses the limit of memory" in reason


def test_limits_on_a_known_device() -> None:
    found = plan("llama-3.2-1b", device="rpi5", min_speed=12.0, max_ram=1_800_000_000)
    by_name = {each.name: each for each in found.candidates}
    # 10.25 GB/s over 0.70 GB of weights; 10.55 over 1.31
    assert by_name["Q4_0 dense"].decode_tps == pytest.approx(10.25e9 / 695.4e6, rel=1e-3)
    assert by_name["Q8_0 dense"].decode_tps == pytest.approx(10.55e9 / 1313.1e6, rel=1e-3)
    assert by_name["Q8_0 dense"].misses == ("memory", "decode speed")
    assert found.recommended == by_name["Q4_0 dense"]
    attention = 16 * 2048 * 512 * 513  # each token with itself and all before it, keys and values
    prompt_s = (512 * 973_078_528 + attention + 128256 * 2048) / 52e9
    assert by_name["Q4_0 dense"].first_token_s == pytest.approx(prompt_s, rel=1e-6)


def test_a_device_of_unknown_speed_still_has_memory() -> None:
    found = run_json("plan", "llama-3.2-1b", "--device", "pixel-8", "--types", "Q4_0", "--ratios", "0.8")
    assert [each["decode_tps"] for each in found["candidates"]] == [None, None]
    wished = plan("llama-3.2-1b", device="pixel-8", min_speed=1000.0)
    assert "The decode speed could not be checked" in wished.reason
    assert found["candidates"][0]["memory"]["weights"] > 690_000_000


def test_probe_adds_up() -> None:
    """Layers, attention and head, as if time were work."""
    dimensions = MODELS["qwen2.5-0.5b"]

    def model(ratio: float) -> PlannedModel:
        return plan_model(dimensions, weight_type("Q8_0"), ratio, 0)

    dense, low_rank = (model(ratio).linear_parameters // 24 for ratio in (1.0, 0.6))
    costs = TypeCosts(Cost(dense * 2.0, dense * 1.0), dense, Cost(low_rank * 2.0, low_rank * 1.0), low_rank,
                      Cost(5.0, 7.0))
    found = Probe(2, 100, {"Q8_0": costs}, 0.5, 0.25)
    for ratio in (1.0, 0.9, 0.8, 0.6):
        parameters = model(ratio).linear_parameters
        assert found.prompt_s(model(ratio), 100) == pytest.approx(2 * parameters + 5)
        assert found.prompt_s(model(ratio), 300) == pytest.approx(
            3 * 2 * parameters + 24 * 0.25 * (300 * 300 - 3 * 100 * 100) + 5)
        assert found.decode_s(model(ratio), 10) == pytest.approx(parameters + 24 * 0.5 * 10 + 7)
    assert found.prompt_s(plan_model(dimensions, weight_type("F16"), 1.0, 0), 1) is None


@pytest.mark.runtime
def test_this_machine_is_probed() -> None:
    """A model so small that all of it is timed."""
    found = run_json("plan", DEMO, "--types", "Q8_0", "--ratios", "0.6", "--context", 256,
                     "--prompt-tokens", 64)
    assert [each["ratio"] for each in found["candidates"]] == [1, 0.6]
    for each in found["candidates"]:
        assert 10 < each["decode_tps"] < 1e6 and 10 < each["prompt_tps"] < 1e7
        assert each["decode_full_tps"] <= each["decode_tps"]


def test_it_needs_no_torch() -> None:
    code = ("import sys; from skipcat_edge.planner import plan; plan('llama-3.2-1b', device='rpi5'); "
            "sys.exit('torch' in sys.modules or 'llama_cpp' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
