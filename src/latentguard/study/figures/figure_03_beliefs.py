"""Figure 3: the plane of both beliefs, and how they correlate in each group (section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentguard.probes.axis import Axis
from latentguard.prompts import Group, Prompt
from latentguard.report.charts import belief_plane
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.states import States
from latentguard.stats.bootstrap import bootstrap_mean, weighted_bootstrap
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion
from latentguard.study.axes import belief, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import Finding, cells
from latentguard.study.prompt_groups import BEHAVING, MISBEHAVING, PromptGroups
from latentguard.study.settings import Settings
from latentguard.study.steering import random_axis

GROUPS: tuple[Group, ...] = get_args(Group)
CONTROLS = 200
"""Chance planes of each kind; they cost no reply. So many, that none of them as correlated as the
true one puts the share surely below 0.05."""

TOGETHER: dict[str, tuple[Group, ...]] = {
    "all four groups": GROUPS,
    "refused harmful and accepted harmless": BEHAVING,
    "accepted harmful and refused harmless": MISBEHAVING,
    **{group.replace("_", " "): (group,) for group in GROUPS},
}
"""Where correlations are taken; the paper's claim is about the behaving groups."""

Plane = NDArray[np.float64]
"""Delta_harmful and Delta_refuse of n prompts, [n 2]; Delta_refuse is nan where it is unknown."""


@dataclass(frozen=True, eq=False)
class Records:
    """Both beliefs of the tested prompts (equations 3 and 4)."""

    prompts: tuple[Prompt, ...]
    """The n prompts, of all four groups."""

    beliefs: Plane
    """Of each."""

    chance: Mapping[str, tuple[Plane, ...]]
    """Planes of the behaving groups, in the same order, when the centroids mean nothing."""

    note: str
    """What the centroids were fitted on."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Read both beliefs of every tested prompt, and the same from meaningless centroids."""
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    prompts = tuple(p for group in GROUPS for p in prompt_groups.test_prompts(group))
    if not prompts:
        return Records((), np.empty((0, 2)), {}, axes.note)
    states = model.states(prompts, what="states: beliefs")
    harmful = belief(axes.harmful, states.at("t_inst"))
    if axes.refuse is None:
        return Records(prompts, np.stack([harmful, harmful * np.nan], 1), {}, axes.note)
    beliefs = np.stack([harmful, belief(axes.refuse, states.at("t_post"))], 1)
    fitted = model.states([p for group in prompt_groups.fit.values() for p in group])
    behaving = states.where(lambda p: p.group in BEHAVING)
    chance = {
        "random directions of equal norm": _planes(_random(axes.harmful, axes.refuse), behaving),
        "centroids of random halves": _planes(_halves(axes.harmful, axes.refuse, fitted), behaving),
    }
    return Records(prompts, beliefs, chance, axes.note)


def analyse(records: Records, settings: Settings) -> Finding:
    """The plane, the share of each group on each side of both lines, and the correlations."""
    groups = {g: records.beliefs[[p.group == g for p in records.prompts]] for g in GROUPS}
    groups = {group: plane for group, plane in groups.items() if len(plane)}
    has_beliefs = bool(np.isfinite(records.beliefs).all()) and bool(groups)
    rows = correlations(groups) if has_beliefs else {}
    tables = [_sides(groups), _correlated(rows, records.chance)] if groups else []
    figures = [_figure(records, groups)] if has_beliefs else []
    effects = _effects(groups, has_beliefs, settings)
    if all(len(groups.get(group, ())) >= settings.enough for group in BEHAVING):
        effects |= _correlation_effects(rows, records.chance)
    return Finding(_section([*figures, *tables]), effects, _caveats(records, groups, settings))


def correlations(groups: Mapping[Group, Plane]) -> dict[str, Estimate]:
    """Pearson's r of both beliefs in groups taken together, with 95 % bootstrap intervals.

    Fewer than 3 prompts, or equal ones, have none.
    """
    estimates = {}
    for name, members in TOGETHER.items():
        together = [groups[group] for group in members if group in groups]
        if len(together) == len(members) or name == "all four groups":
            rows = np.concatenate(together)
            if len(rows) > 2 and np.isfinite(correlation(rows)):
                estimates[name] = weighted_bootstrap(partial(correlations_of, rows), len(rows))
    return estimates


def correlation(rows: Plane) -> float:
    """Pearson's r of both columns; nan if one is constant."""
    x, y = (rows - rows.mean(0)).T
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 1e-12 else float("nan")


def correlations_of(rows: Plane, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's r of both columns for weights of the rows, [r n] to [r]; nan if one is constant."""
    x, y = (rows - rows.mean(0)).T
    total = weights.sum(1)
    mean_x, mean_y, xx, yy, xy = (weights @ one / total for one in (x, y, x * x, y * y, x * y))
    scale = np.sqrt(np.maximum((xx - mean_x**2) * (yy - mean_y**2), 0))
    r: NDArray[np.float64] = (xy - mean_x * mean_y) / np.where(scale > 1e-15, scale, np.nan)
    return r


def _correlation_effects(
    rows: Mapping[str, Estimate], chance: Mapping[str, tuple[Plane, ...]]
) -> dict[str, Estimate]:
    """The correlation in the behaving groups, and how often chance gives as much."""
    estimate = rows.get(_join_names(BEHAVING))
    if estimate is None:
        return {}
    effects = {"correlation of beliefs in the behaving groups": estimate}
    for kind, planes in chance.items():
        draws = np.array([correlation(one) for one in planes])
        finite_draws = draws[np.isfinite(draws)]
        if len(finite_draws):
            effects[f"chance planes as correlated: {kind}"] = proportion(
                finite_draws >= estimate.value - 1e-9
            )
    return effects


def _join_names(groups: Sequence[Group]) -> str:
    return " and ".join(group.replace("_", " ") for group in groups)


def _random(harmful: Axis, refuse: Axis) -> Iterator[tuple[Axis, Axis]]:
    """Both axes about their own middles, along random directions of their own."""
    for draw in range(CONTROLS):
        yield random_axis(harmful, 2 * draw), random_axis(refuse, 2 * draw + 1)


def _halves(harmful: Axis, refuse: Axis, fitted: States) -> Iterator[tuple[Axis, Axis]]:
    """Both axes from random halves of the prompts that they were fitted on."""
    for draw in range(CONTROLS):
        order = torch.randperm(len(fitted), generator=torch.Generator().manual_seed(draw))
        first, second = order.tensor_split(2)
        yield _split(harmful, fitted, first, second), _split(refuse, fitted, first, second)


def _split(axis: Axis, fitted: States, first: Tensor, second: Tensor) -> Axis:
    states = fitted.at(axis.position)
    poles = (states[rows].double().mean(0).float() for rows in (first, second))
    positive, negative = poles
    return replace(axis, positive=positive, negative=negative)


def _planes(axes: Iterator[tuple[Axis, Axis]], states: States) -> tuple[Plane, ...]:
    return tuple(
        np.stack([belief(one, states.at(one.position)) for one in pair], 1) for pair in axes
    )


def _effects(
    groups: Mapping[Group, Plane], has_beliefs: bool, settings: Settings
) -> dict[str, Estimate]:
    questions: list[tuple[Group, str, int]] = [
        ("refused_harmless", "Delta_harmful of refused harmless", 0),
        ("refused_harmless", "Delta_refuse of refused harmless", 1),
        ("accepted_harmful", "Delta_harmful of accepted harmful", 0),
    ]
    return {
        name: bootstrap_mean(groups[group][:, axis])
        for group, name, axis in questions
        if len(groups.get(group, ())) >= settings.enough and (has_beliefs or axis == 0)
    }


def _sides(groups: Mapping[Group, Plane]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for group, plane in groups.items():
        for name, values in zip(("harmful", "refuse"), plane.T, strict=True):
            if np.isfinite(values).all():
                mean, above = bootstrap_mean(values), proportion(values > 0)
                cell = (*cells(mean), *cells(above)[:3])
                rows.append((group.replace("_", " "), f"\u0394 {name}", *cell))
    share = ("share above 0", "share low", "share high")
    columns = ("group", "belief", "mean", "low", "high", "n", *share)
    note = "Means with 95 % bootstrap intervals, shares with 95 % Wilson intervals."
    return Table("Beliefs of the four groups", columns, tuple(rows), note)


def _correlated(rows: Mapping[str, Estimate], chance: Mapping[str, tuple[Plane, ...]]) -> Table:
    table_rows: list[tuple[Cell, ...]] = [(name, *cells(r)) for name, r in rows.items()]
    for kind, planes in chance.items():
        draws = [correlation(one) for one in planes]
        ends = np.nanquantile(draws, [0.025, 0.975]) if np.isfinite(draws).any() else (None, None)
        value = float(np.nanmean(draws)) if np.isfinite(draws).any() else None
        table_rows.append((f"chance: {kind}", value, *(e and float(e) for e in ends), len(planes)))
    note = (
        f"Pearson's r of both beliefs, 95 % bootstrap over prompts. The claim is about refused "
        "harmful and accepted harmless prompts together; in the other groups label and refusal "
        f"part. Chance: {CONTROLS} planes of those two groups; value is their mean, low and high "
        "hold 95 % of them, n counts planes. Random directions differ at both positions; random "
        "halves split the prompts of the centroids without regard to harm. A correlation within "
        "that range says nothing of harm or refusal."
    )
    return Table(
        "Correlation of both beliefs", ("prompts", "r", "low", "high", "n"), tuple(table_rows), note
    )


def _figure(records: Records, groups: Mapping[Group, Plane]) -> Figure:
    points = {}
    for group, plane in groups.items():
        names = [p.id or "unnamed" for p in records.prompts if p.group == group]
        label = f"{group.replace('_', ' ')} (n = {len(plane)})"
        points[label] = (plane[:, 0].tolist(), plane[:, 1].tolist(), names)
    caption = (
        "Each point is a prompt that no centroid saw. Right of the upright line it is believed "
        "harmful, above the level line it is believed to be refused; the paper expects refused "
        f"harmless prompts left of the line. {records.note}."
    )
    return belief_plane(points, title="Beliefs of harmfulness and refusal", caption=caption)


def _caveats(
    records: Records, groups: Mapping[Group, Plane], settings: Settings
) -> tuple[str, ...]:
    few = [
        f"Figure 3: {len(groups.get(group, ()))} {group.replace('_', ' ')} prompts are too few to "
        "say what the model believes of them."
        for group in GROUPS
        if len(groups.get(group, ())) < settings.enough
    ]
    if records.prompts and not np.isfinite(records.beliefs).all():
        few.append(f"Figure 3: there is no belief of refusal. {records.note}.")
    return tuple(few)


def _section(parts: list[Table | Figure]) -> Section:
    text = (
        "Delta harmful is read at t_inst, Delta refuse at t_post. If the model keeps harmfulness "
        "and refusal apart, a prompt may be refused while it is believed harmless, and the reverse."
    )
    return Section("Figure 3: beliefs of harmfulness and refusal", text, tuple(parts))
