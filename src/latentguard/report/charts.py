"""Plotly charts of the reports, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from latentguard.errors import require_extra
from latentguard.report.document import Figure
from latentguard.stats.estimate import Estimate

HARMFUL, HARMLESS, NEUTRAL = "#d55e00", "#0072b2", "#7f8c9b"
Curve = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""Value, low end and high end of the band at each place."""

PALETTE = (HARMFUL, HARMLESS, "#009e73", "#cc79a7", "#e69f00", NEUTRAL)
MARKS = tuple(
    zip(PALETTE, ("circle", "square", "x", "diamond", "triangle-up", "cross"), strict=True)
)
"""Colour and symbol of each series of points."""


def new_plot(**layout: Any) -> Any:
    """Return an empty ``plotly.graph_objects.Figure``.

    Raises:
        MissingExtra: if the extra ``report`` is not installed.
    """
    go = require_extra("plotly.graph_objects", "report", "A report with figures")
    return go.Figure(layout=layout)


def score_histogram(
    scores: NDArray[np.float64], labels: NDArray[np.bool_], threshold: float, *, of: str
) -> Figure:
    """Return a histogram of the scores of both classes, with the threshold."""
    plot = new_plot(barmode="overlay", xaxis_title="score", yaxis_title="prompts")
    low, high = float(scores.min()), float(scores.max())
    bins = dict(start=low, end=high, size=(high - low) / 40 or 1.0)
    for name, side, colour in (("harmless", False, HARMLESS), ("harmful", True, HARMFUL)):
        values = scores[labels == side].tolist()
        plot.add_histogram(x=values, name=name, xbins=bins, marker_color=colour, opacity=0.6)
    plot.add_vline(x=threshold, line_dash="dash", line_color=NEUTRAL, annotation_text="threshold")
    n = f"{int(labels.sum())} harmful, {int((~labels).sum())} harmless prompts"
    return Figure(f"Scores on {of}", plot, f"{n}; right of the dashed line a prompt is flagged.")


def roc_curves(
    scores: Mapping[str, NDArray[np.float64]], labels: NDArray[np.bool_], *, of: str
) -> Figure:
    """Return the true-positive against the false-positive rate of each rule."""
    axes = dict(xaxis_title="false-positive rate", yaxis_title="true-positive rate")
    plot = new_plot(**axes, xaxis_range=[0, 1], yaxis_range=[0, 1.02])
    for (rule, values), colour in zip(scores.items(), cycle(PALETTE), strict=False):
        false, true, _ = roc_curve(labels, values)
        plot.add_scatter(x=false.tolist(), y=true.tolist(), name=rule, line_color=colour)
    plot.add_scatter(
        x=[0, 1], y=[0, 1], name="chance", line=dict(color=NEUTRAL, dash="dot"), hoverinfo="skip"
    )
    n = f"{int(labels.sum())} harmful, {int((~labels).sum())} harmless prompts"
    return Figure(f"ROC on {of}", plot, f"{n}. Up and left is better.")


def to_curve(estimates: Sequence[Estimate]) -> Curve:
    """Return estimates as a curve with its band."""
    ends = ("value", "low", "high")
    value, low, high = ([float(getattr(e, end)) for e in estimates] for end in ends)
    return value, low, high


def lines_by_layer(
    curves: Mapping[str, Curve],
    layers: Sequence[int | str],
    *,
    title: str,
    y: str,
    caption: str,
    x: str = "layer (blocks passed)",
    zero: bool = False,
) -> Figure:
    """Return curves with bands, by layer or, with another ``x``, by position.

    Args:
        curves: Name -> (value, low, high), each as long as ``layers``; a name that begins with
            ``random`` is drawn grey and dashed. Many curves are coloured from dark to light.
        layers: Places on the horizontal axis.
        title: Title of the figure.
        y: Name of the vertical axis.
        caption: What it shows, with n.
        x: Name of the horizontal axis.
        zero: Draws a line at 0, such as the threshold of equation 2.
    """
    plot = new_plot(xaxis_title=x, yaxis_title=y)
    count = sum(not name.startswith("random") for name in curves)
    colors = require_extra("plotly.colors", "report", "A report with figures")
    shades = colors.sample_colorscale("Viridis", np.linspace(0, 0.9, count).tolist())
    colours = cycle(PALETTE[:-1] if count < len(PALETTE) else shades)
    dashes = cycle(("dot", "dash"))
    for name, (value, low, high) in curves.items():
        control = name.startswith("random")
        colour = NEUTRAL if control else next(colours)
        fill = dict(fill="toself", fillcolor=colour, opacity=0.15, line_width=0)
        around = dict(x=[*layers, *reversed(layers)], y=[*high, *reversed(low)], legendgroup=name)
        plot.add_scatter(**around, showlegend=False, hoverinfo="skip", mode="lines", **fill)
        line = dict(color=colour, dash=next(dashes) if control else "solid")
        points = dict(x=list(layers), y=list(value), legendgroup=name)
        plot.add_scatter(**points, name=name, line=line, mode="lines+markers", marker_size=5)
    if zero:
        plot.add_hline(y=0, line_dash="dash", line_color=NEUTRAL)
    return Figure(title, plot, caption)


def stacked_areas(
    shares: Mapping[str, Sequence[float]],
    layers: Sequence[int],
    *,
    title: str,
    caption: str,
) -> Figure:
    """Return shares that add up to 1 at each layer, stacked: name -> share by layer."""
    axes = dict(xaxis_title="layer (blocks passed)", yaxis_title="share", yaxis_range=[0, 1])
    plot = new_plot(**axes)
    for (name, values), colour in zip(shares.items(), cycle((*PALETTE[:4], NEUTRAL)), strict=False):
        area = dict(stackgroup="one", mode="lines", line_color=colour, fillcolor=colour)
        plot.add_scatter(x=list(layers), y=list(values), name=name, **area)
    return Figure(title, plot, caption)


def belief_plane(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[str]]],
    *,
    title: str,
    caption: str,
) -> Figure:
    """Return points by both beliefs.

    Args:
        groups: Name -> (Delta_harmful, Delta_refuse, hover text), each [n].
        title: Title of the figure.
        caption: What it shows, with n.
    """
    axes = dict(xaxis_title="\u0394 harmful", yaxis_title="\u0394 refuse")
    plot = new_plot(**axes, height=480)
    for (name, (x, y, text)), (colour, symbol) in zip(groups.items(), cycle(MARKS), strict=False):
        marker = dict(color=colour, symbol=symbol, size=7, opacity=0.7)
        hover = dict(hovertext=list(text), hoverinfo="text+x+y+name")
        plot.add_scatter(x=list(x), y=list(y), name=name, mode="markers", marker=marker, **hover)
    plot.add_hline(y=0, line_dash="dash", line_color=NEUTRAL)
    plot.add_vline(x=0, line_dash="dash", line_color=NEUTRAL)
    return Figure(title, plot, caption)


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    caption: str,
) -> Figure:
    """Return a heat map of values between 0 and 1, [rows columns]."""
    plot = new_plot(height=150 + 30 * len(rows))
    grid = [list(row) for row in values]
    scale = dict(colorscale="Cividis", zmin=0, zmax=1, texttemplate="%{z:.2f}")
    hover_texts = [[f"{row}, {column}" for column in columns] for row in rows]
    plot.add_heatmap(z=grid, hovertext=hover_texts, hoverinfo="text+z", **scale)
    plot.update_xaxes(_tick_labels(columns, 24))
    plot.update_yaxes(_tick_labels(rows, 24), autorange="reversed")
    return Figure(title, plot, caption)


def dot_plot(
    names: Sequence[str],
    series: Mapping[str, Sequence[Estimate]],
    *,
    title: str,
    x: str,
    caption: str,
) -> Figure:
    """Return points with intervals: a row per name, the first on top, a mark per series."""
    plot = new_plot(xaxis_title=x, height=150 + 30 * len(names))
    for (name, estimates), (colour, symbol) in zip(series.items(), cycle(MARKS), strict=False):
        value, low, high = map(np.array, to_curve(estimates))
        bars = dict(type="data", array=(high - value).tolist(), arrayminus=(value - low).tolist())
        marker = dict(color=colour, symbol=symbol, size=9)
        points = dict(x=value.tolist(), y=list(range(len(names))), error_x=bars, marker=marker)
        plot.add_scatter(**points, name=name, mode="markers")
    plot.update_yaxes(_tick_labels(names, 24), autorange="reversed")
    return Figure(title, plot, caption)


def bar_chart(
    names: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    x: str,
    caption: str,
    colours: Sequence[str] | None = None,
) -> Figure:
    """Return horizontal bars, the first on top."""
    plot = new_plot(xaxis_title=x, height=90 + 26 * len(names))
    plot.add_bar(
        x=list(values),
        y=list(range(len(names))),
        orientation="h",
        marker_color=list(colours) if colours else HARMFUL,
        hovertext=list(names),
        hoverinfo="x+text",
    )
    plot.update_yaxes(_tick_labels(names, 48), autorange="reversed")
    return Figure(title, plot, caption)


def _tick_labels(names: Sequence[str], most: int) -> dict[str, list[int] | list[str]]:
    """Return tick labels by place, since shortened names need not be unique."""
    return dict(tickvals=list(range(len(names))), ticktext=[shorten(n, most) for n in names])


def shorten(text: str, most: int) -> str:
    """Return a label of at most ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
