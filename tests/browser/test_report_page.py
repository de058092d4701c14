"""The report's page in a real browser: every figure drawn, nothing logged, nothing fetched."""

import math

import pytest

from browser.pages import check
from latentguard.report import charts
from latentguard.report.document import Report, Section, Table

LAYERS = [0, 1, 2, 3]
CURVE = ([0.1, 0.5, 0.7, 0.6], [0.0, 0.4, 0.6, 0.5], [0.2, 0.6, 0.8, 0.7])


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report with a figure of every kind, a wide table and hostile names."""
    how = dict(title="Curves", y="rate", caption="n = 4")
    groups = {
        name: ([0.1, -0.2], [0.0, 0.3], ["a-1", "</script><b>x"])
        for name in ("refused harmful", "accepted harmful", "refused harmless", "x", "y", "z", "w")
    }
    parts = (
        charts.lines_by_layer({"a": CURVE, "b": CURVE, "random": CURVE}, LAYERS, zero=True, **how),
        charts.lines_by_layer({"a": CURVE}, ["inst-1", "t_inst", "post+1", "t_post"], **how),
        charts.belief_plane(groups, title="Plane", caption="n = 14"),
        charts.heat_map(
            [[1.0, 0.5], [math.nan, 1.0]], ["<i>a</i>", "b"], ["a" * 60, "b"], **how_m()
        ),
        charts.bar_chart(["one", "two"], [0.2, 0.4], title="Bars", x="score", caption=""),
        Table("Wide", tuple(f"column {n}" for n in range(12)), ((0.5,) * 12, (None,) * 12)),
    )
    report = Report("A <study>", (Section("One & only", "Text.", parts),), {"seed": 0})
    return report.save(tmp_path_factory.mktemp("report")) / "report.html"


def how_m():
    return dict(title="Matrix", caption="n = 4")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_drawn_whole(chromium, page_file, width, scheme):
    check(chromium, page_file, width, scheme)
