"""Which files of a Hugging Face model are read: weights, configuration and vocabulary, never a program."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

# All else stays unread: Python files, pickles of any other name, adapters, which transformers would load by
# itself, and the weights of other frameworks.
READ = ("*.json", "*.jsonl", "*.safetensors", "*.model", "*.model.v3", "*.txt", "*.tiktoken", "*.vocab",
        "*.bpe", "*.codes", "*.spm", "*.jinja", "*.md", "LICEN[CS]E*", "COPYING*")
NEVER_READ = ("adapter_*", "*.bin.index.json", ".*")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def is_read(name: str) -> bool:
    """Whether a file of this name is, in the model's folder or in one of its folders."""
    return _matches(name, READ) and not _matches(name, NEVER_READ)


def readable_files(model: Path) -> Iterator[Path]:
    """Regular files that are read, relative to `model`: its own, and those one folder below, as those of
    sentence-transformers are."""
    for path in sorted(model.iterdir()):
        if path.name.startswith("."):
            continue
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        yield from (file.relative_to(model) for file in inside if is_read(file.name) and file.is_file())


def hub_patterns(allow_pickle: bool) -> list[str]:
    """What is fetched of a model on the hub, as huggingface_hub matches it: `*` passes a slash."""
    return [*READ, *(PICKLES if allow_pickle else ())]


def pickles(model: Path) -> list[Path]:
    """Its weights that are pickles, with their index, relative to `model`."""
    return [path.relative_to(model) for path in sorted(model.iterdir())
            if _matches(path.name, PICKLES) and path.is_file()]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
