"""Random-weight models: how fast a model would be on a device, without downloading it.

Weights are drawn from a small pool of blocks, quantised once: values repeat, memory does not,
and speed depends only on the latter. Nothing larger than a chunk is held, so that a small
device can write a large model.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from skipcat_edge import format as fmt
from skipcat_edge.errors import UserError
from skipcat_edge.gguf_file import open_gguf
from skipcat_edge.model_table import ModelDimensions
from skipcat_edge.output import atomic_output

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderField

    from skipcat_edge.synth_plan import Plan

METHOD = "skipcat"
"""The form that is written: shared projections with Skip."""

_POOL_ELEMENTS = 1 << 20
_CHUNK_BYTES = 1 << 24


def write(plan: Plan, out: Path, tree: Path | None, *, force: bool = False,
          advance: Callable[[int], None] = lambda nbytes: None) -> None:
    """Write the model with the vocabulary found in `tree`, the unpacked llama-cpp-python source; None:
    without one, for what reads and writes token numbers only.

    `advance` is told how many bytes of weights were written. Raises UserError if `out` exists and
    `force` is not given, or on a missing vocabulary or a failed write; then `out` is left as it was.
    """
    with atomic_output(out, force) as partial:
        tokenizer = _no_tokenizer() if tree is None else _read_tokenizer(tree, plan.model)
        _write_file(plan, partial, tokenizer, advance)


def _no_tokenizer() -> Mapping[str, tuple[Any, Any, Any]]:
    from gguf import GGUFValueType, Keys

    return {Keys.Tokenizer.MODEL: ("no_vocab", GGUFValueType.STRING, GGUFValueType.STRING)}


def _read_tokenizer(tree: Path, model: ModelDimensions) -> Mapping[str, tuple[Any, Any, Any]]:
    """The vocabulary file's `tokenizer.*` keys -> (value, type, element type), padded to n_vocab."""
    from gguf import GGUFValueType, Keys, TokenType

    path = tree / "vendor" / "llama.cpp" / "models" / f"ggml-vocab-{model.vocabulary}.gguf"
    if not path.is_file():
        raise UserError(f"{path} is missing; pass --source with the pinned llama-cpp-python source release.")
    reader = open_gguf(path)
    keys: dict[str, tuple[Any, Any, Any]] = {}
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            array = field.types[0] == GGUFValueType.ARRAY
            value = _array(reader, field) if array else field.contents()
            keys[name] = value, field.types[0], field.types[-1]
    missing = model.n_vocab - len(keys[Keys.Tokenizer.LIST][0])
    if missing < 0:
        raise UserError(f"{path} has {-missing} tokens more than {model.name}'s embedding has rows.")
    # As llama.cpp's converter pads: embeddings are often larger than the tokenizer.
    padding = {
        Keys.Tokenizer.LIST: [f"[PAD{i}]" for i in range(model.n_vocab - missing, model.n_vocab)],
        Keys.Tokenizer.TOKEN_TYPE: [int(TokenType.UNUSED)] * missing,
        Keys.Tokenizer.SCORES: [-1000.0] * missing,
    }
    for name in padding.keys() & keys.keys():
        keys[name][0].extend(padding[name])
    return keys


def _array(reader: GGUFReader, field: ReaderField) -> list[Any]:
    """An array's values, read at once: `open_gguf` steps over long ones."""
    from gguf import GGUFValueType

    buffer = memoryview(reader.data)
    start = field.offset + 8 + len(field.name.encode()) + 4
    item, count = struct.unpack_from("<IQ", buffer, start)
    start += 12
    if item != GGUFValueType.STRING:
        dtype = np.dtype(reader.gguf_scalar_to_np[GGUFValueType(item)])
        return list(np.frombuffer(buffer, dtype, count, start).tolist())
    strings = []
    for _ in range(count):
        end = start + 8 + struct.unpack_from("<Q", buffer, start)[0]
        strings.append(str(buffer[start + 8 : end], "utf-8"))
        start = end
    return strings


def _write_file(plan: Plan, path: Path, tokenizer: Mapping[str, tuple[Any, Any, Any]],
                advance: Callable[[int], None]) -> None:
    from gguf import GGUFEndian, GGUFWriter

    architecture = plan.model.architecture
    writer = GGUFWriter(path, fmt.ARCHITECTURE_PREFIX + architecture if plan.low_rank else architecture)
    writer.arch = architecture  # the `<arch>.*` keys carry no prefix
    _add_keys(writer, plan)
    for key, (value, type_, element_type) in tokenizer.items():
        writer.add_key_value(key, value, type_, element_type)
    for tensor in plan.tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    pools: dict[tuple[GGMLQuantizationType, float], np.ndarray] = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for index, tensor in enumerate(plan.tensors):
            data: Any = tensor.data
            if data is None:
                rng = np.random.default_rng((plan.seed, index))
                kind = tensor.type, tensor.deviation
                if kind not in pools:
                    pools[kind] = _block_pool(*kind, rng)
                data = _RandomData(tensor.nbytes, pools[kind], rng, advance)
            writer.write_tensor_data(data, tensor_endianess=GGUFEndian.LITTLE)
    finally:
        writer.close()


def _add_keys(writer: GGUFWriter, plan: Plan) -> None:
    from gguf import GGML_QUANT_VERSION

    model = plan.model
    writer.add_type("model")
    writer.add_name(f"{model.name} (random weights)")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(model.n_vocab)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    if plan.low_rank:
        if plan.levels:
            writer.add_uint32(fmt.KEY_FORMAT_VERSION, fmt.LEVELS_FORMAT_VERSION)
            writer.add_string(fmt.KEY_RUNTIME_MIN, fmt.LEVELS_RUNTIME_MIN)
            writer.add_array(fmt.KEY_LEVELS, plan.levels)
        else:
            writer.add_uint32(fmt.KEY_FORMAT_VERSION, fmt.FORMAT_VERSION)
            writer.add_string(fmt.KEY_RUNTIME_MIN, fmt.RUNTIME_MIN)
        writer.add_float32(fmt.KEY_RATIO, plan.ratio)
        writer.add_string(fmt.KEY_METHOD, METHOD)
        writer.add_string(fmt.KEY_SOURCE_NAME, model.name)
        writer.add_string(fmt.KEY_CALIBRATION_SHA256, hashlib.sha256(b"").hexdigest())
        writer.add_uint32(fmt.KEY_CALIBRATION_TOKENS, 0)
        writer.add_uint32(fmt.KEY_SEED, plan.seed)


def _block_pool(type_: GGMLQuantizationType, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian weights of a standard deviation, quantised: uint8 [blocks, block bytes].

    1 / sqrt(columns) keeps activations near 1, so that none overflow or slow the CPU down as denormals.
    """
    from gguf import quants

    width = max(32, fmt.block_size(type_))
    weights = rng.standard_normal((_POOL_ELEMENTS // width, width), np.float32)
    weights *= deviation
    try:
        blocks: np.ndarray = quants.quantize(weights, type_)
    except NotImplementedError:
        from skipcat_edge.runtime.library import quantize

        blocks = quantize(weights, type_)
    return np.ascontiguousarray(blocks).view(np.uint8)


@dataclass(frozen=True)
class _RandomData:
    """Blocks drawn from a pool, with what GGUFWriter asks of an array: `nbytes` and `tofile`."""

    nbytes: int
    pool: np.ndarray
    rng: np.random.Generator
    advance: Callable[[int], None]

    def tofile(self, file: BinaryIO) -> None:
        count, size = self.pool.shape
        left = self.nbytes
        while left > 0:
            blocks = min(_CHUNK_BYTES // size, -(-left // size))
            # A tensor may end inside the pool's row, which is wider than a block of F32, F16 or BF16.
            chunk = self.pool[self.rng.integers(count, size=blocks, dtype=np.uint32)].reshape(-1)[:left]
            file.write(chunk.data)
            left -= chunk.nbytes
            self.advance(chunk.nbytes)
