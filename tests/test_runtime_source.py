"""Fetching, checking and unpacking the source, with tiny archives and no network."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from skipcat_edge.cli import main
from skipcat_edge.errors import UserError
from skipcat_edge.runtime import source
from skipcat_edge.runtime.apply import STAMP_NAME, load_patch_set

TOP = "fake_cpp_python-1.2.3"
FILES = {
    "llama_cpp/__init__.py": '__version__ = "1.2.3"\n',
    "CMakeLists.txt": "project(fake)\n",
    "vendor/llama.cpp/a.cpp": "one\ntwo\nthree\n",
    ".git/HEAD": "0000\n",
}
PATCH = """\
Why two is doubled.
--- a/vendor/llama.cpp/a.cpp
+++ b/vendor/llama.cpp/a.cpp
@@ -1,3 +1,4 @@
 one
 two
+two
 three
"""


def write_archive(path: Path, members: dict[str, str], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
        if link is not None:
            info = tarfile.TarInfo(f"{TOP}/link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / f"{TOP}.tar.gz", {f"{TOP}/{name}": text for name, text in FILES.items()})


@pytest.fixture
def cache(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a pin on `archive`, one patch, one new file, and no way to reach a network."""
    patches = tmp_path / "patches_dir"
    (patches / "patches").mkdir(parents=True)
    (patches / "patches/0001-a.patch").write_text(PATCH)
    (patches / "overlay/vendor/llama.cpp").mkdir(parents=True)
    (patches / "overlay/vendor/llama.cpp/new.cpp").write_text("new\n")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (patches / "pin.toml").write_text(
        f'package = "fake-cpp-python"\nversion = "1.2.3"\nsha256 = "{digest}"\nrevision = 1\n'
    )
    monkeypatch.setattr("skipcat_edge.runtime.pin.patches_dir", lambda: patches)
    monkeypatch.setattr("skipcat_edge.runtime.apply.patches_dir", lambda: patches)
    monkeypatch.setattr(source, "run_logged", lambda *args, **kwargs: pytest.fail("ran a command"))
    directory = tmp_path / "cache"
    monkeypatch.setenv("SKIPCAT_EDGE_CACHE", str(directory))
    return directory


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_stock_and_patched_tree(cache: Path, archive: Path) -> None:
    stock = source.stock_tree(archive)
    assert contents(stock) == {name: text for name, text in FILES.items() if name != ".git/HEAD"}
    # The archive is cached now: the patched tree needs neither it nor a network.
    archive.unlink()
    patched = source.patched_tree()
    assert (patched / "vendor/llama.cpp/a.cpp").read_text() == "one\ntwo\ntwo\nthree\n"
    assert (patched / "vendor/llama.cpp/new.cpp").read_text() == "new\n"
    assert '"1.2.3+skipcat.1"' in (patched / "llama_cpp/__init__.py").read_text()
    assert contents(stock)["vendor/llama.cpp/a.cpp"] == FILES["vendor/llama.cpp/a.cpp"]
    assert not list(cache.rglob(".incoming-*"))


def test_a_patched_tree_is_kept(cache: Path, archive: Path) -> None:
    patched = source.patched_tree(archive)
    (patched / "llama_cpp/lib").mkdir()
    assert source.patched_tree() == patched
    assert (patched / "llama_cpp/lib").is_dir()


def test_a_tree_of_another_revision_is_unpacked_again(cache: Path, archive: Path, tmp_path: Path) -> None:
    patched = source.patched_tree(archive)
    old_time = (patched / "vendor/llama.cpp/a.cpp").stat().st_mtime_ns
    (tmp_path / "patches_dir/patches/0001-a.patch").unlink()
    assert source.patched_tree() == patched
    assert (patched / "vendor/llama.cpp/a.cpp").read_text() == FILES["vendor/llama.cpp/a.cpp"]
    # A build goes by time: the unpatched file must be newer than what was built from the patched one.
    assert (patched / "vendor/llama.cpp/a.cpp").stat().st_mtime_ns >= old_time


def test_a_dirty_tree_is_refused_by_name(cache: Path, archive: Path, tmp_path: Path) -> None:
    edited = source.patched_tree(archive) / "vendor/llama.cpp/a.cpp"
    edited.write_text("mine\n")
    with pytest.raises(UserError, match=r"vendor/llama\.cpp/a\.cpp"):
        source.patched_tree()
    (tmp_path / "patches_dir/patches/0001-a.patch").unlink()
    with pytest.raises(UserError, match=r"vendor/llama\.cpp/a\.cpp"):
        source.patched_tree()
    assert edited.read_text() == "mine\n"


def test_a_tree_without_its_stamp_is_refused_by_name(cache: Path, archive: Path) -> None:
    (source.patched_tree(archive) / STAMP_NAME).unlink()
    with pytest.raises(UserError, match=r"vendor/llama\.cpp/a\.cpp"):
        source.patched_tree()


@pytest.mark.parametrize("content", [b"", b"not the archive"])
def test_a_wrong_sum_is_refused_before_unpacking(
    cache: Path, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("opened the archive"))
    wrong = tmp_path / "wrong.tar.gz"
    wrong.write_bytes(content)
    for tree in (source.stock_tree, source.patched_tree):
        with pytest.raises(UserError, match=f"SHA-256 is {hashlib.sha256(content).hexdigest()}"):
            tree(wrong)
    assert contents(tmp_path / "cache") == {}


def test_a_damaged_cached_archive_is_refused(cache: Path, archive: Path) -> None:
    write_tree(cache, {archive.name: "damaged"})
    with pytest.raises(UserError, match="SHA-256"):
        source.stock_tree()
    assert contents(cache) == {archive.name: "damaged"}


@pytest.mark.parametrize("filters", [True, False], ids=["with filters", "without filters"])
@pytest.mark.parametrize(
    "member", [f"{TOP}/../../evil", "/tmp/evil", "../evil", "evil", f"{TOP}/a/../../../evil"]
)
def test_a_member_that_leads_elsewhere_is_refused(
    tmp_path: Path, member: str, filters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive = write_archive(tmp_path / "x.tar.gz", {f"{TOP}/good": "good", member: "evil"})
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    with pytest.raises(UserError, match="evil"):
        source.unpack(archive, target, TOP)
    assert not list(tmp_path.rglob("evil")) and not Path("/tmp/evil").exists()


def test_a_link_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "x.tar.gz", {}, link="/etc/passwd")
    with pytest.raises(UserError, match=f"{TOP}/link"):
        source.unpack(archive, tmp_path / "target", TOP)


def test_unpacking_without_filters(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    tree = source.unpack(archive, tmp_path / "target", TOP)
    assert contents(tree) == {name: text for name, text in FILES.items() if name != ".git/HEAD"}


@pytest.mark.parametrize("patched_before", [False, True])
def test_a_source_directory_is_not_changed(cache: Path, tmp_path: Path, patched_before: bool) -> None:
    directory = write_tree(tmp_path / "mine", FILES)
    if patched_before:
        source.apply(directory, load_patch_set())
    write_tree(directory, {"llama_cpp/lib/libllama.so": "stale", "build/x.o": "stale"})
    before = contents(directory)
    tree = source.patched_tree(directory)
    assert contents(directory) == before
    assert (tree / "vendor/llama.cpp/a.cpp").read_text() == "one\ntwo\ntwo\nthree\n"
    assert not {".git", "build", "lib"} & {path.name for path in tree.rglob("*")}


def test_a_dirty_source_directory_is_refused_by_name(cache: Path, tmp_path: Path) -> None:
    directory = write_tree(tmp_path / "mine", FILES)
    source.apply(directory, load_patch_set())
    (directory / "vendor/llama.cpp/new.cpp").write_text("edited\n")
    with pytest.raises(UserError, match=r"vendor/llama\.cpp/new\.cpp"):
        source.patched_tree(directory)
    assert not list(cache.rglob("new.cpp"))


@pytest.mark.parametrize("files", [{"x": ""}, FILES | {"llama_cpp/__init__.py": '__version__ = "9.9"\n'}])
def test_another_source_directory_is_refused(cache: Path, tmp_path: Path, files: dict[str, str]) -> None:
    directory = write_tree(tmp_path / "mine", files)
    with pytest.raises(UserError, match=str(directory)):
        source.patched_tree(directory)


def test_a_stock_tree_is_not_made_from_a_directory(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="archive"):
        source.stock_tree(write_tree(tmp_path / "mine", FILES))


def test_the_download_checks_the_hash_and_builds_nothing_else(
    cache: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def pip(command: list[str], **kwargs: object) -> None:
        seen.append(command)
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert requirements == f"fake-cpp-python==1.2.3 --hash=sha256:{digest}\n"
        (Path(command[command.index("--dest") + 1]) / archive.name).write_bytes(archive.read_bytes())

    monkeypatch.setattr(source, "run_logged", pip)
    assert source.stock_tree().is_dir() and source.patched_tree().is_dir()
    (command,) = seen
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
    assert command[command.index("--no-binary") + 1] == "fake-cpp-python"


def test_a_full_disk_is_one_sentence(
    cache: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(source.shutil, "copyfile", full)
    result = CliRunner().invoke(main, ["runtime", "source", "--source", str(archive)])
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert not list(cache.iterdir())


def test_source_command_prints_the_tree(cache: Path, archive: Path) -> None:
    result = CliRunner().invoke(main, ["runtime", "source", "--source", str(archive)])
    assert result.exit_code == 0, result.output
    assert (Path(result.stdout.strip()) / "CMakeLists.txt").read_text() == FILES["CMakeLists.txt"]


def test_a_bad_archive_exits_with_two(cache: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.tar.gz"
    wrong.write_bytes(b"x")
    result = CliRunner().invoke(main, ["runtime", "source", "--source", str(wrong)])
    assert result.exit_code == 2 and "SHA-256" in result.stderr and "Traceback" not in result.output
