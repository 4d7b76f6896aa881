"""The push command, against a fake of the hub's client: nothing leaves this machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import run
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

CARD = "---\nlicense: {licence}\nbase_model: {base}\ntags: [gguf, {tag}]\n---\n\n# {name}\n"


class FakeHub:
    """Stands in for HfApi: remembers what it was asked, and answers or raises as told."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.commit: dict[str, bytes] = {}
        self.holds: list[str] = []
        self.private = False
        self.error: dict[str, Exception] = {}

    def _hear(self, name: str, *told: Any) -> None:
        self.asked.append((name, told))
        if name in self.error:
            raise self.error[name]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self._hear("create_repo", repo_id, private, exist_ok)

        self.private = private or self.private

    def repo_info(self, repo_id: str) -> Any:
        self._hear("repo_info", repo_id)
        return SimpleNamespace(private=self.private)

    def list_repo_files(self, repo_id: str) -> list[str]:
        self._hear("list_repo_files", repo_id)
        return self.holds

    def create_commit(self, repo_id: str, operations: list[Any], *, commit_message: str) -> Any:
        self._hear("create_commit", repo_id, commit_message)
        for operation in operations:
            with operation.as_file() as file:
                self.commit[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    return fake


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return model(tmp_path, "small")


def model(folder: Path, name: str, licence: str = "mit", base: str = "owner/source",
          tag: str = "low-rank") -> Path:
    file = folder / f"{name}.gguf"
    file.write_bytes(b"GGUF of " + name.encode())
    file.with_suffix(".md").write_text(CARD.format(licence=licence, base=base, tag=tag, name=name), "utf-8")
    return file


def refused(hub: FakeHub, *arguments: object) -> str:
    result = run("push", *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
    assert not hub.commit
    return result.stderr


def status(code: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=code, headers={}, request=None)
    return kind(f"{code} says the server", response=response)  # type: ignore[arg-type]


def test_a_file_and_its_card_go_up_in_one_commit(hub: FakeHub, gguf: Path) -> None:
    result = run("push", "me/models", gguf, "--message", "First")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "https://hub/me/models/commit/1" in result.stdout
    assert hub.commit == {"small.gguf": gguf.read_bytes(), "README.md": gguf.with_suffix(".md").read_bytes()}
    assert hub.asked == [("list_repo_files", ("me/models",)), ("create_commit", ("me/models", "First"))]


def test_a_repository_is_made_only_where_that_was_asked(hub: FakeHub, gguf: Path) -> None:
    assert run("push", "me/models", gguf, "--create", "--private").exit_code == 0
    assert hub.asked[0] == ("create_repo", ("me/models", True, True))
    assert hub.asked[-1] == ("create_commit", ("me/models", "Upload small.gguf"))
    hub.asked.clear()
    assert run("push", "me/models", gguf, "--create").exit_code == 0
    assert hub.asked[0] == ("create_repo", ("me/models", False, True))


def test_what_was_to_be_private_does_not_go_into_a_public_repository(
    hub: FakeHub, gguf: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as the hub does with one that is there
    monkeypatch.setattr(hub, "create_repo", lambda repo_id, private, exist_ok: None)
    assert "is public" in refused(hub, "me/models", gguf, "--create", "--private")
    hub.private = True
    assert run("push", "me/models", gguf, "--create", "--private").exit_code == 0


def test_cards_of_many_files_keep_their_names_below_one_that_lists_them(hub: FakeHub, tmp_path: Path) -> None:
    files = [model(tmp_path, "q8"), model(tmp_path, "q4", base="owner/other", tag="dense")]
    assert run("push", "me/models", *files).exit_code == 0
    assert set(hub.commit) == {"q8.gguf", "q8.md", "q4.gguf", "q4.md", "README.md"}
    assert hub.commit["q4.md"] == (tmp_path / "q4.md").read_bytes()
    readme = ModelCard(hub.commit["README.md"].decode())
    assert readme.data.to_dict() == {"license": "mit", "base_model": ["owner/source", "owner/other"],
                                     "tags": ["gguf", "low-rank", "dense"]}
    for name in hub.commit.keys() - {"README.md"}:
        assert f"[{name}]({name})" in readme.text


def test_doubtful_licences_are_told_and_do_not_block(hub: FakeHub, tmp_path: Path) -> None:
    for licence, told in (("unknown", "does not know the licence"),
                          ("llama3.2", "names the licence llama3.2"), ("cc-by-nc-4.0", "cc-by-nc-4.0"),
                          ("other", "other"), ("''", "does not know")):
        result = run("push", "me/models", model(tmp_path, "x", licence))
        assert result.exit_code == 0
        assert result.stderr.startswith("Warning: ")
        assert told in result.stderr
    for licence in ("mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0"):
        assert run("push", "me/models", model(tmp_path, "x", licence)).stderr == ""


def test_a_card_of_other_files_is_replaced_only_by_force(hub: FakeHub, gguf: Path) -> None:
    hub.holds = ["README.md", "small.gguf"]
    assert run("push", "me/models", gguf).exit_code == 0
    hub.commit.clear()
    hub.holds = ["README.md", "big.gguf"]
    assert "holds big.gguf already" in refused(hub, "me/models", gguf)
    assert run("push", "me/models", gguf, "--force").exit_code == 0
    assert "README.md" in hub.commit
    hub.commit.clear()
    hub.holds = ["README.md", "model.safetensors"]  # the source's own
    assert "README.md of something else" in refused(hub, "me/models", gguf)
    assert run("push", "me/models", gguf, "--force").exit_code == 0


@pytest.mark.parametrize("repository", ["models", "a/b/c", "me/..", "me/mo dels", "-me/models", "me/", ""])
def test_a_malformed_repository_is_refused_before_anything(hub: FakeHub, gguf: Path, repository: str) -> None:
    assert "owner/name" in refused(hub, "--", repository, gguf)
    assert not hub.asked


def test_what_cannot_be_uploaded_is_refused_before_anything(hub: FakeHub, gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    assert "no such file" in refused(hub, "me/models", other)
    other.write_text("no magic")
    assert "is not a GGUF file" in refused(hub, "me/models", other)
    other.write_bytes(b"GGUF")
    assert "no model card other.md" in refused(hub, "me/models", gguf, other)
    model(tmp_path, "other", "apache-2.0")
    assert "different licences (apache-2.0, mit)" in refused(hub, "me/models", gguf, other)
    (tmp_path / "again").mkdir()
    assert "the name of another" in refused(hub, "me/models", gguf, model(tmp_path / "again", "small"))
    assert "add --create" in refused(hub, "me/models", gguf, "--private")
    assert not hub.asked


@pytest.mark.parametrize(("step", "error", "told"), [
    ("list_repo_files", status(401, RepositoryNotFoundError), "does not accept the token"),
    ("list_repo_files", status(404, RepositoryNotFoundError), "pass --create"),
    ("create_repo", status(403), "may not write to me/models"),
    ("create_commit", status(403), "may not write to me/models"),
    ("create_commit", status(500), "500 says the server"),
    # as huggingface_hub passes on what the hub says of a card, and of a large file
    ("create_commit", ValueError("Invalid metadata in README.md.\n- \"license\" must be one of [mit]"),
     '"license" must be one of [mit]'),
    ("create_commit", ValueError("LFS batch returned errors:\nFile is larger than 50GB"), "larger than 50GB"),
    ("create_commit", RuntimeError("Data processing error: no space"), "no space"),
    ("create_commit", ConnectionError("no route"), "cannot be reached (no route)"),
    ("create_commit", OfflineModeIsEnabled("offline mode"), "cannot be reached (offline mode)"),
])
def test_the_hubs_refusals_are_one_sentence(hub: FakeHub, gguf: Path, step: str, error: Exception,
                                            told: str) -> None:
    hub.error[step] = error
    create = ["--create"] if step == "create_repo" else []
    assert told in refused(hub, "me/models", gguf, *create)


def test_an_http_librarys_own_error_means_no_network(hub: FakeHub, gguf: Path) -> None:
    import huggingface_hub.errors as errors

    transport = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    hub.error["create_commit"] = transport("name resolution failed")
    assert "cannot be reached (name resolution failed)" in refused(hub, "me/models", gguf)


def test_without_a_token_nothing_is_asked(hub: FakeHub, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "run `hf auth login`" in refused(hub, "me/models", gguf)
    assert not hub.asked


def test_without_huggingface_hub_its_extra_is_named(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipcat_edge.extra.find_spec", lambda _: None)
    result = run("push", "me/models", gguf)
    assert result.exit_code == 2
    assert "pip install 'skipcat-edge[push]'" in result.stderr
