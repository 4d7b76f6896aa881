"""The chat page in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Local, chat, local_server, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

pytestmark = [pytest.mark.runtime, pytest.mark.slow]

PROMPT = "Once upon a time"
KEY = "a-key-of-our-own"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def local(demo_low_rank_gguf: Path) -> Iterator[Local]:
    with local_server(demo_low_rank_gguf) as server:
        yield server


@pytest.fixture
def page(browser: Any, local: Local) -> Iterator[Any]:
    """The page, greedy; nothing may be loaded from elsewhere, and nothing may go wrong in it."""
    local.delay = 0
    page = browser.new_page(viewport={"width": 420, "height": 760})
    problems: list[str] = []
    page.on("request", lambda request: request.url.startswith((local.url, "data:"))
            or problems.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.goto(local.url)
    sync_api.expect(page.locator("#model")).to_have_text("local")
    page.locator("summary").click()
    page.locator("#temperature").fill("0")
    yield page
    page.close()
    assert problems == []


def answers(page: Any) -> Any:
    return page.locator(".assistant")


def send(page: Any, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def written(page: Any, length: int) -> None:
    """Wait until the one answer has more than `length` characters."""
    wait_until(lambda: len(answers(page).text_content()) > length, "the answer")


def done(page: Any, count: int = 1) -> None:
    """Wait until `count` answers are complete."""
    sync_api.expect(page.locator(".note")).to_have_count(count, timeout=60000)


def test_an_answer_is_streamed(page: Any, local: Local) -> None:
    expected = chat(local.url, PROMPT).lstrip()
    local.delay = 0.005
    send(page, PROMPT)
    written(page, 20)
    early = answers(page).text_content()
    assert expected.startswith(early) and len(early) < len(expected)
    done(page)
    assert answers(page).text_content() == expected
    assert page.locator(".user").text_content() == PROMPT
    count = json.loads(page.evaluate("JSON.stringify(turns)"))
    assert [turn["role"] for turn in count] == ["user", "assistant"]
    assert " tokens/s" in page.locator(".note").text_content()


def test_a_conversation_goes_on_and_ends(page: Any, local: Local) -> None:
    page.locator("#system").fill("Stories.")
    send(page, PROMPT)
    done(page)
    first = answers(page).text_content()
    local.begun.clear()
    send(page, "The dog")
    done(page, 2)
    text = local.engine.llama.detokenize(local.begun[0]).decode()
    assert text.split() == f"Stories. {PROMPT} {first} The dog".split()
    page.locator("#new").click()
    sync_api.expect(answers(page)).to_have_count(0)
    sync_api.expect(page.locator("#empty")).to_be_visible()
    send(page, "The cat")
    done(page)
    assert local.engine.llama.detokenize(local.begun[-1]).decode().split() == ["Stories.", "The", "cat"]


def test_stop_ends_the_generation(page: Any, local: Local) -> None:
    local.computed.clear()
    local.delay = 0.03
    send(page, PROMPT)
    written(page, 10)
    page.locator("#stop").click()
    done(page)
    assert page.locator(".note").text_content() == "Stopped."
    wait_until(lambda: bool(local.engine.idle), "the end of the generation")
    local.delay = 0
    stopped = len(local.computed)
    local.computed.clear()
    chat(local.url, PROMPT)
    assert stopped < len(local.computed) / 2
    sync_api.expect(page.locator("#send")).to_be_visible()


def test_shift_enter_writes_a_new_line(page: Any) -> None:
    text = page.locator("#text")
    text.fill("one")
    text.press("Shift+Enter")
    text.press_sequentially("two")
    assert text.input_value() == "one\ntwo"
    sync_api.expect(page.locator(".user")).to_have_count(0)


def test_what_a_model_writes_is_text(page: Any) -> None:
    markup = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
    chunk = {"choices": [{"delta": {"content": markup}, "finish_reason": "stop"}]}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"))
    send(page, markup)
    done(page)
    assert answers(page).text_content() == page.locator(".user").text_content() == markup
    assert page.locator("#conversation img, #conversation b").count() == 0
    assert "taken" not in page.title()


def test_a_question_that_is_refused_comes_back(page: Any) -> None:
    question = "a story " * 500
    send(page, PROMPT)
    done(page)
    page.locator("summary").click()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=200, content_type="text/event-stream",
        body='data: {"error": {"message": "The prompt is long; shorten it."}}\n\n'))
    send(page, question)
    sync_api.expect(page.locator(".bad")).to_have_text("The prompt is long; shorten it.")
    sync_api.expect(page.locator(".bad")).to_be_in_viewport()
    assert page.locator("#text").input_value() == question.strip()
    assert page.evaluate("turns.length") == 2


def test_the_key_is_asked_for_and_kept_for_the_session(browser: Any, demo_low_rank_gguf: Path) -> None:
    with local_server(demo_low_rank_gguf, api_key=KEY) as server:
        page = browser.new_page()
        page.goto(server.url)
        sync_api.expect(page.locator("#key")).to_be_visible()
        page.locator("#key").fill(KEY)
        page.locator("#key").press("Tab")
        sync_api.expect(page.locator("#model")).to_have_text("local")
        page.reload()
        sync_api.expect(page.locator("#model")).to_have_text("local")
        send(page, PROMPT)
        done(page)
        assert page.evaluate("[sessionStorage.key, localStorage].length") == 2
        assert page.evaluate("localStorage.length") == 0
        page.close()
