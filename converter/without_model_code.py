"""A model's folder as others may see it: nothing in it is a program, and nothing names one.

transformers and llama.cpp's converter, which sets trust_remote_code for some tokenizers, run Python files
that a configuration names in `auto_map`, and transformers runs compiled code from the hub that it names as
implementation of attention. So neither is shown the folder itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from skipcat_edge.errors import UserError

from .pickled import has_pickled_weights
from .source_files import pickles, readable_files

_NAMES_CODE = frozenset({
    "auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal",
})


@dataclass(frozen=True)
class SafeModel:
    """A folder of links to a model's files, called as the model is."""

    folder: Path
    pickled: bool
    """Its weights are pickles, which the user allowed."""
    own_code: bool
    """The model's own folder names Python code."""

    def explain(self, model: Path, problem: str) -> str:
        """`problem` of a program that was given `folder`, as one of `model`."""
        problem = problem.replace(str(self.folder), str(model))
        if not self.own_code:
            return problem
        return f"{problem}; it may need the Python code that comes with it, which is never run"


@contextmanager
def without_model_code(model: Path, allow_pickle: bool = False) -> Iterator[SafeModel]:
    """The Hugging Face directory `model` without its code, as long as the context lasts.

    Raises UserError where the weights are pickles and not allowed, where a configuration is not JSON, and
    where an index names weights outside of the folder.
    """
    pickled = has_pickled_weights(model, allow_pickle)
    with tempfile.TemporaryDirectory(prefix="skipcat-model-") as temp:
        folder = Path(temp, model.resolve().name or "model")
        folder.mkdir()
        own_code = False
        for file in [*readable_files(model), *(pickles(model) if pickled else ())]:
            own_code |= _show(model, file, folder)
        yield SafeModel(folder, pickled, own_code)


def _show(model: Path, file: Path, folder: Path) -> bool:
    """Link one file, or copy what is left of it; whether it names Python code."""
    place = folder / file
    place.parent.mkdir(exist_ok=True)
    if file.name.endswith(".index.json"):
        read_index(model / file)
    if file.suffix == ".json" and "config" in file.name:
        value = _read_json(model / file)
        kept = _without_code(value)
        if kept != value:
            place.write_text(json.dumps(kept), "utf-8")
            return "auto_map" in json.dumps(value)
    place.symlink_to((model / file).resolve())
    return False


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key not in _NAMES_CODE}
    return [_without_code(item) for item in value] if isinstance(value, list) else value


def read_index(path: Path) -> Any:
    """What an index of weights holds, in JSON's types. Raises UserError where it is not JSON, or names other
    files than those of its folder, of its own kind."""
    value = _read_json(path)
    parts = value.get("weight_map") if isinstance(value, dict) else None
    suffix = PurePosixPath(path.name.removesuffix(".index.json")).suffix
    for part in parts.values() if isinstance(parts, dict) else ():
        if not isinstance(part, str) or "/" in part or "\\" in part or not part.endswith(suffix):
            raise UserError(f"{path} names {part!r} as a part of the model, which is no *{suffix} beside it; "
                            "get the model again from a source that you trust.")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__}); get the model again."
                        ) from None
