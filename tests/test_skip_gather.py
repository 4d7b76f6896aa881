"""The op SKIP_GATHER in the installed library against NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from skipcat_edge.format import pack_skip_mask

pytestmark = pytest.mark.runtime

F32, I32 = 0, 26


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def cpu_library() -> ctypes.CDLL:
    """The CPU backend in use; of a wheel with several, the one that llama.cpp chose."""
    from llama_cpp import llama_cpp

    from skipcat_edge.runtime.check import loaded_cpu_variant
    from skipcat_edge.runtime.library import library_dir, load_library

    if not any(library_dir().glob("libggml-cpu-*")):
        return load_library("ggml-cpu")
    llama_cpp.llama_supports_rpc()  # loads the backends
    return load_library(f"ggml-cpu-{loaded_cpu_variant()}")


class Ggml:
    """The few functions of ggml that a one-node graph needs, without their prefix."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __init__(self) -> None:
        from skipcat_edge.runtime.library import load_library

        self.base, self.cpu = load_library("ggml-base"), cpu_library()
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for library, name, result, arguments in (
            (self.base, "ggml_init", pointer, [_InitParams]),
            (self.base, "ggml_free", None, [pointer]),
            (self.base, "ggml_new_tensor_1d", pointer, [pointer, ctypes.c_int, size]),
            (self.base, "ggml_new_tensor_4d", pointer, [pointer, ctypes.c_int, size, size, size, size]),
            (self.base, "ggml_view_4d", pointer,
             [pointer, pointer, size, size, size, size, *[ctypes.c_size_t] * 4]),
            (self.base, "ggml_get_data", pointer, [pointer]),
            (self.base, "ggml_nbytes", ctypes.c_size_t, [pointer]),
            (self.base, "ggml_new_graph", pointer, [pointer]),
            (self.base, "ggml_build_forward_expand", None, [pointer, pointer]),
            (self.base, "ggml_skip_gather", pointer, [pointer, pointer, pointer, size]),
            (self.base, "ggml_backend_graph_compute", ctypes.c_int, [pointer, pointer]),
            (self.base, "ggml_backend_free", None, [pointer]),
            (self.cpu, "ggml_backend_cpu_init", pointer, []),
            (self.cpu, "ggml_backend_cpu_set_n_threads", None, [pointer, ctypes.c_int]),
            (self.cpu, "ggml_backend_cpu_set_use_ref", None, [pointer, ctypes.c_bool]),
        ):  # fmt: skip
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def gather(self, x: np.ndarray, skip: np.ndarray, *, n_threads: int, reference: bool,
               row_padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(x_rest, x_skip) of x: [n3, n2, n1, n]; rows lie `row_padding` elements apart."""
        n3, n2, n1, n = x.shape
        context = self.init(_InitParams(1 << 24, None, False))
        backend = self.backend_cpu_init()
        try:
            store = self.new_tensor_4d(context, F32, n + row_padding, n1, n2, n3)
            stride = 4 * (n + row_padding)
            source = self.view_4d(context, store, n, n1, n2, n3, stride, stride * n1, stride * n1 * n2, 0)
            words = pack_skip_mask(skip)
            mask = self.new_tensor_1d(context, I32, len(words))
            result = self.skip_gather(context, source, mask, int(skip.sum()))
            padded = np.full((n3, n2, n1, n + row_padding), np.nan, np.float32)
            padded[..., :n] = x
            ctypes.memmove(self.get_data(store), padded.ctypes.data, padded.nbytes)
            ctypes.memmove(self.get_data(mask), words.ctypes.data, words.nbytes)
            graph = self.new_graph(context)
            self.build_forward_expand(graph, result)
            self.backend_cpu_set_n_threads(backend, n_threads)
            self.backend_cpu_set_use_ref(backend, reference)
            assert self.backend_graph_compute(backend, graph) == 0
            out = np.empty(x.size, np.float32)
            assert self.nbytes(result) == out.nbytes
            ctypes.memmove(out.ctypes.data, self.get_data(result), out.nbytes)
        finally:
            self.backend_free(backend)
            self.free(context)
        n_rest = n - int(skip.sum())
        split = n_rest * n1 * n2 * n3
        return out[:split].reshape(n3, n2, n1, n_rest), out[split:].reshape(n3, n2, n1, n - n_rest)


@pytest.fixture(scope="module")
def ggml() -> Iterator[Ggml]:
    yield Ggml()


def masks(n: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Edges first: only the first, only the last, all but one, alternating; then random ranks."""
    for chosen in ([0], [n - 1], range(n - 1), range(1, n), range(0, n, 2), range(n // 2), range(n // 2, n)):
        skip = np.zeros(n, dtype=bool)
        skip[list(chosen)] = True
        yield skip
    for _ in range(4):
        skip = np.zeros(n, dtype=bool)
        skip[rng.choice(n, rng.integers(1, n), replace=False)] = True
        yield skip


@pytest.mark.parametrize("reference", [False, True], ids=["simd", "generic"])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 15, 31, 32, 33, 63, 64, 65, 100, 172, 257, 2048])
def test_equals_numpy(ggml: Ggml, n: int, reference: bool) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((1, 1, 3, n)).astype(np.float32)
    for skip in masks(n, rng):
        rest, skipped = ggml.gather(x, skip, n_threads=1, reference=reference)
        np.testing.assert_array_equal(rest, x[..., ~skip])
        np.testing.assert_array_equal(skipped, x[..., skip])


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (1, 3, 5), (2, 3, 4)])
def test_rows_strides_and_threads(ggml: Ggml, shape: tuple[int, int, int], n_threads: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*shape, 77)).astype(np.float32)
    skip = rng.random(77) < 0.6
    rest, skipped = ggml.gather(x, skip, n_threads=n_threads, reference=False, row_padding=5)
    np.testing.assert_array_equal(rest, x[..., ~skip])
    np.testing.assert_array_equal(skipped, x[..., skip])


def test_values_are_moved_not_computed(ggml: Ggml) -> None:
    x = np.array([[[[np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.0, 4.0, 5.0, 6.0]]]], dtype=np.float32)
    skip = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1], dtype=bool)
    rest, skipped = ggml.gather(x, skip, n_threads=1, reference=False)
    assert rest.tobytes() == x[..., ~skip].tobytes()
    assert skipped.tobytes() == x[..., skip].tobytes()
