"""Save the logits of a fixed token sequence: logits_worker.py MODEL OUT.npy.

Prints whether the llama.cpp library in use is patched. LLAMA_CPP_LIB_PATH chooses another one.
"""

from __future__ import annotations

import sys

import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_cpp import _lib

PROMPT, STEPS = 75, 5  # a prompt that no block of rows divides, then tokens one by one


def main() -> None:
    model, out = sys.argv[1:]
    print("patched" if hasattr(_lib, "skipcat_runtime_version") else "stock")
    llama = Llama(model, n_ctx=256, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False)
    tokens = np.random.default_rng(0).integers(3, llama.n_vocab(), PROMPT + STEPS).tolist()
    llama.eval(tokens[:PROMPT])
    for token in tokens[PROMPT:]:
        llama.eval([token])
    np.save(out, llama.scores[: len(tokens)])


if __name__ == "__main__":
    main()
