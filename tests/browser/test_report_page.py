"""The report's page in a real browser: every figure drawn, nothing logged, nothing fetched."""

import math

import pytest

from latentguard import plots
from latentguard.report import Report, Section, Table

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
        plots.lines_by_layer({"a": CURVE, "b": CURVE, "random": CURVE}, LAYERS, zero=True, **how),
        plots.lines_by_layer({"a": CURVE}, ["inst-1", "t_inst", "post+1", "t_post"], **how),
        plots.plane(groups, title="Plane", caption="n = 14"),
        plots.matrix([[1.0, 0.5], [math.nan, 1.0]], ["<i>a</i>", "b"], ["a" * 60, "b"], **how_m()),
        plots.bars(["one", "two"], [0.2, 0.4], title="Bars", x="score", caption=""),
        Table("Wide", tuple(f"column {n}" for n in range(12)), ((0.5,) * 12, (None,) * 12)),
    )
    report = Report("A <study>", (Section("One & only", "Text.", parts),), {"seed": 0})
    return report.save(tmp_path_factory.mktemp("report")) / "report.html"


def how_m():
    return dict(title="Matrix", caption="n = 4")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_drawn_whole(chromium, page_file, width, scheme):
    logged, fetched = [], []
    size = {"width": width, "height": 900}
    page = chromium.new_page(viewport=size, color_scheme=scheme)
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_function(DRAWN, timeout=20_000)
    assert logged == []
    assert [url for url in fetched if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    ink, paper = page.evaluate(COLOURS)
    assert contrast(ink, paper) >= 7
    page.close()


DRAWN = """() => [...document.querySelectorAll('.plot')].every(plot => {
    const drawn = plot.querySelector('.main-svg');
    return drawn && drawn.clientHeight > 100;
})"""

OUTSIDE = """() => [...document.querySelectorAll('.plot .main-svg, h1, h2, h3, p, nav')]
    .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80))"""

COLOURS = (
    """() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; }"""
)


def contrast(one, other):
    """The contrast ratio of WCAG 2."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour):
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
