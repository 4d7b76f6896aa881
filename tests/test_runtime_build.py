"""Running builds and reporting what is installed, without a compiler."""

from __future__ import annotations

import ctypes.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import ModuleType

import pytest
from click.testing import CliRunner

from skipcat_edge.cli import main
from skipcat_edge.errors import UserError
from skipcat_edge.runtime import build, check
from skipcat_edge.runtime.pin import read_pin
from skipcat_edge.runtime.progress import parse_step, run_logged


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("[12/151] Building CXX object x.o", (12, 151)),
        ("  [77/77] : && /usr/bin/c++ -shared", (77, 77)),
        ("[ 42%] Building C object y.o", (42, 100)),
        ("Progress 1024 of 4096", (1024, 4096)),
        ("Progress 0 of 0", None),
        ("note: [1/2] in the middle", None),
        ("-- [configuring]", None),
    ],
)
def test_parse_step(line: str, step: tuple[int, int] | None) -> None:
    assert parse_step(line) == step


def test_a_failed_command_shows_its_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "x.log"
    script = "for i in range(100): print(f'line {i}.')\nraise SystemExit(3)"
    with pytest.raises(UserError, match="Building x: failed with exit code 3") as error:
        run_logged([sys.executable, "-c", script], title="Building x", log=log)
    assert str(log) in str(error.value)
    shown = capsys.readouterr().err
    assert "line 99." in shown and "line 70." in shown and "line 69." not in shown
    assert log.read_text().splitlines() == [f"line {i}." for i in range(100)]


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPCAT_EDGE_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "tree"
    broken.mkdir()
    monkeypatch.setattr(build, "compilers", lambda target: {})
    monkeypatch.setattr(build, "patched_tree", lambda source: broken)
    with pytest.raises(UserError, match=r"wheel\.log"):
        build.build_wheel(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_builds_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They share the source tree, and one would take what the other has just installed there."""
    monkeypatch.setenv("SKIPCAT_EDGE_CACHE", str(tmp_path))
    began = Event()

    def stop(source: Path | None) -> Path:
        began.set()
        raise UserError("stopped")

    monkeypatch.setattr(build, "compilers", lambda target: {})
    monkeypatch.setattr(build, "patched_tree", stop)
    with ThreadPoolExecutor(1) as pool:
        with build.one_build():
            waiting = pool.submit(build.build_wheel, tmp_path / "out")
            assert not began.wait(0.3)
        with pytest.raises(UserError, match="stopped"):
            waiting.result(20)
    assert began.is_set() and "Waiting for another build" in capsys.readouterr().err
    with build.one_build():  # the failed one has let go
        pass


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    result = CliRunner().invoke(main, ["runtime", "build", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "No C++ compiler" in result.stderr
    assert not (tmp_path / "out").exists()


def test_cmake_arguments_of_the_user_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPCAT_EDGE_CMAKE_ARGS", "-DGGML_NATIVE=OFF '-DX=a b'")
    assert build.cmake_args()[-2:] == ["-DGGML_NATIVE=OFF", "-DX=a b"]
    assert "-DGGML_RPC=ON" in build.cmake_args()
    monkeypatch.setenv("SKIPCAT_EDGE_CMAKE_ARGS", "-DX='a")
    with pytest.raises(UserError, match="SKIPCAT_EDGE_CMAKE_ARGS"):
        build.cmake_args()


def fake_llama_cpp(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    package, module = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_cpp")
    package.__path__ = ["/somewhere/llama_cpp"]
    vars(package)["__version__"] = version
    vars(module).update(
        _lib=ctypes.CDLL(ctypes.util.find_library("c")),
        llama_print_system_info=lambda: b"CPU : AVX2 = 1 | AVX512 = 0 | NEON = 1 | ",
        llama_supports_rpc=lambda: True,
        llama_log_callback=lambda function: function,
        llama_log_set=lambda callback, data: None,
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", module)


def test_check_of_a_stock_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_llama_cpp(monkeypatch, "0.3.1")
    status = check.runtime_status()
    assert (status.path, status.version, status.patched) == ("/somewhere/llama_cpp", "0.3.1", None)
    assert (status.cpu_features, status.rpc, status.format_version) == (("AVX2", "NEON"), True, None)
    result = CliRunner().invoke(main, ["runtime", "check"])
    assert result.exit_code == 1
    assert "not patched; run `skipcat-edge runtime build --install`." in result.stderr
    with pytest.raises(UserError, match="runtime build --install"):
        check.require_patched()


@pytest.mark.parametrize(("version", "code"), [(read_pin().wheel_version, 0), ("0.3.1+skipcat.0", 1)])
def test_check_of_a_patched_runtime(monkeypatch: pytest.MonkeyPatch, version: str, code: int) -> None:
    fake_llama_cpp(monkeypatch, version)
    answers = {"skipcat_runtime_version": b"skipcat.1", "skipcat_format_version": 2}
    monkeypatch.setattr(check, "_call", lambda library, function, result: answers[function])
    result = CliRunner().invoke(main, ["runtime", "check"])
    assert result.exit_code == code
    rows = dict(line.split(maxsplit=1) for line in result.stdout.replace("format v", "format-v").splitlines())
    assert rows["patched"] == "skipcat.1" and rows["format-versions"] == "1, 2"
    check.require_patched()


@pytest.mark.parametrize("error", [ImportError("No module"), OSError("bad ELF"), RuntimeError(""), None])
def test_check_of_a_broken_runtime(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def fail(name: str) -> ModuleType:
        raise error or KeyError()

    monkeypatch.setattr(check, "import_module", fail)
    result = CliRunner().invoke(main, ["runtime", "check"])
    assert result.exit_code == 1 and "cannot be imported" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.runtime
def test_check_of_the_real_runtime() -> None:
    status = check.runtime_status()
    assert status.problem is None
    assert status.format_version is not None and status.format_version >= 1
    assert status.rpc and status.cpu_features and Path(status.path or "").is_dir()
