"""Patches and overlay on tiny trees: applied once, completely, or refused by the file's name."""

from __future__ import annotations

import difflib
import hashlib
import re
from pathlib import Path

import pytest

from skipcat_edge.errors import UserError
from skipcat_edge.runtime.apply import STAMP_NAME, State, apply, load_patch_set, tree_state
from skipcat_edge.runtime.pin import patches_dir, read_pin

PIN = f"""\
package = "fake-cpp-python"
version = "1.2.3"
sha256 = "{'AB' * 32}"
revision = 4
"""
A = "".join(f"int a{i};\n" for i in range(40))
A2 = A.replace("int a3;\n", "int a3;\nint added;\n").replace("int a30;\n", "int thirty;\n")
B = "void f() {\n}\n"
B2 = "void f() {\n    g();\n}\n"


def diff(name: str, old: str, new: str) -> str:
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{name}", f"b/{name}")
    return "".join(lines)


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    directory = tmp_path / "patches_dir"
    (directory / "patches").mkdir(parents=True)
    (directory / "pin.toml").write_text(PIN)
    (directory / "patches/0001-a.patch").write_text("Why a.\n\n" + diff("vendor/a.cpp", A, A2))
    (directory / "patches/0002-b.patch").write_text("Why b.\n" + diff("vendor/b.cpp", B, B2))
    (directory / "overlay/vendor/new").mkdir(parents=True)
    (directory / "overlay/vendor/new/op.cpp").write_text("// new\n")
    return directory


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, text in {
        "llama_cpp/__init__.py": 'from .llama import *\n\n__version__ = "1.2.3"\n',
        "vendor/a.cpp": A,
        "vendor/b.cpp": B,
        "vendor/other.cpp": "other\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(root)): (path.read_text(), path.stat().st_mtime_ns)
        for path in root.rglob("*") if path.is_file()
    }


def test_pin(patches: Path) -> None:
    pin = read_pin(patches)
    assert (pin.package, pin.version, pin.sha256, pin.revision) == ("fake-cpp-python", "1.2.3", "ab" * 32, 4)
    assert pin.wheel_version == "1.2.3+skipcat.4"
    assert pin.source_dir_name == "fake_cpp_python-1.2.3"
    assert pin.archive_name == "fake_cpp_python-1.2.3.tar.gz"


@pytest.mark.parametrize("line", ["sha256", "revision"])
def test_pin_without_a_key_names_it(patches: Path, line: str) -> None:
    (patches / "pin.toml").write_text(re.sub(f"^{line}.*\n", "", PIN, flags=re.M))
    with pytest.raises(UserError, match=f"`{line}`"):
        read_pin(patches)


def test_apply(patches: Path, tree: Path) -> None:
    assert tree_state(tree, load_patch_set(patches)) is State.PRISTINE
    assert apply(tree, load_patch_set(patches)) is True
    assert (tree / "vendor/a.cpp").read_text() == A2
    assert (tree / "vendor/b.cpp").read_text() == B2
    assert (tree / "vendor/new/op.cpp").read_text() == "// new\n"
    assert (tree / "vendor/other.cpp").read_text() == "other\n"
    assert '__version__ = "1.2.3+skipcat.4"\n' in (tree / "llama_cpp/__init__.py").read_text()
    assert tree_state(tree, load_patch_set(patches)) is State.CURRENT


def test_apply_twice_changes_nothing(patches: Path, tree: Path) -> None:
    apply(tree, load_patch_set(patches))
    before = snapshot(tree)
    assert apply(tree, load_patch_set(patches)) is False
    assert snapshot(tree) == before


def test_a_build_in_the_tree_is_not_dirt(patches: Path, tree: Path) -> None:
    apply(tree, load_patch_set(patches))
    (tree / "llama_cpp/lib").mkdir()
    (tree / "llama_cpp/lib/libllama.so").write_bytes(b"\x7fELF")
    assert apply(tree, load_patch_set(patches)) is False


@pytest.mark.parametrize("name", ["vendor/a.cpp", "vendor/new/op.cpp", "llama_cpp/__init__.py"])
def test_a_dirty_file_is_refused_by_name(patches: Path, tree: Path, name: str) -> None:
    apply(tree, load_patch_set(patches))
    (tree / name).write_text((tree / name).read_text() + "# mine\n")
    before = snapshot(tree)
    with pytest.raises(UserError, match=re.escape(name)):
        apply(tree, load_patch_set(patches))
    assert snapshot(tree) == before


def test_a_deleted_file_is_refused_by_name(patches: Path, tree: Path) -> None:
    apply(tree, load_patch_set(patches))
    (tree / "vendor/new/op.cpp").unlink()
    with pytest.raises(UserError, match=r"vendor/new/op\.cpp"):
        apply(tree, load_patch_set(patches))


@pytest.mark.parametrize(
    ("name", "text"),
    [("vendor/a.cpp", A2), ("vendor/b.cpp", B2), ("vendor/new/op.cpp", "// new\n"),
     ("llama_cpp/__init__.py", '__version__ = "1.2.3+skipcat.4"\n')],
)
def test_a_half_applied_tree_is_refused_by_name(patches: Path, tree: Path, name: str, text: str) -> None:
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text(text)
    before = snapshot(tree)
    with pytest.raises(UserError, match=re.escape(name)):
        apply(tree, load_patch_set(patches))
    assert snapshot(tree) == before


@pytest.mark.parametrize(
    "old", ["int a29;\n", "int a30;\n"], ids=["context", "removed line"],
)
def test_context_is_strict(patches: Path, tree: Path, old: str) -> None:
    (tree / "vendor/a.cpp").write_text(A.replace(old, "int elsewhere;\n"))
    before = snapshot(tree)
    with pytest.raises(UserError, match=r"vendor/a\.cpp.*0001-a\.patch"):
        apply(tree, load_patch_set(patches))
    assert snapshot(tree) == before


def test_lines_that_moved_are_refused(patches: Path, tree: Path) -> None:
    (tree / "vendor/a.cpp").write_text("// one line more\n" + A)
    with pytest.raises(UserError, match=r"vendor/a\.cpp"):
        apply(tree, load_patch_set(patches))


def test_a_patch_of_a_missing_file_is_refused_by_name(patches: Path, tree: Path) -> None:
    (tree / "vendor/b.cpp").unlink()
    with pytest.raises(UserError, match=r"vendor/b\.cpp"):
        apply(tree, load_patch_set(patches))


def test_two_patches_may_touch_one_file(patches: Path, tree: Path) -> None:
    third = A2 + "int last;\n"
    (patches / "patches/0003-a.patch").write_text("Why again.\n" + diff("vendor/a.cpp", A2, third))
    apply(tree, load_patch_set(patches))
    assert (tree / "vendor/a.cpp").read_text() == third


def test_a_patch_adds_no_file(patches: Path, tree: Path) -> None:
    added = "".join(difflib.unified_diff([], ["x\n"], "/dev/null", "b/vendor/x.cpp"))
    (patches / "patches/0003-x.patch").write_text("Why x.\n" + added)
    with pytest.raises(UserError, match=r"vendor/x\.cpp"):
        apply(tree, load_patch_set(patches))
    assert not (tree / "vendor/x.cpp").exists()


def test_something_that_is_no_diff_is_refused_by_name(patches: Path, tree: Path) -> None:
    (patches / "patches/0003-x.patch").write_text("only prose\n")
    with pytest.raises(UserError, match=r"0003-x\.patch"):
        apply(tree, load_patch_set(patches))


def test_another_revision_is_outdated(patches: Path, tree: Path) -> None:
    apply(tree, load_patch_set(patches))
    (patches / "pin.toml").write_text(PIN.replace("revision = 4", "revision = 5"))
    assert tree_state(tree, load_patch_set(patches)) is State.OUTDATED
    with pytest.raises(UserError, match=re.escape(STAMP_NAME)):
        apply(tree, load_patch_set(patches))


def test_a_changed_overlay_file_is_outdated(patches: Path, tree: Path) -> None:
    apply(tree, load_patch_set(patches))
    (patches / "overlay/vendor/new/op.cpp").write_text("// newer\n")
    assert tree_state(tree, load_patch_set(patches)) is State.OUTDATED


def test_another_release_is_refused(patches: Path, tree: Path) -> None:
    (tree / "llama_cpp/__init__.py").write_text('__version__ = "1.2.4"\n')
    with pytest.raises(UserError, match=r"__init__\.py.*1\.2\.3"):
        apply(tree, load_patch_set(patches))


def real_patches() -> list[Path]:
    return sorted((patches_dir() / "patches").glob("*.patch"))


def test_the_real_patches_are_small() -> None:
    lines = [line for path in real_patches() for line in path.read_text("utf-8").splitlines()]
    changed = [line for line in lines if re.match(r"[+-](?!\+\+ |-- )", line)]
    assert 0 < len(changed) < 150


def test_each_real_patch_begins_with_its_reason() -> None:
    assert real_patches()
    for path in real_patches():
        head = path.read_text("utf-8").splitlines()[0]
        assert len(head.split()) >= 3 and not re.match(r"(---|\+\+\+|diff |index |From )", head), path.name


def test_the_real_overlay_adds_files_of_llama_cpp_only() -> None:
    overlay = load_patch_set().overlay
    assert overlay and all(name.startswith("vendor/llama.cpp/") for name in overlay)
    assert hashlib.sha256(next(iter(overlay.values())).read_bytes()).hexdigest() in (
        load_patch_set().digests().values()
    )
