"""Logits at each rank level against dense models of the same weights, multiplied out in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType
from gguf_edit import GGUF
from level_context import Context, levels_library
from level_models import (
    BERT_SIZES,
    BERT_STAGES,
    LEVELS,
    SIZES,
    STAGES,
    LevelFiles,
    Stage,
    add_levels,
    bert_base,
    small_base,
)

from skipcat_edge import format as fmt

pytestmark = pytest.mark.runtime

# Relative; ggml rounds activations to 8 bits for the quantised types.
TOLERANCE = {"F32": 1e-5, "F16": 5e-3, "Q8_0": 5e-2, "Q4_0": 5e-2}
TYPES = list(TOLERANCE)
PLACES = range(len(LEVELS))
TOKENS = np.random.default_rng(0).integers(0, 288, 48).tolist()
PROMPT = 37


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LevelFiles]:
    """The llama with levels and its dense models, by type."""
    directory = tmp_path_factory.mktemp("levels")
    base = small_base(directory)
    made: dict[str, LevelFiles] = {}

    def of(type_: str) -> LevelFiles:
        if type_ not in made:
            made[type_] = add_levels(base, SIZES, STAGES, Type[type_], directory, "llama")
        return made[type_]

    return of


def prompt_and_steps(context: Context) -> np.ndarray:
    """Logits of all tokens: a prompt, then one by one."""
    context.clear()
    parts = [context.decode(TOKENS[:PROMPT], 0)]
    parts += [context.decode([token], PROMPT + i) for i, token in enumerate(TOKENS[PROMPT:])]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def expected(files: Callable[[str], LevelFiles]) -> Callable[[str], list[np.ndarray]]:
    """Logits of the dense models, by type and level."""
    made: dict[str, list[np.ndarray]] = {}

    def of(type_: str) -> list[np.ndarray]:
        if type_ not in made:
            made[type_] = []
            for path in files(type_).dense:
                with Context(path) as context:
                    made[type_].append(prompt_and_steps(context))
        return made[type_]

    return of


def test_the_python_reader_knows_the_files(files: Callable[[str], LevelFiles]) -> None:
    reader = GGUFReader(files("F16").path)
    assert fmt.read_levels(reader) == LEVELS
    stages = {layer: sorted((s.owner, (s.first, s.last), s.rank, s.skip) for s in block)
              for layer, block in STAGES.items()}
    found: dict[int, list[tuple[str, tuple[int, int], int, bool]]] = {layer: [] for layer in STAGES}
    for owner in fmt.read_owners(reader):
        found[owner.layer].append((owner.name, owner.levels, owner.rank, owner.skip))
    assert {layer: sorted(owners) for layer, owners in found.items()} == stages


@pytest.mark.parametrize("type_", TYPES)
def test_each_level_is_its_dense_model(type_: str, files: Callable[[str], LevelFiles],
                                       expected: Callable[[str], list[np.ndarray]]) -> None:
    reference = expected(type_)
    with Context(files(type_).path) as context:
        assert context.level == PLACES[-1]
        # every change of level, up and down, with what the reserved graph has too little room for
        for level in (2, 0, 1, 0, 2, 1, 2):
            context.level = level
            assert context.level == level
            logits = prompt_and_steps(context)
            errors = [relative_error(logits, other) for other in reference]
            assert errors[level] < TOLERANCE[type_]
            # the levels differ by far more than the tolerance
            assert all(error > 0.5 for place, error in enumerate(errors) if place != level)


@pytest.mark.parametrize("fused", ["0", "1"])
def test_both_forms_of_the_product(fused: str, files: Callable[[str], LevelFiles],
                                   expected: Callable[[str], list[np.ndarray]],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPCAT_FUSED", fused)
    with Context(files("F32").path) as context:
        for level in PLACES:
            context.level = level
            assert relative_error(prompt_and_steps(context), expected("F32")[level]) < TOLERANCE["F32"]


@pytest.mark.parametrize("type_", TYPES)
def test_threads_change_no_bit(type_: str, files: Callable[[str], LevelFiles]) -> None:
    with Context(files(type_).path, threads=1) as one, Context(files(type_).path, threads=2) as two:
        for level in (2, 0, 1):
            one.level = two.level = level
            np.testing.assert_array_equal(prompt_and_steps(one), prompt_and_steps(two))


Script = Sequence[tuple[int, int]]
"""(level, tokens to decode at once), in turn."""
SCRIPTS: dict[str, Script] = {
    "prompt at the full level, then down and up": ((2, 20), *((level, 1) for level in (1, 1, 0, 0, 1, 2, 2))),
    "another level at each token": ((0, 9), *((i % 3, 1) for i in range(12))),
    "prompts at all levels": ((1, 12), (2, 12), (0, 12), (0, 1), (2, 1), (1, 1)),
}


def play(script: Script, decode: Callable[[int, list[int], int], np.ndarray]) -> np.ndarray:
    parts, position = [], 0
    for level, count in script:
        parts.append(decode(level, TOKENS[position : position + count], position))
        position += count
    return np.concatenate(parts)


def switching(context: Context) -> Callable[[int, list[int], int], np.ndarray]:
    def decode(level: int, tokens: list[int], position: int) -> np.ndarray:
        context.level = level
        return context.decode(tokens, position)

    return decode


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("type_", ["F32", "Q4_0"])
def test_switching_is_going_on_with_another_model(type_: str, script: Script,
                                                  files: Callable[[str], LevelFiles]) -> None:
    """The reference hands the KV cache from one dense model to the next."""
    with ExitStack() as stack:
        dense = [stack.enter_context(Context(path)) for path in files(type_).dense]
        cache: list[bytes] = []

        def hand_over(level: int, tokens: list[int], position: int) -> np.ndarray:
            context = dense[level]
            context.clear()
            if cache:
                context.restore(cache.pop())
            logits = context.decode(tokens, position)
            cache.append(context.state())
            return logits

        reference = play(script, hand_over)
        found = play(script, switching(stack.enter_context(Context(files(type_).path))))
    assert relative_error(found, reference) < TOLERANCE[type_]


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_switching_is_a_fresh_context_at_each_token(script: Script, files: Callable[[str], LevelFiles],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, where the other side reuses no graph and no context."""
    path = files("Q8_0").path
    with Context(path) as context:
        found = play(script, switching(context))
    monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", "1")
    for steps in range(1, len(script) + 1):
        with Context(path) as context:
            part = play(script[:steps], switching(context))
        np.testing.assert_array_equal(part, found[: len(part)])


def test_a_graph_is_used_again_at_its_own_level_only(files: Callable[[str], LevelFiles]) -> None:
    with Context(files("F16").path) as context:
        context.decode(TOKENS[:5], 0)
        reused = []
        for position, level in enumerate((2, 2, 2, 0, 0, 1, 1, 2), 5):
            context.level = level
            before = context.reused_graphs()
            context.decode(TOKENS[position : position + 1], position)
            reused.append(context.reused_graphs() - before)
    assert reused == [0, 1, 1, 0, 1, 0, 1, 0]


def test_sequences_and_context_shift(files: Callable[[str], LevelFiles]) -> None:
    """Two sequences of one context, one of them shifted, as two contexts with one each."""

    def shift(context: Context, sequence: int) -> None:
        context.api.llama_memory_seq_rm(context.memory, sequence, 4, 12)
        context.api.llama_memory_seq_add(context.memory, sequence, 12, -1, -8)

    first, second = TOKENS[:20], TOKENS[20:40]
    with Context(files("F32").path, sequences=2) as both:
        both.level = 0
        both.decode_all([(token, i, sequence) for sequence, part in enumerate((first, second))
                         for i, token in enumerate(part)])
        both.level = 1
        shift(both, 1)
        found = [both.decode_all([(TOKENS[40], 20, 0), (TOKENS[41], 12, 1)])]
        both.level = 2
        found.append(both.decode_all([(TOKENS[42], 21, 0), (TOKENS[43], 13, 1)]))
    alone = []
    for sequence, part in enumerate((first, second)):
        with Context(files("F32").path) as context:
            context.level = 0
            context.decode(part, 0)
            context.level = 1
            position = 20
            if sequence == 1:
                shift(context, 0)
                position = 12
            step = [context.decode([TOKENS[40 + sequence]], position)[0]]
            context.level = 2
            alone.append([*step, context.decode([TOKENS[42 + sequence]], position + 1)[0]])
    assert relative_error(np.array(found), np.array(alone).transpose(1, 0, 2)) < TOLERANCE["F32"]


def test_embeddings(tmp_path: Path) -> None:
    files = add_levels(bert_base(), BERT_SIZES, BERT_STAGES, Type.F32, tmp_path, "bert", (0.6, 0.8))
    expected = []
    for path in files.dense:
        with Context(path, embedding=True) as context:
            expected.append(context.embed(TOKENS))
    assert relative_error(expected[0], expected[1]) > 0.1
    with Context(files.path, embedding=True) as context:
        for level in (1, 0, 1, 0):
            context.level = level
            assert relative_error(context.embed(TOKENS), expected[level]) < TOLERANCE["F32"]


@pytest.fixture
def dense(files: Callable[[str], LevelFiles]) -> Iterator[Context]:
    with Context(files("F16").dense[0]) as context:
        yield context


def test_what_a_file_says_of_its_levels(files: Callable[[str], LevelFiles], dense: Context) -> None:
    library = levels_library()
    with Context(files("F16").path) as context:
        assert library.skipcat_n_levels(context.model) == 3
        ratios = [library.skipcat_level_ratio(context.model, level) for level in range(-1, 4)]
        assert ratios == pytest.approx([-1, *LEVELS, -1])
        context.level = 1
        for wrong in (-1, 3, 2**31 - 1, -(2**31)):
            assert library.skipcat_set_level(context.ctx, wrong) == -1
            assert context.level == 1
    assert library.skipcat_n_levels(dense.model) == 1
    assert [library.skipcat_level_ratio(dense.model, level) for level in (-1, 0, 1)] == [-1, 1, -1]
    assert dense.level == 0
    assert [library.skipcat_set_level(dense.ctx, level) for level in (1, 0)] == [-1, 0]


def test_one_level_is_the_same_to_the_bit(files: Callable[[str], LevelFiles], tmp_path: Path) -> None:
    """Factors that all levels use, in files of both versions."""
    for type_ in TYPES:
        both = GGUF.read(files(type_).path)
        for name in [name for name in both.tensors if name.startswith("blk.0.")]:
            # block 0 has factors of all levels for most layers; what is added to them goes
            if any(f".{first}.{last}" in name for first in PLACES for last in PLACES):
                del both.tensors[name]
        for name in [name for name in both.tensors if name.startswith("blk.1.")]:
            del both.tensors[name]
        both.set("llama.block_count", 1, GGUFValueType.UINT32)
        with_levels = both.write(tmp_path / f"two-{type_}.gguf")
        del both.keys[fmt.KEY_LEVELS]
        both.set(fmt.KEY_FORMAT_VERSION, fmt.FORMAT_VERSION, GGUFValueType.UINT32)
        both.set(fmt.KEY_RUNTIME_MIN, fmt.RUNTIME_MIN)
        single = both.write(tmp_path / f"one-{type_}.gguf")
        with Context(single) as context:
            assert context.library.skipcat_n_levels(context.model) == 1
            assert context.library.skipcat_level_ratio(context.model, 0) == pytest.approx(LEVELS[-1])
            expected = prompt_and_steps(context)
        with Context(with_levels) as context:
            for level in PLACES:
                context.level = level
                np.testing.assert_array_equal(prompt_and_steps(context), expected)


def test_a_level_leaves_other_contexts_alone(files: Callable[[str], LevelFiles]) -> None:
    with Context(files("F16").path) as context:
        context.level = 0
        params = context.api.llama_context_default_params()
        params.n_ctx = 64
        other = context.api.llama_init_from_model(context.model, params)
        assert (context.library.skipcat_get_level(other), context.level) == (2, 0)
        context.api.llama_free(other)


def test_eight_levels(tmp_path: Path) -> None:
    levels = [0.1 * place for place in range(1, 9)]
    base = small_base(tmp_path)
    steps = {1: tuple(Stage("ffn_down", ("ffn_down",), place, 7, 32, place % 2 == 0) for place in range(8))}
    files = add_levels(base, SIZES, steps, Type.F32, tmp_path, "llama", levels)
    with Context(files.path) as context:
        for level in (7, 0, 3, 7):
            context.level = level
            logits = prompt_and_steps(context)
            with Context(files.dense[level]) as reference:
                assert relative_error(logits, prompt_and_steps(reference)) < TOLERANCE["F32"]
