"""Print the tokens of a greedy continuation: greedy_worker.py MODEL PROMPT STEPS."""

from __future__ import annotations

import sys

from llama_cpp import Llama


def main() -> None:
    model, prompt, steps = sys.argv[1:]
    llama = Llama(model, n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False)
    tokens = llama.tokenize(prompt.encode())
    for _, token in zip(range(int(steps)), llama.generate(tokens, temp=0.0), strict=False):
        print(token)


if __name__ == "__main__":
    main()
