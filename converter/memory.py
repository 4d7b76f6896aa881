"""What a conversion needs in memory, and what it does to stay within --max-memory.

All needs are computed from the model's dimensions, not measured, so that the same command makes the same
bytes on every machine. tests/bench_memory.py shows them beside what it measures.
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from skipcat_edge import format as fmt
from skipcat_edge.errors import UserError
from skipcat_edge.extra import Phase
from skipcat_edge.terminal import decimal_bytes

from .calibration import BATCH_TOKENS, DEFAULT_SEQ_LEN
from .job import Job
from .layers import Layer
from .resident import shapes

KEPT_PLAN = "memory.json"
"""Artifact of the job."""

HEAD_TOKENS = 512
"""A forward pass with the head holds this many rows of logits, and their gradients, at a time."""

# Python with PyTorch, transformers and a tokenizer; and PyTorch again in llama.cpp's converter.
_PROCESS, _CONVERTER = 550_000_000, 400_000_000
# llama.cpp's converter holds a tensor as it is stored and in float32.
_CONVERTER_PER_ELEMENT = 6
# Logits, their softmax and gradients, in float32.
_LOGITS = 7
# Of a layer's inputs and outputs in a pass forwards and back: what autograd keeps, and temporary ones.
_ACTIVATIONS = 2.0
# Matrices of n x n in float64 that a layer of n inputs needs at once: to be factored, and to find out what it
# should make up for, where nothing is spilled to the disk.
_FACTORED, _COMPENSATED = 3.7, 7.2
# The same of m x n.
_WEIGHTS = 4.0
# Two halves of second moments while they are collected; at the end the mean of a layer's inputs, and what is
# computed with that of its outputs.
_HALVES, _MEAN, _ROOT = 2.0, 1.3, 5.0
_FLOAT32, _FLOAT64 = 4, 8
# malloc.h's number of the parameter; and from how many bytes on memory has a mapping of its own.
_MMAP_THRESHOLD, _MAPPED = -3, 1 << 20


@dataclass(frozen=True)
class Dimensions:
    """Of a model, what its needs are computed from."""

    blocks: Sequence[Sequence[Layer]]
    """Of each block its layers that may be factored."""
    block_elements: int
    """Of the largest block."""
    largest: int
    """Elements of the largest tensor."""
    hidden: int
    vocabulary: int
    """Of the output head; 0 for an encoder."""


@dataclass(frozen=True)
class Wanted:
    """What the conversion would do, given the memory."""

    statistics: bool
    """They are taken, not found."""
    gradients: bool
    compensation: bool
    levels: int = 1
    seq_len: int = DEFAULT_SEQ_LEN


@dataclass(frozen=True)
class MemoryPlan:
    """How the conversion stays within its allowance."""

    batch_tokens: int = BATCH_TOKENS
    head_tokens: int = HEAD_TOKENS
    gradients: bool = True
    one_sided: bool = False
    """Gradients were wanted, and are left out."""
    compensation: bool = True
    moments: int = 0
    """Bytes that the second moments of a part of a block may take."""
    spilled_from: float = math.inf
    """Matrices of layers with so many inputs or more lie on the disk between uses."""
    fallbacks: tuple[str, ...] = ()
    """What is done otherwise than without a limit, each a sentence."""

    def parts(self, layers: list[Layer]) -> list[list[Layer]]:
        """A block's layers in parts whose second moments fit, groups being whole."""
        parts: list[list[Layer]] = [[]]
        for group in _groups(layers):
            if parts[-1] and _moments([*parts[-1], *group], self.gradients) > self.moments:
                parts.append([])
            parts[-1] += group
        return parts


def plan_memory(limit: int, model: Dimensions, wanted: Wanted) -> MemoryPlan:
    """How to do what is `wanted` in `limit` bytes.

    Raises UserError, which names the least that would do, where there is no way.
    """
    needs = dict(_least(model, wanted))
    what = max(needs, key=lambda name: needs[name])
    _require(limit, what, needs[what])
    plan = MemoryPlan(gradients=wanted.gradients, compensation=wanted.compensation)
    said = []
    if wanted.statistics and wanted.gradients:
        need = max(_head(model, wanted.seq_len), _statistics(model, wanted.seq_len, True))
        if need > limit:
            plan = replace(plan, gradients=False, one_sided=True)
            said.append(f"Two-sided statistics take {decimal_bytes(need)}, more than --max-memory: they "
                        "become one-sided, as with --no-grad.")
    if wanted.compensation:
        need = max(_compensated(model, group, wanted, _FACTORED) for group in _all_groups(model))
        if need > limit:
            plan = replace(plan, compensation=False)
            said.append(f"Compensation across layers takes {decimal_bytes(need)}, more than --max-memory: "
                        "it is left out, as with --no-compensation.")
        large = [group[0].n for group in _all_groups(model)
                 if _compensated(model, group, wanted, _COMPENSATED) > limit]
        plan = replace(plan, spilled_from=min(large, default=math.inf))
    if wanted.statistics or plan.compensation:
        plan = _with_batches(plan, limit, model, wanted, said)
    return replace(plan, fallbacks=tuple(said))


def kept_plan(job: Job, plan: Callable[..., MemoryPlan], *arguments: Any) -> MemoryPlan:
    """The plan that the job began with; `plan` of what it finished since might be another one."""
    if not job.has(KEPT_PLAN):
        job.write_json(KEPT_PLAN, asdict(plan(*arguments)))
    with job.reading(KEPT_PLAN):
        told = job.read_json(KEPT_PLAN)
        return MemoryPlan(**{**told, "fallbacks": tuple(told["fallbacks"])})


def check_memory_of_base(limit: int, source: Path) -> None:
    """Raise UserError where llama.cpp's converter of the model in `source` needs more than `limit` bytes."""
    largest = max((math.prod(shape) for shape in shapes(source).values()), default=0)
    _require(limit, "to convert the largest tensor with llama.cpp",
             _PROCESS + _CONVERTER + _CONVERTER_PER_ELEMENT * largest)


def _require(limit: int, what: str, need: int) -> None:
    if need > limit:
        raise UserError(f"--max-memory is {decimal_bytes(limit)}, but {what} takes {decimal_bytes(need)}; "
                        "that is the least that would do.")


def giving_back(phase: Phase) -> Phase:
    """`phase`, and whenever it begins or advances what was freed goes back to the system."""

    @contextmanager
    def begin(title: str, total: float) -> Iterator[Callable[[float], None]]:
        _give_back_freed()
        with phase(title, total) as advance:

            def go_on(amount: float) -> None:
                _give_back_freed()
                advance(amount)

            yield go_on

    return begin


def _give_back_freed() -> None:
    """To the system, and at once from now on, where the C library is the GNU one: it would keep some hundred
    megabytes for the next matrices."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _MAPPED)
        library.malloc_trim(0)


def _with_batches(
    plan: MemoryPlan, limit: int, model: Dimensions, wanted: Wanted, said: list[str]
) -> MemoryPlan:
    """The largest batches that fit; what they leave is for second moments."""
    batch = _halved(BATCH_TOKENS, wanted.seq_len,
                    lambda tokens: _statistics(model, tokens, plan.gradients) <= limit)
    head = HEAD_TOKENS
    if plan.gradients and wanted.statistics:
        head = _halved(HEAD_TOKENS, wanted.seq_len, lambda tokens: _head(model, tokens) <= limit)
    for tokens, usual, where in ((batch, BATCH_TOKENS, ""), (head, HEAD_TOKENS, " of the output head")):
        if tokens < usual:
            said.append(f"To stay within --max-memory, batches{where} have {tokens:,} tokens instead of "
                        f"{usual:,}; sums are rounded otherwise.")
    left = limit - _run(model, batch, plan.gradients)
    return replace(plan, batch_tokens=batch, head_tokens=head, moments=left)


def _halved(tokens: int, least: int, fits: Callable[[int], bool]) -> int:
    while tokens > least and not fits(tokens):
        tokens = max(tokens // 2, least)
    return tokens


def _least(model: Dimensions, wanted: Wanted) -> Iterator[tuple[str, int]]:
    """What cannot be done with less."""
    yield "to write the largest tensor", _PROCESS + _FLOAT32 * model.largest
    if wanted.statistics:
        yield "to take the statistics of the widest layer", _statistics(model, wanted.seq_len, False)
    groups = [_factored(group, _FACTORED) for group in _all_groups(model)]
    yield "to factor the widest layer", max(groups, default=0)


def _run(model: Dimensions, tokens: int, gradients: bool) -> int:
    """A block and a batch in it."""
    wide = max((sum(layer.m + layer.n for layer in block) for block in model.blocks), default=0)
    kept = _ACTIVATIONS if gradients else _ACTIVATIONS / 2
    return _PROCESS + _FLOAT32 * model.block_elements + int(_FLOAT32 * kept * tokens * wide)


def _statistics(model: Dimensions, tokens: int, gradients: bool) -> int:
    """With the second moments of one group at a time."""
    return _run(model, tokens, gradients) + max(
        (_moments(group, gradients) for group in _all_groups(model)), default=0)


def _moments(layers: Sequence[Layer], gradients: bool) -> int:
    """Of whole groups."""
    inputs = [group[0].n for group in _groups(layers)]
    outputs = [min(layer.m, layer.n) for layer in layers] if gradients else []
    at_end = [_MEAN * n**2 for n in inputs]
    if gradients:
        at_end += [_ROOT * min(layer.m, layer.n) ** 2 + 2 * layer.m * layer.n for layer in layers]
    halves = _HALVES * sum(size**2 for size in [*inputs, *outputs])
    return int(_FLOAT64 * (halves + max(at_end)))


def _head(model: Dimensions, tokens: int) -> int:
    return _PROCESS + _FLOAT32 * (model.hidden * model.vocabulary + _LOGITS * tokens * model.vocabulary)


def _factored(group: Sequence[Layer], matrices: float) -> int:
    n, m = group[0].n, sum(layer.m for layer in group)
    return _PROCESS + int(_FLOAT64 * (matrices * n**2 + _WEIGHTS * m * n))


def _compensated(model: Dimensions, group: Sequence[Layer], wanted: Wanted, matrices: float) -> int:
    """With a copy of the block for each level."""
    return _factored(group, matrices) + wanted.levels * _FLOAT32 * model.block_elements


def _all_groups(model: Dimensions) -> Iterator[list[Layer]]:
    for block in model.blocks:
        yield from _groups(block)


def _groups(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Runs of layers that read the same input."""
    for _, members in groupby(layers, lambda layer: fmt.GROUP_OF[layer.member]):
        yield list(members)


def dimensions(reader: GGUFReader, is_encoder: bool) -> Dimensions:
    """Of the model in a base file."""
    blocks: dict[int, list[Layer]] = {}
    elements: dict[int, int] = {}
    hidden = vocabulary = 0
    for tensor in reader.tensors:
        index, rest = fmt.split_block(tensor.name) or (-1, tensor.name)
        elements[index] = elements.get(index, 0) + int(tensor.n_elements)
        member = rest.removesuffix(".weight")
        if index >= 0 and member in fmt.GROUP_OF and len(tensor.shape) == 2:
            n, m = (int(size) for size in tensor.shape)
            blocks.setdefault(index, []).append(Layer(index, member, "", m, n))
        if tensor.name == "token_embd.weight":
            hidden, vocabulary = (int(size) for size in tensor.shape)
    ordered = [sorted(block, key=lambda layer: fmt.GROUP_OF[layer.member]) for block in blocks.values()]
    return Dimensions(ordered, max((each for index, each in elements.items() if index >= 0), default=0),
                      max(int(tensor.n_elements) for tensor in reader.tensors), hidden,
                      0 if is_encoder else vocabulary)
