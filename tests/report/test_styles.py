"""One visual language: the same things look the same, on white, on black and in grey."""

import pytest

from browser.pages import contrast
from latentguard.report.charts import bar_chart
from latentguard.report.styles import (
    CONTROL,
    NAME_STYLES,
    OTHERS,
    PALETTE,
    REPORTS,
    named_style,
    styles_of,
)

GROUPS = ("refused harmful", "accepted harmful", "refused harmless", "accepted harmless")


def rgb(colour):
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


@pytest.mark.parametrize("paper", ["#ffffff", "#14181f"])
def test_every_colour_is_seen_on_either_page(paper):
    styles = [style for _, style in NAME_STYLES] + list(OTHERS)
    for colour in {style.colour for style in styles} | set(PALETTE):
        assert contrast(rgb(colour), rgb(paper)) >= 3


def test_groups_look_the_same_whatever_stands_beside_them():
    alone = {name: named_style(name) for name in GROUPS}
    for names in (GROUPS, GROUPS[::-1], ("accepted harmful (n = 5)", "refused harmless (n = 7)")):
        for name, style in zip(names, styles_of(names), strict=True):
            assert style == alone[name.partition(" (")[0]]


def test_reports_on_each_other_are_told_apart_without_colour():
    assert len({style.dash for style in REPORTS}) == len(REPORTS)


def test_groups_are_told_apart_without_colour():
    shapes = {(style.dash, style.symbol) for style in map(named_style, GROUPS)}
    assert len(shapes) == 4


def test_a_guard_is_the_same_in_every_report():
    names = ("Latent Guard", "latent guard (this demo's)", "latent guard", "recall, paper's rule")
    assert len({named_style(name) for name in names}) == 1


def test_controls_are_grey_and_all_alike():
    assert styles_of(["random, norm of a", "random, norm of b", "chance"]) == [CONTROL] * 3


def test_no_two_series_of_a_figure_share_a_style():
    names = [f"series {n}" for n in range(30)] + ["refusal", "refusal rate", "plain prompt refused"]
    assert len(set(styles_of(names))) == len(names)


def test_the_answer_no_is_not_every_word_that_begins_so():
    assert named_style("No") == named_style("no (n = 3)")
    assert named_style("north") is None


def test_bars_have_room_for_labels_of_two_lines():
    """A row of 26 pixels holds one line; the second lay over the next label."""
    short = bar_chart(["one", "two"], [0.1, 0.2], title="t", x="x", caption="c")
    long = bar_chart(["word " * 12, "two"], [0.1, 0.2], title="t", x="x", caption="c")
    assert long.plot.layout.height - short.plot.layout.height == 2 * 16
