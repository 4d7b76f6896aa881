"""Call llama.cpp as a program in C does, where a mistake may end the process; prints what came of it as JSON.

`api_worker.py tokenize FILE TEXT` loads FILE and prints the text's tokens; `api_worker.py misuse FILE` gives
llama_decode and llama_encode of an encoder more tokens than it may compute at once, which llama.cpp asserts.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp

LOG_ERROR = 4
errors: list[str] = []


@llama_cpp.llama_log_callback
def log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    if level == LOG_ERROR:
        errors.append(text.decode("utf-8", "replace"))


def tokenize(model: Any, text: str) -> dict[str, Any]:
    tokens = (llama_cpp.llama_token * 1024)()
    data = text.encode()
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, 1024, True, False)
    return {"tokens": tokens[: max(0, count)]}


def misuse(model: Any) -> dict[str, Any]:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 32, 16, 8
    context = llama_cpp.llama_init_from_model(model, params)
    tokens = (llama_cpp.llama_token * 16)(*[5] * 16)
    batch = llama_cpp.llama_batch_get_one(tokens, 16)
    return {
        "decode": llama_cpp.llama_decode(context, batch),
        "encode": llama_cpp.llama_encode(context, batch),
    }


def main() -> None:
    way, path, *more = sys.argv[1:]
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    found = {"tokenize": tokenize, "misuse": misuse}[way](model, *more) if model else {}
    print(json.dumps({"loaded": bool(model), "errors": "".join(errors), **found}))


if __name__ == "__main__":
    main()
