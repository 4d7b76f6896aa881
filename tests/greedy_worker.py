"""Print the tokens of a greedy continuation: greedy_worker.py MODEL PROMPT STEPS.

A line each: the token, the second likeliest one, and how much less its logit is.
"""

from __future__ import annotations

import sys

import llama_cpp
from llama_cpp import Llama


def main() -> None:
    model, prompt, steps = sys.argv[1:]
    llama = Llama(model, n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False)
    size = llama.n_vocab()
    tokens = llama.tokenize(prompt.encode())
    for _, token in zip(range(int(steps)), llama.generate(tokens, temp=0.0), strict=False):
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)[:size]
        first, second = sorted(range(size), key=lambda each: -logits[each])[:2]
        print(token, second if token == first else first, abs(logits[first] - logits[second]))


if __name__ == "__main__":
    main()
