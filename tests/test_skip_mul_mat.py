"""The op SKIP_MUL_MAT in the installed library against NumPy, and against the graph that it fuses."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from test_skip_gather import F32, I32, Ggml, _InitParams

from skipcat_edge.format import pack_skip_mask
from skipcat_edge.runtime.check import runtime_status
from skipcat_edge.runtime.library import quantize

pytestmark = pytest.mark.runtime

# What rounding x may change, as a share of |T| |x_R| + |x_S|.
TOLERANCE = {"F32": 1e-6, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 8e-3, "Q4_0": 8e-3, "Q5_1": 8e-3, "Q4_K": 8e-3,
             "Q5_K": 8e-3, "Q6_K": 8e-3, "IQ4_NL": 8e-3}
# The error's norm as a share of the result's, where there are enough numbers for one.
_NORM = {"F32": 1e-5, "F16": 2e-3}
_GRAPH_BYTES = 1 << 28
# The feature that a CPU of this kind needs for ggml to repack weights, and their types.
REPACKING, REPACKED = (
    ("DOTPROD", ("Q4_0", "IQ4_NL", "Q8_0", "Q4_K", "Q5_K", "Q6_K"))
    if platform.machine().lower() in ("aarch64", "arm64") else ("AVX2", ("Q4_0", "IQ4_NL", "Q4_K"))
)


class Fused(Ggml):
    """Also what puts weights into a buffer of their own, and the composed graph."""

    def __init__(self) -> None:
        super().__init__()
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for library, name, result, arguments in (
            (self.base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, size, size]),
            (self.base, "ggml_mul_mat", pointer, [pointer] * 3),
            (self.base, "ggml_add", pointer, [pointer] * 3),
            (self.base, "ggml_skip_mul_mat", pointer, [pointer] * 4),
            (self.base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer] * 2),
            (self.base, "ggml_backend_tensor_set", None, [pointer, pointer, *[ctypes.c_size_t] * 2]),
            (self.base, "ggml_backend_buffer_free", None, [pointer]),
            (self.base, "ggml_backend_cpu_buffer_type", pointer, []),
        ):  # fmt: skip
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.repacked_type = self.cpu._Z35ggml_backend_cpu_repack_buffer_typev
        self.repacked_type.restype = pointer


@dataclass(frozen=True)
class Case:
    """z = T x_R + x_S of random numbers."""

    type: str
    n: int
    rank: int
    rows: int
    threads: int = 2
    repacked: bool = False
    row_padding: int = 0
    planes: int = 1
    """The rows are split over this many matrices."""


def compute(ggml: Fused, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(fused, composed, NumPy's float64, |T| |x_R| + |x_S|) of the same numbers: [rows, rank] each."""
    rng = np.random.default_rng([case.n, case.rank, case.rows])
    type_ = GGMLQuantizationType[case.type]
    n_rest = case.n - case.rank
    stored = quantize(rng.standard_normal((case.rank, n_rest)).astype(np.float32), type_)
    T = quants.dequantize(stored, type_).astype(np.float64)
    x = rng.standard_normal((case.rows, case.n)).astype(np.float32)
    skip = np.zeros(case.n, bool)
    skip[rng.choice(case.n, case.rank, replace=False)] = True
    expected = x[:, ~skip].astype(np.float64) @ T.T + x[:, skip]
    size = np.abs(x[:, ~skip]) @ np.abs(T.T) + np.abs(x[:, skip])

    weights = ggml.init(_InitParams(1 << 16, None, True))
    t = ggml.new_tensor_2d(weights, int(type_), n_rest, case.rank)
    buffer_type = ggml.repacked_type() if case.repacked else ggml.backend_cpu_buffer_type()
    buffer = ggml.backend_alloc_ctx_tensors_from_buft(weights, buffer_type)
    ggml.backend_tensor_set(t, stored.ctypes.data, 0, stored.nbytes)
    context, backend = ggml.init(_InitParams(_GRAPH_BYTES, None, False)), ggml.backend_cpu_init()
    try:
        ggml.backend_cpu_set_n_threads(backend, case.threads)
        stride = case.n + case.row_padding
        store = ggml.new_tensor_2d(context, F32, stride, case.rows)
        n1 = case.rows // case.planes
        source = ggml.view_4d(context, store, case.n, n1, case.planes, 1, 4 * stride, 4 * stride * n1,
                              4 * stride * case.rows, 0)
        padded = np.full((case.rows, stride), np.nan, np.float32)
        padded[:, : case.n] = x
        ctypes.memmove(ggml.get_data(store), padded.ctypes.data, padded.nbytes)
        words = pack_skip_mask(skip)
        mask = ggml.new_tensor_1d(context, I32, len(words))
        ctypes.memmove(ggml.get_data(mask), words.ctypes.data, words.nbytes)
        parts = ggml.skip_gather(context, source, mask, case.rank)

        def part(size: int, offset: int) -> int:
            row, plane = 4 * size, 4 * size * n1
            view: int = ggml.view_4d(context, parts, size, n1, case.planes, 1, row, plane,
                                     plane * case.planes, 4 * offset)
            return view

        product = ggml.mul_mat(context, t, part(n_rest, 0))
        composed = ggml.add(context, product, part(case.rank, n_rest * case.rows))
        found = []
        for result in (ggml.skip_mul_mat(context, t, source, mask), composed):
            graph = ggml.new_graph(context)
            ggml.build_forward_expand(graph, result)
            assert ggml.backend_graph_compute(backend, graph) == 0
            out = np.empty((case.rows, case.rank), np.float32)
            assert ggml.nbytes(result) == out.nbytes
            ctypes.memmove(out.ctypes.data, ggml.get_data(result), out.nbytes)
            found.append(out)
    finally:
        ggml.backend_free(backend)
        ggml.free(context)
        ggml.backend_buffer_free(buffer)
        ggml.free(weights)
    return found[0], found[1], expected, size


@pytest.fixture(scope="module")
def ggml() -> Iterator[Fused]:
    yield Fused()


def check(ggml: Fused, case: Case) -> None:
    fused, composed, expected, size = compute(ggml, case)
    if case.planes == 1:  # of which mul_mat takes one at a time, with another kernel perhaps
        np.testing.assert_array_equal(fused, composed)
    for found in (fused, composed):
        assert (np.abs(found - expected) <= TOLERANCE[case.type] * size).all()
    if expected.size >= 64 and case.n - case.rank >= 64:
        assert np.linalg.norm(fused - expected) < _NORM.get(case.type, 2e-2) * np.linalg.norm(expected)


@pytest.mark.parametrize("type_", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 33, 128])
def test_equals_numpy_and_the_composed_graph(ggml: Fused, type_: str, rows: int) -> None:
    n, rank = (768, 256) if type_.endswith("K") else (576, 64)
    check(ggml, Case(type_, n, rank, rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 9, 64])
@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_threads(ggml: Fused, rows: int, threads: int) -> None:
    check(ggml, Case("Q8_0", 320, 96, rows, threads))
    check(ggml, Case("F32", 77, 30, rows, threads, row_padding=5))


@pytest.mark.parametrize(("n", "rank"), [(2, 1), (33, 1), (64, 63), (40, 7), (100, 99), (999, 3), (257, 129)])
@pytest.mark.parametrize("rows", [1, 5, 512])
def test_tiny_and_odd_ranks(ggml: Fused, n: int, rank: int, rows: int) -> None:
    check(ggml, Case("F32", n, rank, rows, threads=3))
    check(ggml, Case("F16", n, rank, rows, threads=3))


@pytest.mark.parametrize("type_", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize(("rows", "planes"), [(2, 2), (12, 3), (14, 2)])
def test_rows_of_several_matrices(ggml: Fused, type_: str, rows: int, planes: int) -> None:
    check(ggml, Case(type_, 320, 96, rows, threads=3, row_padding=4, planes=planes))
    if type_ in REPACKED and repacks():
        check(ggml, Case(type_, 320, 96, rows, threads=3, repacked=True, planes=planes))


def repacks() -> bool:
    return REPACKING in runtime_status().cpu_features


@pytest.mark.parametrize("type_", REPACKED)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 7, 31, 128, 512])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_repacked_weights(ggml: Fused, type_: str, rows: int, threads: int) -> None:
    if not repacks():
        pytest.skip(f"this CPU has no {REPACKING}")
    if type_.endswith("K"):
        check(ggml, Case(type_, 768, 256, rows, threads, repacked=True))
        return
    check(ggml, Case(type_, 256 + 64, 64, rows, threads, repacked=True))
    check(ggml, Case(type_, 256 + 40, 40, rows, threads, repacked=True))  # no whole tiles of 16
    if type_ == "Q4_0" and rows <= 128:
        check(ggml, Case(type_, 2048, 832, rows, threads, repacked=True, row_padding=8))
