"""Plotly charts of the reports, in the one visual language of ``styles``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import require_extra
from latentguard.report.document import Figure, Series
from latentguard.report.styles import (
    HARMFUL,
    HARMLESS,
    NEUTRAL,
    PALETTE,
    REPORTS,
    Style,
    is_control,
    styles_of,
)
from latentguard.stats.estimate import Estimate

__all__ = ["HARMFUL", "HARMLESS", "NEUTRAL", "PALETTE"]

Curve = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""Value, low end and high end of the band at each place."""

Limits = Mapping[str, float]
"""Ends of an axis as plotly's ``autorangeoptions``: exact, or how far it may go."""

MARKED = 12
"""Places up to which each point of a curve has a mark."""

PANEL = 190
"""Height of a panel in pixels, without the names of its axis."""

GAP = 62
"""Pixels between two rows of panels: a title, the numbers and the name of an axis."""

SHARE: Limits = {"minallowed": -0.03, "maxallowed": 1.03}
"""Of an axis of shares: all such figures have one scale, and marks at 0 and 1 are whole."""

SHARE_OF_GAP: Limits = {"clipmin": -1.0, "clipmax": 2.0}
"""Of an axis of shares of a gap, which is 0 to 1 where all goes as expected."""


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
    for name, side, pattern in (("harmless", False, "/"), ("harmful", True, "")):
        values = scores[labels == side].tolist()
        colour = HARMFUL if side else HARMLESS
        marker = dict(color=colour, pattern_shape=pattern)
        plot.add_histogram(x=values, name=name, xbins=bins, marker=marker, opacity=0.6)
    plot.add_vline(x=threshold, line_dash="dash", line_color=NEUTRAL, annotation_text="threshold")
    n = f"{int(labels.sum())} harmful, {int((~labels).sum())} harmless prompts"
    return Figure(f"Scores on {of}", plot, f"{n}; right of the dashed line a prompt is flagged.")


def roc_curves(
    scores: Mapping[str, NDArray[np.float64]], labels: NDArray[np.bool_], *, of: str
) -> Figure:
    """Return the true-positive against the false-positive rate of each rule."""
    from sklearn.metrics import roc_curve  # half a second, which few reports need

    axes = dict(xaxis_title="false-positive rate", yaxis_title="true-positive rate")
    plot = new_plot(**axes, xaxis_range=[0, 1], yaxis_range=[0, 1.02])
    for (rule, values), style in zip(scores.items(), styles_of(scores), strict=True):
        false, true, _ = roc_curve(labels, values)
        line = dict(color=style.colour, dash=style.dash)
        plot.add_scatter(x=false.tolist(), y=true.tolist(), name=rule, line=line)
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


def control_panels(curves: Mapping[str, Curve]) -> dict[str, tuple[str, ...]]:
    """A panel for each curve that is no control, with its controls.

    A control that is named after curves, as in ``random, norm of harmfulness``, stands beside those
    alone; every other control stands in each panel.
    """
    controls = {name: name.rpartition("norm of ")[2] for name in curves if is_control(name)}
    plain = [name for name in curves if name not in controls]
    panels = {of for of in controls.values() if any(of in name for name in plain)}
    return {
        name: (name, *(c for c, of in controls.items() if of in name or of not in panels))
        for name in plain
    }


def lines_by_layer(  # noqa: PLR0913 (each is a part of the figure)
    curves: Mapping[str, Curve],
    layers: Sequence[int | str],
    *,
    title: str,
    y: str,
    caption: str,
    x: str = "layer (blocks passed)",
    zero: bool = False,
    limits: Limits | None = None,
    panels: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Return curves with bands, by layer or, with another ``x``, by position.

    Where layers are left out, intervals are drawn as bars: nothing is known between them.

    Args:
        curves: Name -> (value, low, high), each as long as ``layers`` or ending before them; a name
            that begins with ``random`` is a control, drawn grey and dotted.
        layers: Places on the horizontal axis.
        title: Title of the figure.
        y: Name of the vertical axis.
        caption: What it shows, with n.
        x: Name of the horizontal axis.
        zero: Draws a line at 0, such as the threshold of equation 2.
        limits: Ends of the vertical axis, such as ``SHARE``; what lies beyond is cut off.
        panels: Heading of each panel -> names of its curves, which may end in the heading after a
            comma; all in one panel if None.
    """
    styles = dict(zip(curves, styles_of(curves), strict=True))
    if panels is not None:
        styles = {n: s for of in panels.values() for n, s in zip(of, styles_of(of), strict=True)}
    panel_curves = {title: tuple(curves)} if panels is None else panels
    plot = new_plot()
    legend = set(panel_curves) if len(panel_curves) > 1 else set[str]()  # headings need no legend
    for slot, (head, names) in enumerate(panel_curves.items()):
        for row, name in enumerate(names):
            shift = _dodge(layers, row - (len(names) - 1) / 2)
            label = name.removesuffix(f", {head}")
            places = layers[: len(curves[name][0])]
            for trace in _traces(label, curves[name], places, styles[name], shift=shift):
                trace["showlegend"] = trace["showlegend"] and label not in legend
                plot.add_scatter(**trace, **_on_panel(slot))
            legend.add(label)
        if zero:
            plot.add_shape(line=dict(dash="dash", color=NEUTRAL, width=1.5), **_level(slot))
    if len(panel_curves) == 1:
        plot.update_layout(xaxis_title=x, yaxis_title=y)
    else:
        _arrange(plot, tuple(panel_curves), x=x, y=y)
    if limits is not None:
        plot.update_yaxes(autorangeoptions=dict(limits))
    if len(layers) <= MARKED and isinstance(layers[0] if layers else "", int):
        plot.update_xaxes(tickvals=list(layers))  # no halves of layers
    series = tuple(
        Series(name, tuple(layers[: len(curve[0])]), *(tuple(map(float, of)) for of in curve))
        for name, curve in curves.items()
    )
    return Figure(title, plot, caption, series, (x, y))


def overlaid_lines(
    panels: Mapping[str, Mapping[str, Series]],
    names: Sequence[str],
    *,
    title: str,
    x: str,
    y: str,
) -> Figure:
    """Return the same curves of several reports on each other.

    Args:
        panels: Heading of each panel -> report -> its curve; each has places of its own.
        names: All reports, in the order of their colours, so that they keep them in all figures.
        title: Title of the figure.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
    """
    plot, legend = new_plot(), set[str]()
    styles = dict(zip(names, cycle(REPORTS), strict=False))
    for slot, lines in enumerate(panels.values()):
        for name, one in lines.items():
            curve = (one.value, one.low, one.high)
            for trace in _traces(name, curve, one.places, styles[name], shift=0.0):
                trace["showlegend"] = trace["showlegend"] and name not in legend
                plot.add_scatter(**trace, **_on_panel(slot))
            legend.add(name)
    if len(panels) == 1:
        plot.update_layout(xaxis_title=x, yaxis_title=y)
    else:
        _arrange(plot, tuple(panels), x=x, y=y)
    heads = "; ".join(panels) if len(panels) == 1 else f"{len(panels)} curves"
    return Figure(title, plot, f"{heads}, {len(legend)} reports.")


def _traces(
    name: str, curve: Curve, places: Sequence[float | str], style: Style, *, shift: float
) -> list[dict[str, Any]]:
    """A curve with its band; with bars for intervals where places are left out."""
    value, low, high = (list(map(float, of)) for of in curve)
    line = dict(color=style.colour, dash=style.dash, width=2)
    mode = "lines+markers" if len(places) <= MARKED else "lines"
    marker = dict(color=style.colour, symbol=style.symbol, size=6)
    points: dict[str, Any] = dict(y=value, name=name, legendgroup=name, line=line, mode=mode)
    points |= dict(x=list(places), marker=marker, showlegend=True)
    has_interval = low != value or high != value
    if _is_sparse(places):
        up = [top - at for top, at in zip(high, value, strict=True)]
        down = [at - bottom for bottom, at in zip(low, value, strict=True)]
        points["x"] = [float(at) + shift for at in places]
        points |= dict(mode="lines+markers", line=line | dict(width=1))
        points["error_y"] = dict(array=up, arrayminus=down, thickness=1.4, width=3)
        return [points]
    if not has_interval:
        return [points]
    fill = dict(fill="toself", fillcolor=style.colour, opacity=0.15, line_width=0, mode="lines")
    around = dict(x=[*places, *reversed(places)], y=[*high, *reversed(low)], legendgroup=name)
    return [around | fill | dict(hoverinfo="skip", showlegend=False), points]


def _is_sparse(places: Sequence[float | str]) -> bool:
    """Whether numbers between two places are left out."""
    return any(
        isinstance(one, int) and isinstance(other, int) and other - one > 1
        for one, other in pairwise(places)
    )


def _dodge(places: Sequence[int | str], steps: float) -> float:
    """How far a curve is moved so that its bars do not lie on another's."""
    if not _is_sparse(places):
        return 0.0
    widths = [int(other) - int(one) for one, other in pairwise(places)]
    return steps * 0.06 * min(widths)


def _on_panel(slot: int) -> dict[str, str]:
    """The axes of a panel, as traces name them."""
    return dict(zip(("xaxis", "yaxis"), _axes(slot), strict=True))


def _level(slot: int) -> dict[str, Any]:
    """A level line at 0 across a panel."""
    x, y = _axes(slot)
    return dict(type="line", xref=f"{x} domain", x0=0, x1=1, yref=y, y0=0, y1=0)


def _axes(slot: int) -> tuple[str, str]:
    number = "" if slot == 0 else str(slot + 1)
    return f"x{number}", f"y{number}"


def _arrange(plot: Any, heads: Sequence[str], *, x: str, y: str) -> None:
    """Lay panels out in a grid on common scales; the page does the same for narrow screens."""
    count = len(heads)
    columns = 2 if count in (2, 4) else min(3, count)
    rows = -(-count // columns)
    height = rows * (PANEL + GAP)
    for slot, head in enumerate(heads):
        row, column = divmod(slot, columns)
        left, right = column / columns, (column + 0.94) / columns
        top = 1 - row * (PANEL + GAP) / (height - GAP)
        bottom = top - PANEL / (height - GAP)
        axis_x, axis_y = _axes(slot)
        number = axis_x[1:]
        is_last = slot + columns >= count
        plot.update_layout(
            {
                f"xaxis{number}": dict(
                    domain=[left, right],
                    anchor=axis_y,
                    matches="x" if slot else None,
                    title_text=x if is_last else None,
                ),
                f"yaxis{number}": dict(
                    domain=[max(bottom, 0), top],
                    anchor=axis_x,
                    matches="y" if slot else None,
                    title_text=y if column == 0 else None,
                    showticklabels=column == 0,
                ),
            }
        )
        place = dict(xref=f"{axis_x} domain", yref=f"{axis_y} domain", x=0, y=1.02)
        text = f"<b>{head}</b>"
        plot.add_annotation(text=text, **place, xanchor="left", yanchor="bottom", showarrow=False)
    plot.update_layout(height=height + 60, meta=dict(panels=count, columns=columns, x=x, y=y))


def stacked_shares(
    shares: Mapping[str, Sequence[float]],
    layers: Sequence[int],
    *,
    title: str,
    caption: str,
) -> Figure:
    """Return shares that add up to 1, stacked at each layer that was run: name -> by layer."""
    axes = dict(xaxis_title="layer (blocks passed)", yaxis_title="share", yaxis_range=[0, 1])
    plot = new_plot(**axes, barmode="stack", bargap=0.25)
    plot.update_xaxes(type="category")
    for (name, values), style in zip(shares.items(), styles_of(shares), strict=True):
        marker = dict(color=style.colour, pattern_shape=style.pattern)
        plot.add_bar(x=[str(one) for one in layers], y=list(values), name=name, marker=marker)
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
    for (name, (x, y, text)), style in zip(groups.items(), styles_of(groups), strict=True):
        marker = dict(color=style.colour, symbol=style.symbol, size=7, opacity=0.7)
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
    middle: float | None = 0.5,
) -> Figure:
    """Return a heat map of values between 0 and 1, [rows columns].

    Args:
        values: The values.
        rows: Name of each row.
        columns: Name of each column.
        title: Title of the figure.
        caption: What it shows, with n.
        middle: Where the two colours part, such as 0.5 for an AUROC; None for one scale from 0.
    """
    labels = [*map(_wrapped, rows)]
    plot = new_plot(height=190 + sum(12 + 18 * (label.count("<br>") + 1) for label in labels))
    grid = [list(row) for row in values]
    scale: dict[str, Any] = dict(zmin=0, zmax=1, texttemplate="%{z:.2f}")
    if middle is None:
        scale |= dict(colorscale="Greys")
    else:
        scale |= dict(colorscale="PuOr", reversescale=True, zmid=middle)
    hover_texts = [[f"{row}, {column}" for column in columns] for row in rows]
    plot.add_heatmap(z=grid, hovertext=hover_texts, hoverinfo="text+z", **scale, xgap=2, ygap=2)
    plot.update_xaxes(_tick_labels(columns, 14), tickangle=-45 if len(columns) > 4 else 0)
    plot.update_yaxes(_tick_labels(rows), autorange="reversed")
    return Figure(title, plot, caption)


def dot_plot(
    names: Sequence[str],
    series: Mapping[str, Sequence[Estimate]],
    *,
    title: str,
    x: str,
    caption: str,
    limits: Limits | None = None,
) -> Figure:
    """Return points with intervals: a row per name, the first on top, a mark per series."""
    plot = new_plot(xaxis_title=x, height=150 + 30 * len(names))
    for row, ((name, estimates), style) in enumerate(
        zip(series.items(), styles_of(series), strict=True)
    ):
        value, low, high = map(np.array, to_curve(estimates))
        bars = dict(type="data", array=(high - value).tolist(), arrayminus=(value - low).tolist())
        marker = dict(color=style.colour, symbol=style.symbol, size=9)
        shift = 0.2 * (row - (len(series) - 1) / 2)
        places = [place + shift for place in range(len(names))]
        points = dict(x=value.tolist(), y=places, error_x=bars, marker=marker)
        plot.add_scatter(**points, name=name, mode="markers")
    plot.update_yaxes(_tick_labels(names), autorange="reversed")
    if limits is not None:
        plot.update_xaxes(autorangeoptions=dict(limits))
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
    labels = _tick_labels(names, 48)
    plot = new_plot(xaxis_title=x, height=90 + _label_height(labels))
    plot.add_bar(
        x=list(values),
        y=list(range(len(names))),
        orientation="h",
        marker_color=list(colours) if colours else HARMFUL,
        hovertext=list(names),
        hoverinfo="x+text",
    )
    plot.update_yaxes(labels, autorange="reversed")
    return Figure(title, plot, caption)


def _label_height(labels: Mapping[str, Sequence[int | str]]) -> int:
    """Return the pixels that rows need whose labels have one or more lines; all are as high."""
    lines = max(str(text).count("<br>") + 1 for text in labels["ticktext"])
    return len(labels["ticktext"]) * (10 + 16 * lines)


def _tick_labels(names: Sequence[str], width: int = 26) -> dict[str, list[int] | list[str]]:
    """Return tick labels by place, since names need not be unique."""
    return dict(tickvals=list(range(len(names))), ticktext=[_wrapped(n, width) for n in names])


def _wrapped(text: str, width: int = 26) -> str:
    """Return a label in lines of at most ``width`` characters, whole."""
    return "<br>".join(wrap(text, width, break_long_words=False)) or text
