"""Several texts at once in one context: a step of all reads the weights once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skipcat_edge.errors import UserError
from skipcat_edge.session import CONTEXT_STEP, decode_error, import_llama_cpp

if TYPE_CHECKING:
    import numpy as np


class Sequences:
    """A second context of a loaded model, which Llama has no argument for. `clear` and `set_level` take it
    in a Llama's place."""

    def __init__(self, llama: Any, count: int, length: int, batch: int) -> None:
        """For `count` texts of up to `length` tokens, `batch` tokens at a time. Raises UserError if there is
        not enough memory."""
        llama_cpp = import_llama_cpp()
        self._llama, self._batch = llama, llama_cpp.llama_batch_init(batch, 0, 1)
        self.model, self.model_path, self.n_vocab = llama.model, llama.model_path, int(llama.n_vocab())
        params = llama_cpp.llama_context_params.from_buffer_copy(llama.context_params)
        params.n_ctx = count * -(-length // CONTEXT_STEP) * CONTEXT_STEP
        params.n_batch = params.n_ubatch = batch
        params.n_seq_max, params.kv_unified = count, False
        self.ctx = llama_cpp.llama_init_from_model(llama.model, params)
        if not self.ctx:
            self.close()
            raise UserError(f"{self.model_path}: a context for {count} texts of {length} tokens cannot be "
                            "created; free memory or use a smaller --window.")

    def last_logits(self, tokens: Mapping[int, Sequence[int]], position: int) -> np.ndarray:
        """Logits after the last of each text's `tokens`, by the text's number; the first of them stand at
        `position`: float32 [texts, vocabulary].

        A view of llama.cpp's own memory, valid until the next call. Raises UserError if llama.cpp fails.
        """
        import numpy as np

        llama_cpp = import_llama_cpp()
        batch, index = self._batch, 0
        for sequence, each in tokens.items():
            for place, token in enumerate(each):
                batch.token[index], batch.pos[index] = token, position + place
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = place == len(each) - 1
                index += 1
        batch.n_tokens = index
        code = llama_cpp.llama_decode(self.ctx, batch)
        if code:
            raise decode_error(f"llama_decode returned {code}")
        pointer = llama_cpp.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), self.n_vocab))

    def close(self) -> None:
        """Free the context and the model."""
        llama_cpp = import_llama_cpp()
        llama_cpp.llama_batch_free(self._batch)
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
        self._llama.close()
