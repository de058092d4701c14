"""How alike the directions of categories are, and how alike chance makes them (Figures 9a, 17)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from latentguard.report.charts import Curve, dot_plot, heat_map, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import bootstrap_mean
from latentguard.stats.estimate import Estimate
from latentguard.stats.intervals import centered_interval
from latentguard.stats.rates import rate_difference
from latentguard.study.figures.figure_09_categories.as_printed import printed_table
from latentguard.study.figures.figure_09_categories.category_cosines import (
    Array,
    halved_cosines,
    resampled_cosines,
    shuffled_cosines,
    to_others,
)
from latentguard.study.figures.figure_09_categories.collect import CONCEPTS, Records
from latentguard.study.figures.figure_09_categories.steering import (
    flip_figure,
    flip_table,
    own_and_others,
)
from latentguard.study.finding import Finding, cells
from latentguard.study.settings import Settings
from latentguard.study.steering import middle_layers

FEWEST = 3
"""Refused categories that claim 6 needs: two have one cosine between them."""

PAPER = (
    "In the paper, mean cosine to the others, harmfulness and refusal: 0.60 to 0.73 and 0.89 to "
    "0.95 (Qwen2-7B). Llama3: 0.67 to 0.79 and 0.93 to 0.96. Llama2: 0.81 to 0.89 and 0.95 to 0.97."
)

Draws = Mapping[str, Array]
"""Cosines by position, [r l c c]."""


def analyse(records: Records, settings: Settings) -> Finding:
    """Cosines with intervals and with chance beside them, and how often own directions flip."""
    if not records.clouds or records.steered is None:
        return Finding(_section([]), {}, (f"Figure 9: {records.note}.",))
    parts, effects = _compare(records, settings)
    names, steered = records.names, records.steered
    if records.printed is not None:
        parts.append(printed_table(records.printed))
    parts.append(flip_table(names, steered))
    caveats = _unrefused(records, settings)
    able, tested = steered.open, len(steered.tested)
    if able.any():
        parts.append(flip_figure(names, steered))
    if able.sum() >= settings.enough:
        flips = steered.no[: len(names), able]
        flipped = own_and_others(steered.tested[able], flips)
        effects["own minus other category flip rate"] = rate_difference(*flipped)
    else:
        caveats.append(
            f"Figure 9b: only {able.sum()} of {tested} prompts are not answered No anyway; so few "
            "cannot show which direction flips them."
        )
    if tested >= settings.enough:
        odds = own_and_others(steered.tested, steered.odds[: len(names)])
        effects["own minus other category log odds of No"] = bootstrap_mean(np.subtract(*odds))
    return Finding(_section(parts), effects, tuple(caveats))


def _unrefused(records: Records, settings: Settings) -> list[str]:
    """Say which categories have too few refused prompts."""
    few = [name for name, some in zip(records.names, records.refused, strict=True) if not some]
    lines = []
    if few:
        lines.append(
            f"Figure 9a: fewer than {settings.enough} prompts are refused of {', '.join(few)}; "
            "their directions come from all their prompts, accepted ones too, and decide nothing "
            "of claim 6."
        )
    if (refused := sum(records.refused)) < FEWEST:
        lines.append(f"Figure 9a: claim 6 needs {FEWEST} refused categories; found {refused}.")
    return lines


def _compare(
    records: Records, settings: Settings
) -> tuple[list[Table | Figure], dict[str, Estimate]]:
    """Cosines between categories at both positions, beside chance, and their difference."""
    clouds, seed = records.clouds.items(), settings.seed
    draws = {at: resampled_cosines(cloud, seed=seed) for at, cloud in clouds}
    chance = {at: shuffled_cosines(cloud, seed=seed) for at, cloud in clouds}
    halves = {at: halved_cosines(cloud, seed=seed) for at, cloud in clouds}
    depth = draws["t_inst"].shape[1] - 1
    band = middle_layers(depth, settings.middle, of=settings.middle_of)
    n = len(records.clouds["t_inst"].category)
    effects = _gaps(records, band, seed)
    means = {CONCEPTS[at]: _means(cosines, records, band) for at, cosines in draws.items()}
    parts: list[Table | Figure] = [
        _dots(records, means),
        _by_layer(draws, chance, n),
        _matrix(records, draws["t_inst"][0, band].mean(0)),
        _table(records, means),
        _chances(draws, chance, halves, band, n),
    ]
    return parts, effects


def _gaps(records: Records, band: slice, seed: int) -> dict[str, Estimate]:
    """By how much refusal directions are more alike, among categories that are refused.

    Chance, too, deals the prompts of these alone: those of others would make it less alike.
    """
    refused = np.flatnonzero(records.refused).tolist()
    if len(refused) < FEWEST:
        return {}
    few = {at: cloud.among(refused) for at, cloud in records.clouds.items()}
    gap = _gap({at: resampled_cosines(cloud, seed=seed) for at, cloud in few.items()}, band)
    none = _gap({at: shuffled_cosines(cloud, seed=seed) for at, cloud in few.items()}, band)
    n = (len(few["t_inst"].category), 0)
    return {
        "cosine, refusal minus harmfulness": centered_interval(gap, n),
        "cosine, refusal minus harmfulness, beyond chance": centered_interval(gap - none.mean(), n),
    }


def _gap(draws: Draws, band: slice) -> Array:
    """Mean cosine to the others, refusal less harmfulness, over categories and layers, [r]."""
    harmful, refuse = (to_others(draws[at][:, band]).mean((1, 2)) for at in CONCEPTS)
    gap: Array = refuse - harmful
    return gap


def _means(draws: Array, records: Records, band: slice) -> list[Estimate]:
    """Mean cosine of each category to the others, over the middle layers."""
    middle = to_others(draws)[:, band].mean(1)
    sizes = records.clouds["t_inst"].sizes.tolist()
    return [centered_interval(of, (n, 0)) for of, n in zip(middle.T, sizes, strict=True)]


def _dots(records: Records, means: Mapping[str, Sequence[Estimate]]) -> Figure:
    caption = (
        "Mean cosine of a category's direction to those of the others, over the middle layers. "
        f"Bars: 95 %, bootstrap over prompts. {PAPER}"
    )
    title = "Category directions: cosine to the others"
    return dot_plot(records.names, means, title=title, x="mean cosine", caption=caption)


def _by_layer(draws: Draws, chance: Draws, n: int) -> Figure:
    curves: dict[str, Curve] = {}
    for at, concept in CONCEPTS.items():
        rows = to_others(draws[at]).mean(2)[:, 1:]
        curves[concept] = to_curve([centered_interval(of, (n, 0)) for of in rows.T])
        none = to_others(chance[at]).mean(2)[:, 1:]
        low, high = np.quantile(none, [0.025, 0.975], axis=0).tolist()
        curves[f"random categories, {concept}"] = (none.mean(0).tolist(), low, high)
    caption = (
        f"Mean over all pairs of categories, {n} prompts. Grey: the same prompts dealt at random "
        "to categories of the same sizes; how far a curve lies below its grey one is due to what "
        "the categories are about. Bands: 95 %."
    )
    layers = range(1, draws["t_inst"].shape[1])
    title = "Category directions by layer"
    return lines_by_layer(curves, layers, title=title, y="mean cosine", caption=caption)


def _matrix(records: Records, values: Array) -> Figure:
    caption = "Cosines between harmfulness directions of categories, mean over the middle layers."
    title = "Harmfulness directions of categories"
    names = records.names
    return heat_map(values.tolist(), names, names, title=title, caption=caption, middle=None)


def _table(records: Records, means: Mapping[str, Sequence[Estimate]]) -> Table:
    estimates = zip(means["harmfulness"], means["refusal"], strict=True)
    rows = tuple(
        (name, *cells(harm)[:3], *cells(refuse), "refused" if some else "all")
        for name, some, (harm, refuse) in zip(
            records.names, records.refused, estimates, strict=True
        )
    )
    note = (
        "Mean cosine to the other categories, over the middle layers. Both directions come from "
        "the same n prompts: the refused ones, or all where those are too few. Intervals: "
        f"bootstrap over prompts, moved back by the noise that drawing again adds. {PAPER}"
    )
    ends = ("low", "high")
    columns = ("category", "harmfulness", *ends, "refusal", "refusal low", "refusal high")
    return Table("Cosines of category directions", (*columns, "n", "prompts"), rows, note)


def _chances(draws: Draws, chance: Draws, halves: Draws, band: slice, n: int) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for at, concept in CONCEPTS.items():
        half = halves[at][:, band].mean(1)
        interval = centered_interval(to_others(draws[at])[:, band].mean((1, 2)), (n, 0))
        none = to_others(chance[at])[:, band].mean((1, 2))
        rows += [
            (concept, "categories", *cells(interval)[:3]),
            (concept, "random categories of the same sizes", *_spread(none)),
            (concept, "halves of one category", *_spread(np.einsum("rcc->rc", half).mean(1))),
            (concept, "halves of different categories", *_spread(to_others(half).mean(1))),
        ]
    note = (
        f"Mean cosine over the middle layers, {n} prompts. Fewer prompts make any two directions "
        "less alike, so compare categories with random categories, and halves with halves. Low and "
        "high: 95 % of bootstrap draws for categories, of random splits elsewhere."
    )
    columns = ("direction", "between", "cosine", "low", "high")
    return Table("Cosines of category directions and chance", columns, tuple(rows), note)


def _spread(values: Array) -> tuple[Cell, ...]:
    low, high = np.quantile(values, [0.025, 0.975])
    return (float(values.mean()), float(low), float(high))


def _section(parts: list[Table | Figure]) -> Section:
    text = (
        "Each risk category has a harmfulness direction at t_inst and a refusal direction at "
        "t_post, both from the same prompts against the same accepted harmless prompts. The paper "
        "finds that harmfulness differs by category and refusal does not."
    )
    return Section("Figures 9 and 17: risk categories", text, tuple(parts))
