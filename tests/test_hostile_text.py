"""Strings of a model's file: neither a terminal nor a reader of Markdown takes them for anything else."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from command_line import run
from gguf import GGUFValueType
from gguf_edit import GGUF

from skipcat_edge import format as fmt
from skipcat_edge.card import new_card
from skipcat_edge.card_source import Source, source_of_gguf
from skipcat_edge.control_characters import visible
from skipcat_edge.errors import UserError
from skipcat_edge.terminal import as_markdown, echo_generated, new_table, stdout_console

GOLDEN = Path(__file__).resolve().parent.parent / "skipcat_edge" / "runtime" / "golden" / "Q8_0.gguf"
# Sets the window's title, clears the screen, goes back to the line's beginning; the last one has C1's CSI.
RUDE = "\x1b]0;mine\x07\x1b[2J\r\x9b2J\x00"
SHOWN = "\\x1b]0;mine\\x07\\x1b[2J\\x0d\\x9b2J\\x00"
MARKUP = "a`b](javascript:alert(1)) <script>alert(1)</script>\n# mine"


def hostile(path: Path, **keys: tuple[str, object, GGUFValueType]) -> Path:
    """The golden model with other keys."""
    file = GGUF.read(GOLDEN)
    for key, value, type_ in keys.values():
        file.set(key, value, type_)
    return file.write(path)


def test_control_characters_are_written_out() -> None:
    assert visible(f"a\tb\nc{RUDE}ü€😀") == f"a\tb\nc{SHOWN}ü€😀"


def test_inspect_shows_them(tmp_path: Path) -> None:
    strings = {"method": fmt.KEY_METHOD, "source": fmt.KEY_SOURCE_NAME}
    path = hostile(tmp_path / "rude.gguf",
                   **{name: (key, f"x{RUDE}[bold]", GGUFValueType.STRING) for name, key in strings.items()})
    said = run("inspect", path)
    assert said.exit_code == 0 and said.output.count(f"x{SHOWN}[bold]") == 2
    assert not set(said.output) & set("\x1b\x07\r\x9b\x00")
    assert not set(run("inspect", path, "--json").output) & set("\x1b\x07\r\x9b\x00")


def test_errors_show_them(tmp_path: Path) -> None:
    file = GGUF.read(GOLDEN)
    name = next(name for name in file.tensors if name.endswith("lr_a.weight"))
    file.rename(name, name.replace("lr_a", f"lr_a{RUDE}"))
    said = run("inspect", file.write(tmp_path / "rude.gguf"))
    assert said.exit_code == 2 and not set(said.output) & set("\x1b\x07\r\x9b\x00")
    assert UserError(RUDE).format_message() == SHOWN


def test_tables_show_them(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("name")
    table.add_row(RUDE)
    assert RUDE not in as_markdown(table) and SHOWN in as_markdown(table)
    stdout_console().print(table)
    assert SHOWN in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_writes(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    echo_generated(f"Once{RUDE}\n")
    if terminal:
        assert out.getvalue() == f"Once{SHOWN}\n"
    else:  # click leaves out colours where nobody sees them
        assert out.getvalue().startswith("Once") and "\x9b" in out.getvalue()


def test_a_card_stays_a_card(tmp_path: Path) -> None:
    path = hostile(tmp_path / "m.gguf", method=(fmt.KEY_METHOD, MARKUP, GGUFValueType.STRING),
                   source=(fmt.KEY_SOURCE_NAME, "x](javascript:a)/b", GGUFValueType.STRING))
    assert not source_of_gguf(path).on_hub
    source = Source(name=MARKUP, licence="other", licence_name=MARKUP, licence_link="javascript:alert(1)")
    card = new_card(path, source)
    body = card.partition("\n---\n")[2]
    assert "\n# mine" not in body
    # what is neither escaped nor code
    live = re.sub(r"```.*?```|`[^`\n]*`", "", re.sub(r"\\.", "", body), flags=re.DOTALL)
    assert "Licence" in live and "script>" in body
    assert "<script" not in live and "](javascript" not in live and "`" not in live


@pytest.mark.parametrize("key, value, type_", [
    (fmt.KEY_RATIO, "0.8", GGUFValueType.STRING), (fmt.KEY_CALIBRATION_TOKENS, "all", GGUFValueType.STRING),
    (fmt.KEY_METHOD, 1, GGUFValueType.UINT32), (fmt.KEY_SEED, 0.5, GGUFValueType.FLOAT32),
])
def test_a_key_of_another_type_is_named(key: str, value: object, type_: GGUFValueType,
                                        tmp_path: Path) -> None:
    said = run("inspect", hostile(tmp_path / "typed.gguf", key=(key, value, type_)))
    assert said.exit_code == 2 and key in said.output


@pytest.mark.runtime
@pytest.mark.parametrize("words", [("generate", "-p", "Hi", "-n", 2), ("chat",), ("eval", "--text", __file__),
                                   ("serve", "--port", 0)])
def test_a_file_without_a_vocabulary_is_refused(words: tuple[object, ...]) -> None:
    """llama.cpp ends the process where it is asked for a word of one."""
    pytest.importorskip("llama_cpp", reason="the runtime is not installed")
    said = run(words[0], GOLDEN, *words[1:], stdin="Hi\n")
    assert said.exit_code == 2 and "has no vocabulary" in said.output
