"""Keys and tensors of a sound file removed, exchanged, renamed or given other values; see hostile_files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGUFValueType
from gguf import GGMLQuantizationType as Type
from gguf_edit import GGUF, Tensor

from skipcat_edge import format as fmt

ANY: tuple[str, ...] = ()
"""Any key or tensor."""
REQUIRED = ("block_count", "embedding_length", "context_length", "head_count")
EPSILON = "epsilon"
Edits = Iterator[tuple[str, GGUF, tuple[str, ...], bool]]
"""What was done, the file, what its refusal may name, and whether it must be refused."""

# --- missing and swapped members ---

_OPTIONAL = (".bias", "token_types")


def missing(file: GGUF) -> Edits:
    architecture = file.keys[fmt.KEY_ARCHITECTURE][0]
    for name in file.tensors:
        edited = file.copy()
        del edited.tensors[name]
        group = name.rpartition(".skip_mask")[0] or name
        # without its mask a projection has too few columns; without its B' a member lacks its dense weight
        related = (
            name,
            f"{group}.lr_a",
            name.replace(".lr_b", ""),
            name.partition(".lr_b")[0],
            name.partition(".lr_a")[0],
        )
        is_optional = any(part in name for part in _OPTIONAL) and architecture == "skipcat-bert"
        # where every level that lacks it finds the dense weight, a member does without its factors
        is_dense = ".lr_b" in name and f"{name.partition('.lr_b')[0]}.weight" in file.tensors
        yield f"without {name}", edited, tuple(dict.fromkeys(related)), not (is_optional or is_dense)
    for key in file.keys:
        edited = file.copy()
        del edited.keys[key]
        sure = key in (fmt.KEY_FORMAT_VERSION, fmt.KEY_RUNTIME_MIN, fmt.KEY_LEVELS) or key.endswith(
            (*REQUIRED[:3], EPSILON)
        )
        yield f"without {key}", edited, (key,) if sure else ANY, sure


def swapped(file: GGUF) -> Edits:
    """Two tensors' shapes, types and data exchanged, between layers and within one."""
    names = [name for name in file.tensors if name.startswith("blk.") and not name.endswith(".bias")]
    pairs = [(first, second) for i, first in enumerate(names) for second in names[i + 1 :][:4]]
    pairs += [
        (name, name.replace("blk.0.", "blk.1."))
        for name in names
        if name.replace("blk.0.", "blk.1.") in names and "blk.0." in name
    ]
    for first, second in pairs:
        a, b = file.tensors[first], file.tensors[second]
        edited = file.copy()
        edited.swap(first, second)
        differ = a.shape != b.shape or (a.type != b.type and Type.I32 in (a.type, b.type))
        yield f"{first} and {second} swapped", edited, ("blk.",), differ
    for name in names:
        if ".lr_" in name:
            for type_ in (Type.F32, Type.I32, Type.F64, Type.I8):
                edited = file.copy()
                edited.tensors[name] = Tensor.zeros(file.tensors[name].shape, type_)
                yield f"{name} of {type_.name}", edited, (name,), type_ != Type.F32
            for change in (-8, 8):
                edited = file.copy()
                shape = file.tensors[name].shape
                edited.tensors[name] = Tensor.zeros((shape[0], max(0, shape[1] + change)), Type.F16)
                yield f"{name} with {change:+} columns", edited, ("blk.",), True


def other_types(file: GGUF) -> Edits:
    """Every tensor that is no factor, of its shape but of a type that what is done with it may not know."""
    for name, tensor in file.tensors.items():
        if ".lr_" in name or ".skip_mask" in name:
            continue
        is_matrix = len(tensor.shape) == 2 and name != "token_types.weight"
        for type_ in (Type.F64, Type.I8, Type.I16, Type.I32, Type.I64, Type.Q8_1, Type.Q8_K, Type.F16):
            if type_ == tensor.type or tensor.shape[-1] % GGML_QUANT_SIZES[type_][0]:
                continue
            edited = file.copy()
            edited.tensors[name] = Tensor.zeros(tensor.shape, type_)
            yield f"{name} of {type_.name}", edited, (name,), not (is_matrix and type_ == Type.F16)


# --- versions, levels and stages that disagree ---


def levels(file: GGUF) -> Edits:
    for version in (0, 3, 4, 2**31, 2**32 - 1):
        edited = file.copy()
        edited.set(fmt.KEY_FORMAT_VERSION, version, GGUFValueType.UINT32)
        yield f"format version {version}", edited, (fmt.KEY_FORMAT_VERSION,), True
    for runtime in ("skipcat.999999", "skipcat.", "x", "skipcat.99999999999999999999"):
        edited = file.copy()
        edited.set(fmt.KEY_RUNTIME_MIN, runtime)
        yield f"runtime {runtime}", edited, (fmt.KEY_RUNTIME_MIN,), True
    other = file.copy()
    other.set(fmt.KEY_FORMAT_VERSION, 3 - file.keys[fmt.KEY_FORMAT_VERSION][0], GGUFValueType.UINT32)
    yield "the other format version", other, (fmt.KEY_LEVELS,), True
    wrong = [
        [0.5],
        [0.9, 0.5],
        [0.5, 0.5],
        [0.5, math.nan],
        [-1.0, 0.5],
        [0.5, 2.0],
        [0.1 * i for i in range(1, 10)],
    ]
    for ratios in wrong:
        edited = file.copy()
        edited.set(fmt.KEY_FORMAT_VERSION, 2, GGUFValueType.UINT32)
        edited.keys[fmt.KEY_LEVELS] = ratios, GGUFValueType.ARRAY, GGUFValueType.FLOAT32
        yield f"levels {ratios}", edited, (fmt.KEY_LEVELS,), True
    if fmt.KEY_LEVELS in file.keys:
        fewer = file.copy()
        fewer.keys[fmt.KEY_LEVELS] = [0.5, 0.9], GGUFValueType.ARRAY, GGUFValueType.FLOAT32
        yield "fewer levels than the names", fewer, ("blk.",), True
    for name in file.tensors:
        if ".lr_" not in name and ".skip_mask" not in name:
            continue
        role = next(role for role in ("lr_a", "lr_b", "skip_mask") if role in name)
        end = "" if role == "skip_mask" else ".weight"
        for suffix in (".0.2", ".0.7", ".2.1", ".7.9", ".1", ".1.1.1", ".a.b", "."):
            edited = file.copy()
            renamed = f"{name.partition(role)[0]}{role}{suffix}{end}"
            if renamed not in file.tensors:
                edited.rename(name, renamed)
                yield f"{name} renamed to {suffix}", edited, ("blk.",), True


# --- keys of another type ---


def key_types(file: GGUF) -> Edits:
    T = GGUFValueType
    others = (
        (7, T.UINT8),
        (7, T.INT32),
        (7, T.UINT64),
        (7.5, T.FLOAT32),
        (7.5, T.FLOAT64),
        (True, T.BOOL),
        ("seven", T.STRING),
        (7, T.UINT32),
    )
    arrays = (([7, 7], T.INT32), ([7] * 600, T.UINT32), (["a", "b"], T.STRING), ([1.0], T.FLOAT64))
    for key, (_, type_, _item) in file.keys.items():
        if key == fmt.KEY_ARCHITECTURE:
            continue
        for value, other in others:
            if other != type_:
                edited = file.copy()
                edited.set(key, value, other)
                yield f"{key} as {other.name}", edited, ANY, False
        for values, item in arrays:
            edited = file.copy()
            edited.keys[key] = values, T.ARRAY, item
            yield f"{key} as {len(values)} {item.name}", edited, ANY, False


# --- vocabularies ---


def vocabularies(file: GGUF) -> Edits:
    tokens, types, _ = file.keys["tokenizer.ggml.tokens"]
    key = "tokenizer.ggml.tokens"

    def with_tokens(changed: list[str]) -> GGUF:
        edited = file.copy()
        edited.keys[key] = changed, types, GGUFValueType.STRING
        return edited

    yield "a token twice", with_tokens([tokens[1], *tokens[1:]]), (key,), True
    yield "an empty token", with_tokens(["", *tokens[1:]]), ANY, False
    yield "a token of 60,000 letters", with_tokens(["a" * 60000, *tokens[1:]]), ANY, False
    yield "fewer tokens", with_tokens(tokens[:-1]), ("tokenizer.ggml.", "token_embd"), True
    yield "more tokens", with_tokens([*tokens, "zzz"]), ("tokenizer.ggml.", "token_embd"), True
    for model in (
        "llama",
        "gpt2",
        "bert",
        "t5",
        "rwkv",
        "plamo2",
        "gemma4",
        "test",
        "hybriddna",
        "none",
        "x",
    ):
        edited = file.copy()
        edited.set("tokenizer.ggml.model", model)
        yield f"vocabulary of kind {model}", edited, ANY, False
    for name in ("bos", "eos", "seperator", "unknown", "padding", "mask", "eot", "fim_pre"):
        for id_ in (len(tokens), 2**31, 2**32 - 1):
            edited = file.copy()
            edited.set(f"tokenizer.ggml.{name}_token_id", id_, GGUFValueType.UINT32)
            yield f"{name} = {id_}", edited, ANY, False
    for name in ("add_bos_token", "add_eos_token", "add_sep_token"):
        edited = file.copy()
        edited.set(f"tokenizer.ggml.{name}", True, GGUFValueType.BOOL)
        for id_name in ("bos", "eos", "seperator"):
            edited.keys.pop(f"tokenizer.ggml.{id_name}_token_id", None)
        yield f"{name} without a token", edited, ANY, False


def large_vocabularies(file: GGUF) -> Edits:
    """More tokens than the embeddings have rows, which the loader finds out after it has read them: what it
    does not refuse before must be worth the memory."""
    for number, size in itertools.product((20_000, 50_000, 100_000, 150_000, 180_000, 400_000), (6, 16, 40)):
        edited = file.copy()
        known, item, _ = file.keys["tokenizer.ggml.tokens"]
        tokens = [*known, *(f"{i:0{size}d}" for i in range(number))]
        edited.keys["tokenizer.ggml.tokens"] = tokens, item, GGUFValueType.STRING
        for name in ("scores", "token_type"):
            if values := file.keys.get(f"tokenizer.ggml.{name}"):
                edited.keys[f"tokenizer.ggml.{name}"] = [*values[0], *values[0][3:4] * number], *values[1:]
        if merges := file.keys.get("tokenizer.ggml.merges"):
            more = [f"{'a' * (size // 2)} {i:0{size // 2}d}" for i in range(number)]
            edited.keys["tokenizer.ggml.merges"] = [*merges[0], *more], *merges[1:]
        yield f"{number} tokens of {size} letters", edited, ("tokenizer.ggml.", "token_embd"), True


# --- other keys ---


def other_keys(file: GGUF) -> Edits:
    """Keys that the file does not have."""
    architecture = file.keys[fmt.KEY_ARCHITECTURE][0].removeprefix(fmt.ARCHITECTURE_PREFIX)
    for scaling in ("none", "linear", "yarn", "longrope", "su", ""):
        edited = file.copy()
        edited.set(f"{architecture}.rope.scaling.type", scaling)
        yield (
            f"rope scaling {scaling!r}",
            edited,
            (f"{architecture}.rope.scaling.type",),
            scaling in ("su", ""),
        )
    for extra in (
        "expert_count",
        "expert_used_count",
        "expert_group_count",
        "nextn_predict_layers",
        "pooling_type",
        "expert_gating_func",
        "attention.key_length",
        "attention.value_length",
        "attention.sliding_window",
        "rope.dimension_count",
        "embedding_length_out",
    ):
        for number in (0, 1, 2, 7, 1025, 2**31):
            edited = file.copy()
            edited.set(f"{architecture}.{extra}", number, GGUFValueType.UINT32)
            yield f"{extra} = {number}", edited, ANY, False
    for number in (1, 2047, 2048, 2**31):
        edited = file.copy()
        edited.set("general.file_type", number, GGUFValueType.UINT32)
        yield f"file type {number}", edited, ANY, False
    for count in (2, 2**16 - 1):
        edited = file.copy()
        edited.set("split.count", count, GGUFValueType.UINT16)
        yield f"one of {count} files", edited, ("split.count",), True
    experts = (
        ((4, 0, 0, 0), "expert_used_count"),
        ((4, 5, 0, 0), "expert_used_count"),
        ((4, 2, 3, 1), "expert_group_count"),
        ((4, 2, 4, 1), "expert_group_count"),
        ((4, 2, 2, 0), "expert_group_used_count"),
        ((4, 2, 2, 2), "expert_group_used_count"),
        ((4, 2, 2, 1), "blk.0"),
    )
    names = ("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count")
    for numbers, culprit in experts:
        edited = file.copy()
        for name, number in zip(names, numbers, strict=True):
            edited.set(f"{architecture}.{name}", number, GGUFValueType.UINT32)
        yield f"experts {numbers}", edited, (culprit,), architecture == "llama" or culprit != "blk.0"
    for heads in ([2, 2], [4, 0], [4, 3], [4], [0, 0]):
        for name in ("head_count", "head_count_kv"):
            edited = file.copy()
            edited.keys[f"{architecture}.attention.{name}"] = heads, GGUFValueType.ARRAY, GGUFValueType.UINT32
            yield f"{name} {heads}", edited, ANY, False


# --- tensors of no layer, and of layers that cannot be low-rank ---


def additions(file: GGUF) -> Edits:
    """Tensors that are not part of the model, or that are there already in another form."""
    for owner in (
        "token_embd",
        "output_norm",
        "blk.0.attn_norm",
        "blk.0.attn_k_norm",
        "blk.7.attn_q",
        "blk.-1.attn_q",
    ):
        edited = file.copy()
        edited.tensors[f"{owner}.lr_a.weight"] = Tensor.zeros((8, 32), Type.F16)
        edited.tensors[f"{owner}.lr_b.weight"] = Tensor.zeros((32, 8), Type.F16)
        yield f"factors of {owner}", edited, (owner,), True
    for name in ("x", "blk.0.x.weight", "blk.9.attn_norm.weight", "output.bias", "blk.0.attn_q.lr_a.bias"):
        edited = file.copy()
        edited.tensors[name] = Tensor.zeros((32,), Type.F32)
        yield f"a tensor {name}", edited, (name,), name != "output.bias"
    for name in [name for name in file.tensors if ".lr_b.weight" in name]:
        dense = name.replace(".lr_b", "")
        edited = file.copy()
        n_embd = file.tensors["token_embd.weight"].shape[1]
        edited.tensors[dense] = Tensor.zeros((file.tensors[name].shape[0], n_embd), Type.F16)
        yield f"{dense} besides its factors", edited, (dense,), True
        own = name.replace("lr_b", "lr_a")
        if own not in file.tensors:
            edited = file.copy()
            edited.tensors[own] = Tensor.zeros((8, n_embd), Type.F16)
            yield f"{own} besides the group's", edited, ("blk.",), False  # which may fit


# --- other architectures ---


def architectures(file: GGUF) -> Edits:
    """The same file as if it were of any other architecture: none may take it at its word."""
    own = file.keys[fmt.KEY_ARCHITECTURE][0].removeprefix(fmt.ARCHITECTURE_PREFIX)
    for name in [*MODEL_ARCH_NAMES.values(), "nonsense", "skipcat-llama", ""]:
        edited = file.copy()
        edited.set(fmt.KEY_ARCHITECTURE, fmt.ARCHITECTURE_PREFIX + name)
        for key in [key for key in edited.keys if key.startswith(f"{own}.")]:
            edited.keys[name + key.removeprefix(own)] = edited.keys.pop(key)
        yield f"as {name}", edited, ANY, name in ("nonsense", "skipcat-llama", "")
