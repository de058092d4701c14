"""Plotly figures of the reports; colours are told apart by colour-blind readers, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from latentguard.report import Figure

HARMFUL, HARMLESS, NEUTRAL = "#d55e00", "#0072b2", "#7f8c9b"
PALETTE = (HARMFUL, HARMLESS, "#009e73", "#cc79a7", "#e69f00", NEUTRAL)


def score_histogram(
    scores: NDArray[np.float64], labels: NDArray[np.bool_], threshold: float, *, of: str
) -> Figure:
    """How the scores of both classes lie about the threshold."""
    plot = go.Figure(layout=dict(barmode="overlay", xaxis_title="score", yaxis_title="prompts"))
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
    """True-positive against false-positive rate of each rule."""
    axes = dict(xaxis_title="false-positive rate", yaxis_title="true-positive rate")
    plot = go.Figure(layout=dict(**axes, xaxis_range=[0, 1], yaxis_range=[0, 1.02]))
    for (rule, values), colour in zip(scores.items(), cycle(PALETTE), strict=False):
        false, true, _ = roc_curve(labels, values)
        plot.add_scatter(x=false.tolist(), y=true.tolist(), name=rule, line_color=colour)
    plot.add_scatter(
        x=[0, 1], y=[0, 1], name="chance", line=dict(color=NEUTRAL, dash="dot"), hoverinfo="skip"
    )
    n = f"{int(labels.sum())} harmful, {int((~labels).sum())} harmless prompts"
    return Figure(f"ROC on {of}", plot, f"{n}. Up and left is better.")


def lines_by_layer(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    layers: Sequence[int],
    *,
    title: str,
    y: str,
    caption: str,
) -> Figure:
    """A figure by layer with its band: curve name -> (value, low, high) by layer."""
    plot = go.Figure(layout=dict(xaxis_title="layer (blocks passed)", yaxis_title=y))
    for (name, (value, low, high)), colour in zip(curves.items(), cycle(PALETTE), strict=False):
        band = [*high, *reversed(low)]
        x = [*layers, *reversed(layers)]
        fill = dict(fill="toself", fillcolor=colour, opacity=0.15, line_width=0)
        plot.add_scatter(x=x, y=band, showlegend=False, hoverinfo="skip", mode="lines", **fill)
        plot.add_scatter(x=list(layers), y=list(value), name=name, line_color=colour)
    return Figure(title, plot, caption)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    x: str,
    caption: str,
    colours: Sequence[str] | None = None,
) -> Figure:
    """Horizontal bars, the first on top."""
    plot = go.Figure(layout=dict(xaxis_title=x, height=90 + 26 * len(names)))
    plot.add_bar(
        x=list(values),
        y=list(range(len(names))),
        orientation="h",
        marker_color=list(colours) if colours else HARMFUL,
        hovertext=list(names),
        hoverinfo="x+text",
    )
    labels = [shorten(name) for name in names]
    plot.update_yaxes(autorange="reversed", tickvals=list(range(len(names))), ticktext=labels)
    return Figure(title, plot, caption)


def shorten(text: str, most: int = 48) -> str:
    """A label that leaves room for its bar."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
