"""What compare says of figures: where plain quantisation wins, where noise decides nothing, what is drawn."""

from __future__ import annotations

import re

import pytest
from comparisons import comparison, crowded, figures, measured
from rich.console import Console

from skipcat_edge.compare.figures import DECODE, FIRST_TOKEN, SIZE, Axis, Comparison, Kind, beats
from skipcat_edge.compare.verdict import findings, front_sentence, number, worth_having

pytest.importorskip("matplotlib", reason="the extra `compare` is not installed")
pytest.importorskip("jinja2", reason="the extra `compare` is not installed")

PLAIN, FEEDBACK, LOW, OTHER = Kind.PLAIN, Kind.FEEDBACK, Kind.LOW_RANK, Kind.OTHER


def said(found: Comparison, words: str) -> bool:
    return any(words in sentence for sentence in findings(found))


def test_plain_quantisation_wins_where_it_does() -> None:
    found = comparison(
        figures(PLAIN, "Q8_0", 1, 1100, 4e-4, 800, 34),
        figures(LOW, "F16", 0.6, 1300, 3e-2, 850, 30),
        figures(LOW, "Q4_0", 0.8, 500, 4e-2, 600, 60),
    )
    assert said(found, "Plain quantisation is the better choice than 1 of 2 low-rank files")
    assert said(found, "plain Q8_0 beats F16 0.6")
    assert said(found, "No dense file is both as small and as fast as Q4_0 0.8")


def test_a_dense_file_with_error_feedback_wins_where_it_does() -> None:
    found = comparison(
        figures(PLAIN, "Q4_0", 1, 640, 0.03, 700, 55), figures(FEEDBACK, "Q4_0", 1, 640, 0.009, 700, 55),
        figures(LOW, "Q4_0", 0.9, 650, 0.02, 700, 54),
    )
    assert said(found, "Plain quantisation beats no low-rank file")
    assert said(found, "A dense file with error feedback is the better choice than the only low-rank file")
    assert said(found, "Q4_0: error feedback is the better choice; it lowers the loss from 0.0300 to 0.0090")


def test_low_rank_wins_where_it_does() -> None:
    found = comparison(
        figures(PLAIN, "Q4_0", 1, 640, 0.03, 700, 55), figures(LOW, "Q4_0", 0.9, 580, 0.01, 600, 60))
    assert said(found, "Low rank is the better choice in bytes, time and loss together: Q4_0 0.9 beats plain")
    assert not said(found, "Plain quantisation is the better choice")


def test_a_faster_file_is_not_beaten_but_for_size_alone() -> None:
    found = comparison(
        figures(FEEDBACK, "Q4_0", 1, 640, 0.01, 700, 55), figures(LOW, "Q8_0", 0.6, 700, 0.03, 450, 56))
    assert said(found, "A dense file with error feedback beats no low-rank file")
    assert said(found, "For size alone, the only low-rank file is beaten by a dense file of no more bytes: "
                       "Q8_0 0.6")


def test_noise_is_a_tie() -> None:
    plain = figures(PLAIN, "Q8_0", 1, 1100, 4.0e-4, 800, 34, loss_se=2e-5)
    feedback = figures(FEEDBACK, "Q8_0", 1, 1100, 3.8e-4, 800, 34, loss_se=2e-5)
    assert said(comparison(plain, feedback), "Q8_0: plain quantisation is the better choice; error feedback "
                                             "loses no less beyond the noise")
    assert not beats(plain, feedback) and not beats(feedback, plain)
    clear = figures(FEEDBACK, "Q8_0", 1, 1100, 3.0e-4, 800, 34, loss_se=2e-5)
    assert beats(clear, plain)
    # a little slower, within its repetitions: no reason against it
    slower = figures(FEEDBACK, "Q8_0", 1, 1100, 3.0e-4, 820, 33, loss_se=2e-5, spread=0.05)
    assert beats(slower, plain)
    slow = figures(FEEDBACK, "Q8_0", 1, 1100, 3.0e-4, 1000, 33, loss_se=2e-5, spread=0.05)
    assert not beats(slow, plain)


def test_speeds_tie_where_a_median_lies_within_the_others_repetitions() -> None:
    assert measured(100, 5).ties(measured(104))
    assert measured(104).ties(measured(100, 5))
    assert not measured(100, 3).ties(measured(104, 3))


def test_a_front_by_noise_is_said_to_be_one() -> None:
    found = comparison(
        figures(PLAIN, "Q8_0", 1, 1100, 4e-4, 700, 34, spread=0.05),
        figures(LOW, "F16", 0.9, 1900, 8e-4, 695, 35, spread=0.05),
    )
    sentence = front_sentence(found, FIRST_TOKEN)
    assert "By time to first token, from the fastest on: plain Q8_0 (0.000400)." in sentence
    assert "by noise alone: low-rank F16 0.9 (no better than plain Q8_0)" in sentence
    assert "F16" not in worth_having(found)


def test_each_file_worth_having_is_named_with_its_fronts() -> None:
    found = comparison(
        figures(PLAIN, "Q4_0", 1, 600, 0.03, 880, 50), figures(LOW, "Q4_0", 0.8, 610, 0.04, 500, 70),
        figures(LOW, "F16", 0.9, 1990, 0.05, 890, 21))
    assert worth_having(found) == (
        "Worth having beside the reference: by size, time to first token and decode speed plain Q4_0; "
        "by time to first token and decode speed low-rank Q4_0 0.8.")
    names = {axis.key: [each.label for each in found.front(axis)] for axis in found.axes}
    assert names == {"size": ["Q4_0", "F16"], "first-token": ["Q4_0 0.8", "Q4_0", "F16"],
                     "decode": ["Q4_0 0.8", "Q4_0", "F16"]}


def test_nothing_is_worth_having_where_the_reference_is_best() -> None:
    found = comparison(figures(LOW, "F32", 0.9, 3000, 0.01, 1000, 10))
    assert worth_having(found).startswith("Worth having: the reference alone")
    assert "none is better than the reference" in front_sentence(found, SIZE)


def test_a_file_no_faster_than_the_reference_is_not_worth_having_for_its_speed() -> None:
    # the reference loses nothing: even where the losses tie, nothing speaks for the file
    found = comparison(figures(PLAIN, "Q8_0", 1, 1100, 1e-6, 895, 20.2, loss_se=2e-6, spread=0.05))
    assert worth_having(found) == "Worth having beside the reference: by size plain Q8_0."
    assert front_sentence(found, DECODE).endswith(
        "On the front by noise alone: plain Q8_0 (no better than the F16 reference).")
    copy = comparison(figures(OTHER, "F16", 1, 2000, 0, 900, 20, label="copy"))
    assert worth_having(copy).startswith("Worth having: the reference alone")


def test_nothing_is_said_to_cost_what_it_does_not() -> None:
    found = comparison(
        figures(PLAIN, "Q4_0", 1, 640, 0.03, 700, 55), figures(LOW, "Q4_0", 0.9, 580, 0.01, 600, 60))
    assert said(found, "No dense file is both as small and as fast as Q4_0 0.9 (loss 0.0100).")
    large = figures(LOW, "F16", 0.9, 3000, 0.03, 1000, 15)
    assert not said(comparison(figures(PLAIN, "Q8_0", 1, 3100, 0.02, 500, 50), large), "No dense file")


def test_a_machine_that_tells_no_speeds_apart() -> None:
    found = comparison(figures(PLAIN, "Q8_0", 1, 1100, 4e-4, 890, 20.5, spread=0.1))
    assert "speed" not in worth_having(found)
    assert said(found, "No file's time to first token differs from the reference's")
    assert said(found, "No file's decode speed differs from the reference's")


def test_an_embedding_model_decodes_nothing() -> None:
    found = comparison(figures(PLAIN, "Q8_0", 1, 1100, 4e-4, 700, None, cosine_min=0.99))
    assert found.axes == (SIZE, FIRST_TOKEN)
    from skipcat_edge.compare.report import html

    page = html(found)
    assert "Decode" not in page and "lowest cosine" in page and page.count("<svg ") == 2


@pytest.mark.parametrize(("loss", "text"), [
    (0, "0"), (0.0246, "0.0246"), (0.00011, "0.000110"), (0.5, "0.500"), (1.25, "1.25"), (12.5, "12.5"),
    (1e-9, "0.00000000100"),
])
def test_numbers(loss: float, text: str) -> None:
    assert number(loss) == text


def test_what_comes_from_the_user_is_escaped() -> None:
    from skipcat_edge.compare.report import html, terminal_table

    evil = "<script>alert(1)</script>$x_1$[bold]"
    found = Comparison(evil, (*crowded().files, figures(OTHER, "Q4_0", 1, 700, 0.01, 700, 40, label=evil[:28],
                                                        file=f"{evil}.gguf")), False, (evil,), {evil: evil})
    page = html(found)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;$x_1$[bold]" in page
    console = Console(width=1000)
    with console.capture() as capture:
        console.print(terminal_table(found))
    assert f"{evil}.gguf" in capture.get()


@pytest.mark.parametrize("axis", [SIZE, FIRST_TOKEN, DECODE], ids=lambda axis: str(axis.key))
def test_every_file_is_drawn_where_it_is(axis: Axis) -> None:
    from matplotlib.colors import to_hex

    from skipcat_edge.compare.plots import INK, PAPER, STYLES, draw

    found = crowded()
    figure = draw(found, axis)
    lines = figure.axes[0].lines
    markers = {(to_hex(line.get_color()), line.get_marker(), round(float(line.get_xdata()[0]), 6),
                round(float(line.get_ydata()[0]), 12), to_hex(line.get_markerfacecolor()) != PAPER)
               for line in lines if line.get_marker() in "oD^s"}
    unit = {"size": 1e-6, "first-token": 1e3, "decode": 1}[axis.key]
    expected = {(*STYLES[each.kind], round(axis.value(each).value * unit, 6), round(each.loss, 12),
                 each in found.front(axis)) for each in found.files[1:]}
    assert markers == expected
    labels = {text.get_text() for text in figure.texts}
    assert {each.label for each in found.files[1:]} <= labels
    (steps,) = [line for line in lines if line.get_zorder() == 2]
    assert to_hex(steps.get_color()) == INK
    corners = {(round(float(x), 6), round(float(y), 12)) for x, y in steps.get_xydata()}
    for each in found.front(axis):
        if each.kind is not Kind.REFERENCE:
            assert (round(axis.value(each).value * unit, 6), round(each.loss, 12)) in corners


def test_the_page_asks_for_nothing() -> None:
    from skipcat_edge.compare.report import html

    page = html(crowded())
    assert not re.findall(r"""(?:src|href|@import|url\()\s*=?\s*["'(]?\s*(?:https?:)?//""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for wanted in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert wanted in ids
