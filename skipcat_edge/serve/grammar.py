"""Grammars of requests: what llama.cpp does not survive is refused before it gets there."""

from __future__ import annotations

import ctypes
import json
import math
import re
from typing import Any

import numpy as np

from skipcat_edge.serve.errors import RequestError
from skipcat_edge.session import import_llama_cpp

# llama.cpp follows groups and rules by recursion, and ends the process where its stack overflows.
_LONGEST = 2**17
_DEEPEST = 3000
_TERMINAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)
# Repetitions of a schema are written out, one by one.
_MOST_REPEATED = 2000
_REPEATED = ("minLength", "maxLength", "minItems", "maxItems")
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def schema_grammar(schema: Any) -> Any:
    """The grammar of a JSON schema. Raises RequestError where llama_cpp would take any JSON instead."""
    from llama_cpp import LlamaGrammar

    try:
        text = json.dumps(schema)
        if len(text) > _LONGEST:
            raise RequestError(400, f"The JSON schema has more than {_LONGEST} bytes; use a smaller one.")
        _require_few_repetitions(schema)
        return LlamaGrammar.from_json_schema(text, verbose=False)
    except RequestError:
        raise
    except Exception:  # its converter stumbles in many ways
        message = "llama_cpp knows no grammar for this JSON schema; use a simpler one."
        raise RequestError(400, message) from None


def _require_few_repetitions(schema: Any) -> None:
    if isinstance(schema, list):
        for item in schema:
            _require_few_repetitions(item)
    elif isinstance(schema, dict):
        counts = [schema.get(name) for name in _REPEATED]
        counts += map(int, re.findall(r"[{,](\d+)", str(schema.get("pattern", ""))))
        if any(isinstance(count, (int, float)) and count > _MOST_REPEATED for count in counts):
            raise RequestError(400, f"The JSON schema repeats something more than {_MOST_REPEATED} times; "
                                    "use smaller limits.")
        for item in schema.values():
            _require_few_repetitions(item)


def require_sound_grammar(llama: Any, grammar: Any) -> None:
    """Raise RequestError if llama.cpp cannot parse `grammar`; it would follow a null pointer."""
    text = grammar._grammar.encode(errors="replace")
    if len(text) > _LONGEST or _depth(grammar._grammar) > _DEEPEST:
        raise RequestError(400, f"The grammar has more than {_LONGEST} bytes or {_DEEPEST} groups inside one "
                                "another; use a simpler one.")
    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, text, grammar._root.encode())
    if not sampler:
        raise RequestError(400, "The grammar does not parse; see llama.cpp's GBNF guide.")
    llama_cpp.llama_sampler_free(sampler)


def _depth(grammar: str) -> int:
    depth = deepest = 0
    for bracket in re.findall("[()]", _TERMINAL.sub("", grammar)):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    return deepest


def sample_by_grammar(llama: Any) -> int:
    """The next token, as llama_sampler_sample takes it, which ends the process where none is allowed.

    Raises RequestError there.
    """
    llama_cpp = import_llama_cpp()
    count = llama.n_vocab()
    candidates = np.zeros(count, _CANDIDATE)
    candidates["id"] = np.arange(count)
    candidates["logit"] = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), shape=(count,))
    array = llama_cpp.llama_token_data_array(
        data=candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data)), size=count, selected=-1,
        sorted=False,
    )
    sampler = llama._sampler.sampler
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    chosen = array.data[array.selected]
    if not math.isfinite(chosen.logit):
        raise RequestError(400, "The grammar leaves this model no token to go on with; change it.")
    token = int(chosen.id)
    llama_cpp.llama_sampler_accept(sampler, token)
    return token
