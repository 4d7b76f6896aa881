"""The report in a real browser, offline: it asks for nothing, and no text covers another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparisons import comparison, crowded, figures, measured

from skipcat_edge.compare.figures import Comparison, Kind

pytest.importorskip("matplotlib", reason="the extra `compare` is not installed")
pytest.importorskip("jinja2", reason="the extra `compare` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium"),
]

# Pairs of texts that overlap by more than a hair, and texts that leave their picture.
FAULTS = """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(
        text => [text.textContent, text.getBoundingClientRect()]);
    const hair = 0.5;
    const out = texts.filter(([_, box]) => box.left < frame.left || box.right > frame.right ||
        box.top < frame.top || box.bottom > frame.bottom).map(([name]) => name + ' leaves the picture');
    texts.forEach(([name, a], index) => texts.slice(index + 1).forEach(([other, b]) => {
        const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (width > hair && height > hair) out.push(name + ' covers ' + other);
    }));
    return out;
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # the sandbox needs a user of its own, which a container's root has not
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Look:
    """A page that was opened without a network."""

    def __init__(self, browser: Any, page: Path, scheme: str = "light", width: int = 1200) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.context = browser.new_context(offline=True, color_scheme=scheme,
                                           viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(page.resolve().as_uri())

    def check(self, pictures: int) -> None:
        """The figures' labels are there, apart from each other and inside."""
        assert self.page.locator("figure svg").count() == pictures
        assert self.page.evaluate(FAULTS) == []
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.page.viewport_size["width"]
        assert self.requests == [self.page.url]
        assert self.errors == []

    def texts(self) -> list[list[str]]:
        """Of each picture."""
        found: list[list[str]] = self.page.evaluate(
            "[...document.querySelectorAll('figure svg')].map("
            "svg => [...svg.querySelectorAll('text')].map(text => text.textContent))")
        return found


def look_at(browser: Any, found: Comparison, folder: Path, **how: Any) -> Look:
    from skipcat_edge.compare.report import write_report

    return Look(browser, write_report(found, folder), **how)


def test_the_test_finds_faults(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<figure><svg width=200 height=50><text x=10 y=20>one</text><text x=15 y=22>two</text>"
                    "<text x=190 y=40>three</text></svg></figure>", encoding="utf-8")
    assert Look(browser, page).page.evaluate(FAULTS) == ["three leaves the picture", "one covers two"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_close_points_have_labels_apart(browser: Any, tmp_path: Path, scheme: str) -> None:
    found = crowded()
    look = look_at(browser, found, tmp_path, scheme=scheme)
    look.check(3)
    for texts in look.texts():
        for each in found.files[1:]:
            assert each.label in texts
    look.page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)


def test_a_phone_shows_letters_that_can_be_read(browser: Any, tmp_path: Path) -> None:
    look = look_at(browser, crowded(), tmp_path, width=390)
    look.check(3)
    heights = look.page.evaluate("[...document.querySelectorAll('figure svg text')].map("
                                 "text => text.getBoundingClientRect().height)")
    assert min(heights) > 9
    # what is scrolled has a name, and can be scrolled without a pointer
    assert look.page.get_by_role("region").count() == 4
    look.page.get_by_role("region", name="Decode speed and loss").focus()
    assert look.page.evaluate("document.activeElement.scrollWidth > document.activeElement.clientWidth")


def test_points_on_one_spot_have_labels_apart(browser: Any, tmp_path: Path) -> None:
    files = [figures(Kind.LOW_RANK, "Q4_0", 0.9 - 0.01 * number, 600 + number / 10,
                     0.01 * (1 + number / 1000), 500, 50, spread=0.2) for number in range(14)]
    look = look_at(browser, comparison(*files), tmp_path)
    look.check(3)
    assert all(each.label in texts for texts in look.texts() for each in files)


def test_of_very_many_points_those_of_the_front_have_labels(browser: Any, tmp_path: Path) -> None:
    files = [figures(Kind.LOW_RANK, f"T{number}", 0.5, 600 + number,
                     0.01 * (1 + number * (-1) ** number / 100), 500 + number, 50 - number / 2)
             for number in range(40)]
    found = comparison(*files)
    look = look_at(browser, found, tmp_path)
    look.check(3)
    for axis, texts in zip(found.axes, look.texts(), strict=True):
        labels = {each.label for each in files} & set(texts)
        assert labels == {each.label for each in found.front(axis)} - {"F16"}


@pytest.mark.parametrize("found", [
    comparison(figures(Kind.PLAIN, "Q8_0", 1, 1100, 0.0, 900, 20)),
    comparison(figures(Kind.PLAIN, "Q8_0", 1, 2000, 4e-9, 900, None, cosine_min=1.0)),
    comparison(figures(Kind.LOW_RANK, "Q4_0", 0.8, 0.5, 2.5, 0.03, 4000),
               figures(Kind.LOW_RANK, "Q4_0", 0.6, 0.4, 7.5, 0.02, 5000)),
], ids=["no loss", "embedding", "great loss"])
def test_unusual_figures(browser: Any, tmp_path: Path, found: Comparison) -> None:
    look_at(browser, found, tmp_path).check(len(found.axes))


def test_long_names_stay_inside(browser: Any, tmp_path: Path) -> None:
    name = "a-very-long-name-" * 8
    found = crowded()
    files = (*found.files, figures(Kind.OTHER, "Q4_0", 1, 2000, 0.5, 901, 20.01, label="W" * 28,
                                   file=f"{name}.gguf", peak_bytes=123_456_789_012))
    found = replace(found, model=name, files=files, notes=(name,), setting={"command": name * 4})
    look_at(browser, found, tmp_path).check(3)


def test_wide_spreads_leave_the_points_apart(browser: Any, tmp_path: Path) -> None:
    files = [replace(each, decode=measured(each.decode.value, 0.9 * each.decode.value))
             for each in crowded().files if each.decode is not None]
    look_at(browser, replace(crowded(), files=tuple(files)), tmp_path).check(3)
