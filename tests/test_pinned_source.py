"""What we say about llama.cpp, against its pinned source and our patches of it."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest
from llama_source import FIELDS, Source, closing

from skipcat_edge import format as fmt
from skipcat_edge.runtime.apply import PatchSet, load_patch_set
from skipcat_edge.runtime.source import stock_tree

SKIPCAT_SOURCES = "vendor/llama.cpp/src/skipcat*.cpp"

# Found by the scan, which does not know that one graph takes another branch for this architecture.
NOT_REACHED = {("deepseek2-ocr", "attn_q")}


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(stock_tree() / "vendor" / "llama.cpp")


@pytest.fixture(scope="module")
def patches() -> PatchSet:
    return load_patch_set()


@pytest.fixture(scope="module")
def skipcat_cpp(patches: PatchSet) -> str:
    """All of our files in llama.cpp's src."""
    sources = [path for name, path in patches.overlay.items() if fnmatch(name, SKIPCAT_SOURCES)]
    return "\n".join(path.read_text("utf-8") for path in sources)


def define(text: str, name: str) -> int:
    (value,) = re.findall(rf"^#define {name}\s+(\d+)$", text, re.M)
    return int(value)


def member_names(source: Source) -> dict[str, str]:
    """LLM_TENSOR_ -> our name, of every weight that may be low-rank."""
    names = source.tensor_names()
    return {tensor: names[tensor].removeprefix("blk.%d.") for tensor in FIELDS.values()}


def test_unserved_layers(source: Source) -> None:
    names = member_names(source)
    found = {
        (architecture, names[tensor])
        for architecture, model in source.architectures().items()
        for tensor in source.unserved(model)
    }
    table = {(architecture, member) for architecture, members in fmt.UNSERVED.items() for member in members}
    assert table == found - NOT_REACHED
    assert found >= NOT_REACHED


def test_the_branch_of_deepseek2_that_the_scan_does_not_see(source: Source) -> None:
    (graph,) = (f for f in source.functions if f.name == "llama_model_deepseek2::graph::graph")
    assert re.search(r"bool is_ocr = model\.arch == LLM_ARCH_DEEPSEEK2OCR;", graph.body)
    opening = graph.body.index("{", graph.body.index("if (is_ocr)"))
    end = closing(graph.body, opening)
    branch, rest = graph.body[opening:end], graph.body[end:]
    assert "build_qkv(" in branch and not re.search(r"\bwq\b", branch)
    assert re.match(r"}\s*else\s*{", rest)
    assert "ggml_mul_mat(ctx0, model.layers[il].wq, cur)" in rest


def test_the_scan_sees_what_it_should(source: Source) -> None:
    assert len(source.architectures()) > 140
    assert source.shared_helpers_serve()
    ours = {(field, tensor) for field, tensor in source.weight_fields() if tensor in FIELDS.values()}
    assert ours == set(FIELDS.items())
    # One way to pass each weight by: directly, through a helper, through a local name, seen by the loader.
    for model, tensor in (("plm", "ATTN_Q"), ("granite_switch", "FFN_UP"), ("kimi_linear", "ATTN_V"),
                          ("jina_bert_v2", "FFN_UP")):
        assert tensor in source.unserved(f"llama_model_{model}")
    for model in ("llama", "qwen2", "qwen3", "bert", "gemma3", "phi3", "t5", "mamba"):
        assert source.unserved(f"llama_model_{model}") == set()


def test_group_members_are_llama_cpps_names(source: Source) -> None:
    assert set(fmt.GROUP_OF) == set(member_names(source).values())
    # A group's own name must not be one that llama.cpp has a tensor for.
    taken = {name.removeprefix("blk.%d.") for name in source.tensor_names().values()}
    assert taken.isdisjoint(fmt.GROUPS)


def test_the_runtime_has_the_same_groups(source: Source, patches: PatchSet, skipcat_cpp: str) -> None:
    (switch,) = re.findall(r"static llm_tensor group_of\(.*?\n}\n", skipcat_cpp, re.S)
    groups, cases = {}, []
    for kind, tensor in re.findall(r"(case|return) LLM_TENSOR_(\w+)", switch):
        if kind == "case":
            cases.append(tensor)
        else:
            groups |= dict.fromkeys(cases, tensor)
            cases = []
    (names,) = (path for path in patches.patches if "tensor-names" in path.name)
    pattern = r'^\+ +\{ LLM_TENSOR_(SKIPCAT_\w+), +"blk\.%d\.(\w+)" \},$'
    added = dict(re.findall(pattern, names.read_text("utf-8"), re.M))
    members = member_names(source)
    assert {members[tensor]: added[group] for tensor, group in groups.items()} == fmt.GROUP_OF


def test_revisions_agree(patches: PatchSet, skipcat_cpp: str) -> None:
    revision = define(skipcat_cpp, "SKIPCAT_RUNTIME_REVISION")
    assert revision == patches.pin.revision
    assert re.fullmatch(r"skipcat\.\d+", fmt.RUNTIME_MIN)
    assert int(fmt.RUNTIME_MIN.removeprefix("skipcat.")) <= revision
    assert int(fmt.LEVELS_RUNTIME_MIN.removeprefix("skipcat.")) <= revision
    assert define(skipcat_cpp, "SKIPCAT_FORMAT_VERSION") == fmt.LEVELS_FORMAT_VERSION
    assert define(skipcat_cpp, "SKIPCAT_MAX_LEVELS") == fmt.MAX_LEVELS


def test_the_patches_stay_small(patches: PatchSet) -> None:
    changed = [
        line
        for path in patches.patches
        for line in path.read_text("utf-8").splitlines()
        if re.match(r"[+-](?!\+\+ |-- )", line)
    ]
    assert len(changed) < 150


def test_the_runtime_knows_the_names_of_the_format(skipcat_cpp: str) -> None:
    keys = (fmt.KEY_FORMAT_VERSION, fmt.KEY_RUNTIME_MIN, fmt.KEY_RATIO, fmt.KEY_LEVELS)
    for text in (fmt.ARCHITECTURE_PREFIX, *keys, "lr_a", "lr_b", "skip_mask", ".weight", ".%d.%d"):
        assert f'"{text}"' in skipcat_cpp
    layer, owner = 7, "ffn_in"
    assert fmt.lr_a_name(layer, owner) == "blk.7.ffn_in.lr_a.weight"
    assert fmt.lr_b_name(layer, "ffn_up") == "blk.7.ffn_up.lr_b.weight"
    assert fmt.skip_mask_name(layer, owner) == "blk.7.ffn_in.skip_mask"
    assert fmt.lr_a_name(layer, owner, (0, 1)) == "blk.7.ffn_in.lr_a.0.1.weight"
    assert fmt.lr_b_name(layer, "ffn_up", (0, 1)) == "blk.7.ffn_up.lr_b.0.1.weight"
    assert fmt.skip_mask_name(layer, owner, (0, 1)) == "blk.7.ffn_in.skip_mask.0.1"


def test_cached_tree_is_the_pinned_one(patches: PatchSet) -> None:
    text = (stock_tree() / "llama_cpp" / "__init__.py").read_text("utf-8")
    version = re.search(r'__version__ = "(.*)"', text)
    assert version and version[1] == patches.pin.version
