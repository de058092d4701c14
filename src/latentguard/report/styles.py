"""One visual language: what has a name in the paper looks the same in every figure.

- Harmful is warm and harmless is cool. Groups whose refusal goes with their label are drawn with
  solid lines and full marks, the two misbehaving groups with dashed lines and open marks.
- What is about refusal is purple, guards are blue, and every control is grey and dotted.
- All colours have a contrast of 3 or more on white and on the dark page. In grey, the dashes and
  marks tell the series apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, product

HARMFUL, HARMLESS, NEUTRAL = "#d55e00", "#009e73", "#7f8c9b"
REFUSAL, GUARD, AMBER, SKY = "#b5609a", "#0072b2", "#a87000", "#2f8fc9"
OLIVE, BROWN = "#7d8a2e", "#96704a"

PALETTE = (HARMFUL, GUARD, HARMLESS, REFUSAL, AMBER, NEUTRAL)


@dataclass(frozen=True)
class Style:
    """How a series is drawn."""

    colour: str
    """Of its line, band and marks."""

    dash: str = "solid"
    """Of its line: a name of Plotly."""

    symbol: str = "circle"
    """Of its marks: a name of Plotly."""

    pattern: str = ""
    """Of its bars: a character of Plotly, which also tells them apart in grey."""


CONTROL = Style(NEUTRAL, "dot", "cross-thin-open", "")

NAME_STYLES: tuple[tuple[str, Style], ...] = (
    (r"random|chance", CONTROL),
    (r"refused harmful", Style(HARMFUL, "solid", "circle")),
    (r"accepted harmful", Style(AMBER, "dash", "circle-open")),
    (r"refused harmless", Style(SKY, "dash", "square-open")),
    (r"accepted harmless", Style(HARMLESS, "solid", "square")),
    (r"recall, paper's rule|latent guard(?!.*minus)", Style(GUARD, "solid", "diamond")),
    (r"the paper's rule", Style(SKY, "dash", "diamond-open")),
    (r"recall, linear guard|linear guard", Style(OLIVE, "longdash", "triangle-up")),
    (r"n-grams|form alone|length", Style(NEUTRAL, "dashdot", "x")),
    (r"certainly", Style(HARMFUL, "solid", "circle", "")),
    (r"no", Style(HARMLESS, "solid", "square", "/")),
    (r"refusal direction, instruction only", Style(SKY, "dash", "triangle-down-open")),
    (r"refusal|plain prompt refused", Style(REFUSAL, "solid", "triangle-up", "x")),
    (r"other", Style(NEUTRAL, "solid", "x", ".")),
    (r"reverse harmfulness(?:.* direction)?", Style(AMBER, "dash", "circle-open")),
    (r"harmfulness direction, instruction only", Style(AMBER, "dash", "circle-open")),
    (r"harmfulness", Style(HARMFUL, "solid", "circle")),
    (r"reverse refusal", Style(SKY, "dash", "triangle-down-open")),
    (r"t_inst", Style(HARMFUL, "solid", "circle")),
    (r"t_post", Style(REFUSAL, "solid", "triangle-up")),
    (r"harmful", Style(HARMFUL, "solid", "circle")),
    (r"harmless", Style(HARMLESS, "solid", "square")),
    (r"before", Style(NEUTRAL, "dash", "circle-open")),
)
"""Beginning of a name -> its style; the first that fits counts."""

OTHERS: tuple[Style, ...] = tuple(
    Style(colour, dash, symbol, pattern)
    for (dash, symbol, pattern), colour in product(
        (("solid", "circle", ""), ("dash", "square", "/"), ("dashdot", "diamond", "x")),
        (BROWN, OLIVE, SKY, AMBER, REFUSAL, HARMLESS, GUARD, HARMFUL),
    )
)
"""Styles of series that have no name in the paper, in order."""

REPORTS: tuple[Style, ...] = (
    Style(GUARD, "solid", "circle"),
    Style(HARMFUL, "dash", "square-open"),
    Style(HARMLESS, "dashdot", "diamond"),
    Style(REFUSAL, "longdash", "triangle-up-open"),
    Style(AMBER, "dot", "x"),
    Style(SKY, "longdashdot", "star-open"),
)
"""Styles of reports that are laid on each other, in order, then again from the first."""


def is_control(name: str) -> bool:
    """Whether a series is a control, which is grey and dotted everywhere."""
    return re.match(r"random|chance", name, re.IGNORECASE) is not None


def named_style(name: str) -> Style | None:
    """The style of a series that looks the same in every figure; None if it has none."""
    plain = re.sub(r"\s*\(n = \d+\)$", "", name.lower())
    return next((style for start, style in NAME_STYLES if re.match(rf"(?:{start})\b", plain)), None)


def styles_of(names: Iterable[str]) -> list[Style]:
    """The style of each series of one figure; two series never share one, but controls may."""
    others, used, styles = _others(), set[Style](), list[Style]()
    for name in names:
        style = named_style(name)
        if style is None or (style in used and style != CONTROL):
            style = next(one for one in others if one not in used)
        used.add(style)
        styles.append(style)
    return styles


def _others() -> Iterator[Style]:
    """The other styles, then again from the first."""
    yield from OTHERS
    yield from cycle(Style(one.colour, "longdashdot", "star") for one in OTHERS[:8])
