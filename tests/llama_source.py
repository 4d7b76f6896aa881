"""Which weights the graphs of llama.cpp multiply by other means than `build_lora_mm`: read from its source.

A weight's way is followed from the layer's field through aliases and helper functions until it
reaches `build_lora_mm` or a ggml function. A use that this reader does not understand raises
ValueError, so that a newer pin cannot slip something past it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Field of llama_layer -> LLM_TENSOR_ of the weight that it holds; `weight_fields` proves it.
FIELDS = {
    "wq": "ATTN_Q", "wk": "ATTN_K", "wv": "ATTN_V", "wqkv": "ATTN_QKV", "wo": "ATTN_OUT",
    "ffn_gate": "FFN_GATE", "ffn_up": "FFN_UP", "ffn_down": "FFN_DOWN",
}  # fmt: skip
_FIELD = re.compile(rf"(?:\.|->)\s*({'|'.join(FIELDS)})\b")
_CONDITIONS = {"if", "while", "switch", "GGML_ASSERT"}


@dataclass(frozen=True)
class Function:
    """A function or lambda: qualified name without template arguments, parameters' names, body."""

    name: str
    parameters: tuple[str, ...]
    body: str
    file: str


def clean(source: str) -> str:
    """C++ without comments, preprocessor lines and what strings hold."""
    pattern = r'//[^\n]*|/\*.*?\*/|^\s*#(?:[^\n]*\\\n)*[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\''
    return re.sub(pattern, lambda m: '""' if m[0][0] == '"' else " ", source, flags=re.S | re.M)


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    pairs = {"(": ")", "{": "}", "[": "]"}
    depth = 0
    for i in range(start, len(text)):
        if text[i] == text[start]:
            depth += 1
        elif text[i] == pairs[text[start]]:
            depth -= 1
            if depth == 0:
                return i
    raise ValueError(f"unbalanced {text[start]} in {text[start:start + 80]!r}")


def split(arguments: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(arguments):
        depth += (c in "([{<") - (c in ")]}" or (c == ">" and arguments[i - 1] != "-"))
        if c == "," and depth == 0:
            parts.append(arguments[last:i])
            last = i + 1
    return [*parts, arguments[last:]] if arguments.strip() else []


def parameter_names(text: str) -> tuple[str, ...]:
    names = (re.findall(r"\w+", parameter.split("=")[0]) for parameter in split(text))
    return tuple(words[-1] if words else "" for words in names)


def functions(source: str, file: str) -> Iterator[Function]:
    """Every function defined at the top level of `source`, and every named lambda."""
    at = 0
    while (brace := source.find("{", at)) >= 0:
        head = source[at:brace]
        head = head[head.rfind(";") + 1:]
        end = closing(source, brace)
        found = re.search(r"((?:\w+(?:<[^<>]*>)?::)*~?\w+)\s*\(", head)
        if found and not re.match(r"\s*(?:struct|class|enum|namespace|union)\b", head):
            name = re.sub(r"<[^<>]*>", "", found[1])
            parameters = head[found.end():closing(head, found.end() - 1)]
            body = source[brace + 1:end]
            yield Function(name, parameter_names(parameters), body, file)
            for lambda_ in re.finditer(r"\bauto\s*&?\s*(\w+)\s*=\s*\[[^\]]*\]\s*\(", body):
                close = closing(body, lambda_.end() - 1)
                opening = body.index("{", close)
                inner = body[opening + 1:closing(body, opening)]
                inner_parameters = parameter_names(body[lambda_.end():close])
                yield Function(f"{name}::{lambda_[1]}", inner_parameters, inner, file)
        at = end + 1


def calls(text: str, position: int) -> Iterator[tuple[str, int]]:
    """Function and argument index of every call that encloses `position`, innermost first.

    Ends with ("", 0) at the statement's beginning, or ("=NAME", 0) if NAME is assigned there.
    """
    depth, commas, i = 0, 0, position - 1
    while i >= 0 and not (depth == 0 and text[i] in ";{}"):
        if text[i] in ")]}":
            depth += 1
        elif text[i] in "([{":
            if depth > 0:
                depth -= 1
            else:
                if text[i] == "(":
                    name = re.search(r"(\w+)(?:<[^<>()]*>)?\s*$", text[:i])
                    if name:
                        yield name[1], commas
                commas = 0
        elif text[i] == "," and depth == 0:
            commas += 1
        i -= 1
    assigned = re.search(r"(\w+)\s*=\s*[^=;,]*$", text[i + 1:position])
    yield f"={assigned[1]}" if assigned else "", 0


class Source:
    """The graphs in a llama.cpp source tree."""

    def __init__(self, llama_cpp: Path) -> None:
        self.src = llama_cpp / "src"
        self.functions = [
            function
            for path in [self.src / "llama-graph.cpp", *sorted((self.src / "models").glob("*.cpp"))]
            for function in functions(clean(path.read_text("utf-8")), path.name)
        ]
        self.header = clean((self.src / "models" / "models.h").read_text("utf-8"))
        self._names: dict[tuple[int, str], bool] = {}

    def architectures(self) -> dict[str, str]:
        """Architecture's name -> class, for example `llama` -> `llama_model_llama`."""
        names = (self.src / "llama-arch.cpp").read_text("utf-8")
        enum = dict(re.findall(r'\{\s*(LLM_ARCH_\w+),\s*"([^"]+)"', names))
        # CLIP's class builds no graph.
        mapping = clean((self.src / "llama-model.cpp").read_text("utf-8"))
        found = re.findall(r"case (LLM_ARCH_\w+):\s*return new (llama_model_\w+)\(params\)", mapping)
        return {enum[case]: class_ for case, class_ in found if class_ != "llama_model_clip"}

    def graph_classes(self, model: str) -> set[str]:
        """Qualified names of every class whose methods may build `model`'s graphs."""
        head = re.search(rf"^struct {model} : public (\w+) \{{", self.header, re.M)
        assert head, model
        body = self.header[head.end():closing(self.header, head.end() - 1)]
        found: set[str] = set()
        for name, base in re.findall(r"struct (graph\w*) : public ([\w:]+)", body):
            found |= {f"{model}::{name}"} | ({base} if "::" in base or base.endswith("_base") else set())
        for other in re.findall(r"using graph\w* = (llama_model_\w+)::graph", body):
            found |= self.graph_classes(other)
        return found or self.graph_classes(head[1])

    def unserved(self, model: str) -> set[str]:
        """LLM_TENSOR_ of the weights that reach a ggml function instead of `build_lora_mm`."""
        classes = self.graph_classes(model)
        mine = [f for f in self.functions if f.name.rpartition("::")[0] in classes]
        # Free functions and lambdas may take a whole layer.
        files = {f.file for f in mine}
        mine += [f for f in self.functions if "::" not in f.name and f.file in files]
        return {
            FIELDS[field[1]]
            for function in mine
            for field in _FIELD.finditer(function.body)
            if not self._served(function, field.start(), field.end())
        } | self._seen_by_loader(model)

    def shared_helpers_serve(self) -> bool:
        """Whether llama-graph.cpp itself, `build_qkv` for one, serves every layer it is handed."""
        shared = [f for f in self.functions if f.file == "llama-graph.cpp"]
        uses = [(f, use) for f in shared for use in _FIELD.finditer(f.body)]
        return len(uses) > 0 and all(self._served(f, use.start(), use.end()) for f, use in uses)

    def weight_fields(self) -> set[tuple[str, str]]:
        """(field, LLM_TENSOR_) of every weight of a layer that some loader assigns to a field."""
        files = [self.src / "llama-model.cpp", *(self.src / "models").glob("*.cpp")]
        text = "\n".join(path.read_text("utf-8") for path in files)
        pattern = r'(\w+)\s*=\s*create_tensor\s*\(\s*tn\(LLM_TENSOR_(\w+),\s*"weight"'
        return set(re.findall(pattern, text))

    def tensor_names(self) -> dict[str, str]:
        """LLM_TENSOR_ -> name in a file, for example `ATTN_Q` -> `blk.%d.attn_q`."""
        text = (self.src / "llama-arch.cpp").read_text("utf-8")
        return dict(re.findall(r'\{\s*LLM_TENSOR_(\w+),\s*"([^"]+)"\s*\}', text))

    def _seen_by_loader(self, model: str) -> set[str]:
        # A loader that looks at a weight in the file before it creates it finds none for a low-rank layer.
        for path in (self.src / "models").glob("*.cpp"):
            text = path.read_text("utf-8")
            if f"{model}::load_arch_tensors(" in text:
                looked = re.findall(r'(?<!create_tensor\()tn\(LLM_TENSOR_(\w+),\s*"weight"', text)
                return set(looked) & set(FIELDS.values())
        parent = re.search(rf"^struct {model} : public (\w+)", self.header, re.M)
        assert parent, model
        return self._seen_by_loader(parent[1])

    def _served(self, function: Function, start: int, end: int) -> bool:
        """Whether the weight that is named at [start, end) of a body reaches nothing but build_lora_mm."""
        before, after = function.body[:start], function.body[end:].lstrip()
        expression = re.sub(r"[\w.\->\[\]]*$", "", before).rstrip()
        if after.startswith(("->", "?", "&&", "||", "==", "!=")) or expression.endswith(("!", "&&", "||")):
            return True  # its shape or its existence
        if re.search(r"\*\s*$", before) and after[:1] in (",", ";"):
            return True  # its declaration
        enclosing = list(calls(function.body, start))
        name, index = enclosing[0]
        if (name, index) == ("build_lora_mm", 0) or name in _CONDITIONS or ("GGML_ASSERT", 0) in enclosing:
            return True
        if name.startswith("ggml_"):
            return False
        if name.startswith("="):
            return self._name_served(function, name[1:])
        callees = [
            f for f in self.functions
            if f.name.rpartition("::")[2] == name and index < len(f.parameters)
            and f.file in (function.file, "llama-graph.cpp")
        ]
        if not callees:
            raise ValueError(f"{function.file}: cannot read {function.name}: {before[-60:]}>>{after[:20]}")
        return all(self._name_served(callee, callee.parameters[index]) for callee in callees)

    def _name_served(self, function: Function, name: str) -> bool:
        """The same for a parameter or a local variable, wherever the body names it."""
        key = id(function), name
        if key not in self._names:
            self._names[key] = True  # for a use that leads back here
            self._names[key] = all(
                self._served(function, use.start(), use.end())
                for use in re.finditer(rf"(?<![\w.>]){name}\b", function.body)
                if not re.match(r"\s*=[^=]", function.body[use.end():])
            )
        return self._names[key]
