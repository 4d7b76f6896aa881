"""Chat templates of files that anybody made: they run nothing, and take neither time nor memory."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from gguf_edit import GGUF
from traps import Trap

from skipcat_edge import chat_template
from skipcat_edge.chat_template import ChatTemplate, TemplateError

pytest.importorskip("llama_cpp", reason="templates are rendered by llama_cpp's formatter")

pytestmark = pytest.mark.runtime

MESSAGES = [{"role": "user", "content": "hello"}]
PLAIN = ("{{ bos_token }}{% for each in messages %}[{{ each.role }}] {{ each.content }}{% endfor %}"
         "{{ eos_token }}")

# Each calls exec on LINE from what a template is given, and from what Python ties to it.
ESCAPES = [
    "{{ cycler.__init__.__globals__.__builtins__.exec(LINE) }}",
    "{{ raise_exception.__globals__.__builtins__.exec(LINE) }}",
    "{{ strftime_now.__globals__.__builtins__['exec'](LINE) }}",
    "{{ (cycler|attr('__init__')|attr('__globals__'))['__builtins__'].exec(LINE) }}",
    "{% set f = cycler.__init__ %}{{ f['__globals__']['__builtins__']['exec'](LINE) }}",
    "{% for c in ''.__class__.__mro__[-1].__subclasses__() if c.__name__ == 'catch_warnings' %}"
    "{{ c()._module.__builtins__['exec'](LINE) }}{% endfor %}",
    "{{ (('{0.__init__.__globals__[__builtins__]}'|attr('format'))(cycler)).__class__ and "
    "lipsum.__globals__.__builtins__.exec(LINE) }}",
]
FOREVER = [
    "{{ 9 ** (9 ** (9 ** 9)) }}",  # computed where the template is compiled
    "{% set r = range(99999)|list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}"
    "{% endfor %}",
]
HUGE = ["{{ 'x' * 10**10 }}", "{{ 'x'.ljust(messages|length * 10**10) }}",
        "{% set n = namespace(x='x' * 100) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
        "{{ n.x }}"]


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, bos="<s>", eos="</s>")


def test_a_plain_template() -> None:
    plain = template(PLAIN + "{{ tools|tojson }}")
    for _ in range(2):
        assert plain.render(MESSAGES, tools=[{"a": "ü\ud800"}]) == '<s>[user] hello</s>[{"a": "ü\ud800"}]'


@pytest.mark.parametrize("escape", ESCAPES)
def test_escapes_from_the_sandbox(escape: str, tmp_path: Path) -> None:
    from jinja2 import Environment

    trap = Trap(tmp_path)
    text = escape.replace("LINE", repr(trap.python))

    def function(*_: Any) -> None:
        pass

    Environment().from_string(text).render(raise_exception=function, strftime_now=function, messages=MESSAGES)
    assert trap.was_sprung()
    with suppress(TemplateError):
        template(text).render(MESSAGES)
    assert not trap.was_sprung()


@pytest.mark.parametrize("text", FOREVER)
def test_a_template_without_end(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(TemplateError, match="it takes more than 1 s"):
        template(text).render(MESSAGES)
    assert time.monotonic() - start < 30  # where it is not ended, pytest's own patience is


@pytest.mark.parametrize("text", HUGE)
def test_a_template_that_takes_all_memory(text: str) -> None:
    with pytest.raises(TemplateError, match="it needs more than 256 MiB"):
        template(text).render(MESSAGES)


def test_after_an_end_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sometimes = template("{% if messages|length > 1 %}" + FOREVER[1] + "{% endif %}" + PLAIN)
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    with pytest.raises(TemplateError, match="it takes more than"):
        sometimes.render(MESSAGES * 2)
    assert sometimes.render(MESSAGES) == "<s>[user] hello</s>"


def test_its_process_ends_with_it() -> None:
    plain = template(PLAIN)
    process = plain._process
    assert process.poll() is None
    del plain
    assert process.poll() is not None


@pytest.mark.parametrize("text, part", [("{{ ", "its chat template is broken"),
                                        (FOREVER[0], "its chat template is broken (it takes more than")])
def test_the_commands_on_a_broken_template(text: str, part: str, demo_dense_gguf: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    file = GGUF.read(demo_dense_gguf)
    file.set("tokenizer.chat_template", text)
    file.set("tokenizer.chat_template.tools", text)
    broken = file.write(tmp_path / "broken.gguf")
    result = run("chat", broken, stdin="Hi\n")
    assert result.exit_code == 2 and part in result.output and str(broken) in result.output
    # who needs no template does not read it
    assert run("generate", broken, "-p", "Once", "-n", 2).exit_code == 0


def test_what_a_template_says_is_shown_and_not_obeyed(demo_dense_gguf: Path, tmp_path: Path) -> None:
    file = GGUF.read(demo_dense_gguf)
    file.set("tokenizer.chat_template", "{{ raise_exception('\x1b]0;mine\x07\x1b[2J') }}")
    said = run("chat", file.write(tmp_path / "rude.gguf"), stdin="Hi\n")
    assert "\\x1b]0;mine\\x07\\x1b[2J" in said.output and "\x1b" not in said.output
