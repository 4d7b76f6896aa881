"""Sharing GGUF files with their model cards on the Hugging Face hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcat_edge.card import card_path, read_card
from skipcat_edge.card_source import UNKNOWN, parse_card
from skipcat_edge.errors import UserError, first_line
from skipcat_edge.gguf_file import require_gguf

# The hub's names of licences that let everybody use and share a model.
_PERMISSIVE = re.compile(
    r"mit|mit-0|apache-2\.0|bsd(-[234]-clause(-clear)?)?|isc|zlib|unlicense|0bsd|wtfpl|ncsa|postgresql|"
    r"bsl-1\.0|cc0-1\.0|cc-by-[234]\.[05]|cdla-permissive-[12]\.0|ecl-2\.0|afl-3\.0|artistic-2\.0"
)
_HTTP_LIBRARIES = {"requests", "urllib3", "httpx", "httpx2", "httpcore"}
README = "README.md"


@dataclass(frozen=True)
class Upload:
    """What one commit holds."""

    files: dict[str, Path | str]
    """Name in the repository -> a file of this machine, or a text."""
    licences: dict[Path, str]
    """Card -> the licence that it names, `UNKNOWN` where it names none."""

    @property
    def doubtful(self) -> dict[Path, str]:
        """The licences that are unknown, or do not look as if everybody may share the model."""
        return {card: licence for card, licence in self.licences.items()
                if not _PERMISSIVE.fullmatch(licence)}


def check_repository(repository: str) -> None:
    """Raise UserError unless `repository` is a hub id of the form owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if repository.count("/") != 1:
            raise HFValidationError("the form is owner/name")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is not a repository of the hub: {first_line(error)}; give one like "
                        "owner/name.") from None


def prepare(repository: str, files: Sequence[Path]) -> Upload:
    """The files with their cards: the card of a single file becomes the README.md; those of many keep their
    names, below a README.md that lists them.

    Raises UserError where a file is not GGUF, has no card, or has another's name, or cards name different
    licences.
    """
    contents: dict[str, Path | str] = {}
    cards: dict[Path, Any] = {}
    for file in files:
        require_gguf(file)
        if file.name in contents:
            raise UserError(f"{file} has the name of another of the files; give each a name of its own.")
        card = card_path(file)
        if not card.exists():
            raise UserError(f"{file} has no model card {card.name} beside it; make one with "
                            f"`skipcat-edge eval {file} --text TEXT --card`.")
        contents[file.name] = file
        cards[card] = parse_card(read_card(card))
    licences = {card: str(parsed.data.license or UNKNOWN) for card, parsed in cards.items()}
    different = sorted({*licences.values()})
    if len(different) > 1:
        raise UserError(f"The cards name different licences ({', '.join(different)}); use a repository for "
                        "each.")
    if len(files) == 1:
        return Upload({**contents, README: next(iter(cards))}, licences)
    for card in cards:
        if card.name == README:
            raise UserError(f"{card} would be the README.md of all files; give its GGUF file another name.")
        contents[card.name] = card
    return Upload({**contents, README: _index(repository, files, list(cards.values()))}, licences)


def _index(repository: str, files: Sequence[Path], cards: Sequence[Any]) -> str:
    from huggingface_hub import ModelCardData

    data = cards[0].data.to_dict()
    bases = list(dict.fromkeys(card.data.base_model for card in cards if card.data.base_model))
    data["base_model"] = bases[0] if len(bases) == 1 else bases or None
    data["tags"] = list(dict.fromkeys(tag for card in cards for tag in card.data.tags or []))
    pairs = [(file.name, card_path(file).name) for file in files]
    rows = [f"| [{file}]({file}) | [{card}]({card}) |" for file, card in pairs]
    return (f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n# {repository.partition('/')[2]}\n\n"
            "Each file has a card of its own: what it was made of, how, what was measured, how to run it.\n\n"
            "| file | card |\n|---|---|\n" + "\n".join(rows) + "\n")


def push(repository: str, upload: Upload, *, create: bool = False, private: bool = False, force: bool = False,
         message: str) -> str:
    """Upload in one commit; return where it is. `create` makes the repository where it is missing.

    Without `force`, the README.md of a repository that holds other GGUF files, or none of these, is not
    replaced. Raises UserError where there is no token, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise UserError("There is no token of the hub; run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    try:
        if create:
            api.create_repo(repository, private=private, exist_ok=True)
            # the hub leaves a repository that is there as it is
            if private and not api.repo_info(repository).private:
                raise UserError(f"{repository} is there already and is public; make it private on the hub, "
                                "or leave out --private.")
        if not force:
            _check_readme(repository, api.list_repo_files(repository), upload)
        operations = [
            CommitOperationAdd(name, content.encode() if isinstance(content, str) else str(content))
            for name, content in upload.files.items()
        ]
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)
    except HfHubHTTPError as error:
        raise _refused(repository, error, create) from None
    except Exception as error:
        # huggingface_hub has changed its HTTP library twice
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, ConnectionError | TimeoutError) or library in _HTTP_LIBRARIES:
            raise UserError(f"The hub cannot be reached ({first_line(error)}); look at the network, and try "
                            "again.") from None
        if isinstance(error, ValueError | RuntimeError):  # wrong metadata, or a file that is too large
            said = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"The hub refused the upload to {repository} ({said}).") from None
        if isinstance(error, OSError):
            raise UserError(f"The files could not be read ({first_line(error)}); look at them.") from None
        raise


def _check_readme(repository: str, names: Sequence[str], upload: Upload) -> None:
    there = [name for name in names if name.endswith(".gguf")]
    others = [name for name in there if name not in upload.files]
    if others:
        raise UserError(f"{repository} holds {others[0]} already, and its new README.md would not name it; "
                        "push all files together, or pass --force.")
    if README in names and not there:
        raise UserError(f"{repository} has a README.md of something else, which the model card would "
                        "replace; use another repository, or pass --force.")


def _refused(repository: str, error: Any, create: bool) -> UserError:
    status = error.response.status_code
    if status == 401:
        return UserError(f"The hub does not accept the token for {repository}; run `hf auth login`, or set "
                         "HF_TOKEN.")
    if status == 403:
        return UserError(f"The token may not write to {repository}; use one that has write access to it.")
    if status == 404:
        hint = "look at its owner's name" if create else "pass --create to make it"
        return UserError(f"The hub has no repository {repository} that the token may see; {hint}.")
    return UserError(f"The hub refused the upload to {repository} ({first_line(error)}).")
