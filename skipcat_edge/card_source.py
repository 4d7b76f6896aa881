"""What is known of the model that a GGUF file was made from: its name, its licence, its language."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.extra import require_packages
from skipcat_edge.format import KEY_SOURCE_NAME, field_value
from skipcat_edge.gguf_file import open_gguf

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

UNKNOWN = "unknown"
"""The hub's own word for a licence that nobody knows."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING")
# What only these licences' own texts say, in the order in which it is looked for.
_LICENCE_TEXTS = (
    ("apache-2.0", ("Apache License", "Version 2.0")),
    ("mit", ("Permission is hereby granted, free of charge, to any person obtaining a copy",)),
)


@dataclass(frozen=True)
class Source:
    """Of a GGUF file. Nothing in it is guessed: what nobody says is None, or `UNKNOWN`."""

    name: str | None = None
    """A hub id, or the name of a directory."""
    on_hub: bool = False
    """`name` is a hub id."""
    licence: str = UNKNOWN
    """As the hub abbreviates it; `other` for one that it has no abbreviation for."""
    licence_name: str | None = None
    licence_link: str | None = None
    licence_from: str | None = None
    """Which file says so."""
    language: str | tuple[str, ...] | None = None
    pipeline_tag: str | None = None


def require_hub() -> None:
    """Raise UserError where huggingface_hub, which reads and writes model cards, is missing."""
    require_packages("Model cards need", "push", "huggingface_hub")


def parse_card(content: str) -> ModelCard:
    """A model card, whose `data` is empty where its metadata is missing or broken."""
    from huggingface_hub import ModelCard

    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    try:
        return ModelCard(content, ignore_metadata_errors=True)
    except Exception:  # yaml's own errors, and ValueError
        return ModelCard("")


def source_of_directory(directory: Path, hub_id: str | None) -> Source:
    """What the README.md and the licence file in a Hugging Face `directory` say."""
    source = Source(hub_id or directory.resolve().name, on_hub=hub_id is not None)
    readme = _read(directory / "README.md")
    if readme is not None:
        source = _with_card(source, parse_card(readme).data.to_dict())
    if source.licence == UNKNOWN:
        return _with_licence_file(source, directory)
    if source.licence_link is None or "://" in source.licence_link:
        return source
    # a file beside the source, which does not lie beside our card
    return replace(source, licence_link=None if hub_id is None else
                   f"https://huggingface.co/{hub_id}/blob/main/{source.licence_link.removeprefix('./')}")


def source_of_gguf(path: Path) -> Source:
    """What the metadata of `path` says: llama.cpp's converter copies some of the source's card into it."""
    reader = open_gguf(path)

    def text(key: str) -> str | None:
        value = field_value(reader, key)
        return value if isinstance(value, str) and value else None

    languages = field_value(reader, "general.languages")
    made_from, name = text(KEY_SOURCE_NAME), text("general.name")
    licence = text("general.license")
    return Source(
        name=made_from or name, on_hub=made_from is not None and _HUB_ID.fullmatch(made_from) is not None,
        licence=_identifier(licence) if licence else UNKNOWN, licence_name=text("general.license.name"),
        licence_link=text("general.license.link"), licence_from=path.name if licence else None,
        language=tuple(map(str, languages)) if isinstance(languages, list) and languages else None,
    )


def _with_card(source: Source, data: Mapping[str, Any]) -> Source:
    def text(key: str) -> str | None:
        value = data.get(key)
        return value if isinstance(value, str) and value else None

    licence, language = data.get("license"), data.get("language")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    known = isinstance(licence, str) and bool(licence)
    return replace(
        source, licence=_identifier(str(licence)) if known else UNKNOWN, licence_name=text("license_name"),
        licence_link=text("license_link"), licence_from="README.md" if known else None,
        language=tuple(map(str, language)) if isinstance(language, list) else text("language"),
        pipeline_tag=text("pipeline_tag"),
    )


def _identifier(licence: str) -> str:
    """`Apache 2.0` -> `apache-2.0`: the hub takes no capitals and no spaces."""
    return "-".join(licence.lower().split())


def _with_licence_file(source: Source, directory: Path) -> Source:
    for file in sorted(directory.iterdir()):
        if file.name.partition(".")[0].upper() not in _LICENCE_FILES:
            continue
        content = " ".join((_read(file) or "").split())
        for licence, said in _LICENCE_TEXTS:
            if all(words in content for words in said):
                return replace(source, licence=licence, licence_from=file.name)
        if content:
            first = next(line.strip(" #*\t") for line in (_read(file) or "").splitlines() if line.strip())
            return replace(source, licence="other", licence_name=first[:80], licence_from=file.name)
    return source


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return None
