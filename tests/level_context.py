"""A context of llama.cpp's C interface whose rank level a test can change."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from skipcat_edge.llama_log import keep_log


def levels_library() -> Any:
    """libllama with the types of the functions for rank levels."""
    from llama_cpp.llama_cpp import _lib as library

    pointer, int32 = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("skipcat_n_levels", int32, [pointer]),
        ("skipcat_level_ratio", ctypes.c_float, [pointer, int32]),
        ("skipcat_get_level", int32, [pointer]),
        ("skipcat_set_level", int32, [pointer, int32]),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Context:
    """A model with one context; attention and its cache are F32, so that only products round."""

    def __init__(self, path: Path, *, threads: int = 1, sequences: int = 1, embedding: bool = False) -> None:
        import llama_cpp

        keep_log()
        self.api = llama_cpp
        self.library = levels_library()
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, path
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 256, 64, 64, sequences
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.kv_unified = True
        params.embeddings = embedding
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        assert self.ctx
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)))
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.api.llama_free(self.ctx)
        self.api.llama_model_free(self.model)

    @property
    def level(self) -> int:
        """Place of the level that decodes use."""
        return int(self.library.skipcat_get_level(self.ctx))

    @level.setter
    def level(self, level: int) -> None:
        assert self.library.skipcat_set_level(self.ctx, level) == 0

    def clear(self) -> None:
        """Forget all that was decoded."""
        self.api.llama_memory_clear(self.memory, True)

    def decode(self, tokens: Sequence[int], position: int, sequence: int = 0) -> np.ndarray:
        """Logits of `tokens`: [tokens, vocabulary]."""
        return self.decode_all([(token, position + i, sequence) for i, token in enumerate(tokens)])

    def decode_all(self, tokens: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Logits of (token, position, sequence), decoded as one batch: [tokens, vocabulary]."""
        self._run(self.api.llama_decode, tokens)
        pointer = self.api.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(pointer, (len(tokens), self.n_vocab)).copy()

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """The pooled embedding of `tokens`."""
        self._run(self.api.llama_encode, [(token, i, 0) for i, token in enumerate(tokens)])
        pointer = self.api.llama_get_embeddings_seq(self.ctx, 0)
        return np.ctypeslib.as_array(pointer, (self.api.llama_model_n_embd(self.model),)).copy()

    def reused_graphs(self) -> int:
        """How many decodes used the graph of the one before."""
        return int(self.api.llama_perf_context(self.ctx).n_reused)

    def _run(self, function: Any, tokens: Sequence[tuple[int, int, int]]) -> None:
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, position, sequence) in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, True
            assert function(self.ctx, batch) == 0
        finally:
            self.api.llama_batch_free(batch)

    def state(self, sequence: int = 0) -> bytes:
        """The KV cache of a sequence."""
        size = self.api.llama_state_seq_get_size(self.ctx, sequence)
        data = (ctypes.c_uint8 * size)()
        assert self.api.llama_state_seq_get_data(self.ctx, data, size, sequence) == size
        return bytes(data)

    def restore(self, state: bytes, sequence: int = 0) -> None:
        """Go on from the KV cache of another context."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert self.api.llama_state_seq_set_data(self.ctx, data, len(state), sequence) == len(state)
