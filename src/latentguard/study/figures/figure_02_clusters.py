"""Figure 2: which cluster the four groups fall in, by layer, at t_inst and t_post (section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from latentguard.prompts import Group
from latentguard.report.charts import lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import bootstrap, bootstrap_mean, mean_curve
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion
from latentguard.study.axes import fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import Finding, cells
from latentguard.study.prompt_groups import MISBEHAVING, PromptGroups
from latentguard.study.settings import Settings

GROUPS: tuple[Group, ...] = (*MISBEHAVING, *(g for g in get_args(Group) if g not in MISBEHAVING))
CLAIMED: dict[str, set[Group]] = {
    "t_inst": {"accepted_harmful", "refused_harmful"},
    "t_post": {"refused_harmless", "refused_harmful"},
}
"""Which groups the paper finds on the side of the refused harmful prompts, s > 0."""

Curves = Mapping[Group, NDArray[np.float64]]
"""s^l of the prompts of each group at layers 0 to L, [n l]."""


@dataclass(frozen=True, eq=False)
class Records:
    """s^l (equation 2) of the tested prompts; a group without prompts is absent."""

    at: Mapping[str, Curves]
    """By position; t_post is absent if too few prompts are refused to fit its centroids."""

    note: str
    """What the centroids were fitted on."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Fit the centroids at each position, and compare the tested prompts with them."""
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    fitted = [axis for axis in (axes.harmful, axes.refuse) if axis is not None]
    at: dict[str, dict[Group, NDArray[np.float64]]] = {axis.position: {} for axis in fitted}
    for group in GROUPS:
        if prompts := prompt_groups.test_prompts(group):
            states = model.states(prompts, what=f"states: {shown(group)}")
            for axis in fitted:
                s = axis.layer_beliefs(states.at(axis.position))
                at[axis.position][group] = s.double().numpy()
    return Records(at, axes.note)


def analyse(records: Records, settings: Settings) -> Finding:
    """Curves by layer, means over the layers 1 to L, and the shares on the claimed side."""
    figures = [figure(groups, position, records.note) for position, groups in records.at.items()]
    rows, effects = [], {}
    for position, groups in records.at.items():
        for group, s in groups.items():
            rows.append(_row(position, group, s, _sides(records)))
            if len(s) >= settings.enough and group in MISBEHAVING:
                effects[f"s at {position}, {shown(group)}"] = _mean(s)
        if all(len(groups.get(group, ())) for group in MISBEHAVING):
            gap = _gap(groups)
            rows.append((position, GAP, *cells(gap), *[None] * 7))
            if min(gap.n) >= settings.enough:
                effects[f"s at {position}, {GAP}"] = gap
    section = _section([_table(rows), *figures], _sides(records))
    return Finding(section, effects, _caveats(records, settings))


def figure(groups: Curves, position: str, note: str) -> Figure:
    """Mean s^l of each group at layers 1 to L, with 95 % bootstrap bands over the prompts."""
    curves = {
        f"{shown(g)} (n = {len(s)})": to_curve(mean_curve(s[:, 1:])) for g, s in groups.items()
    }
    layers = range(1, next(iter(groups.values())).shape[1]) if groups else range(0)
    caption = (
        "Above the dashed line a prompt is nearer to the harmful centroid, below it to the "
        "harmless one. Layer 0, where no block has mixed the tokens yet, is left out. Bands: 95 %, "
        f"bootstrap over prompts. {note}."
    )
    return lines_by_layer(
        curves,
        layers,
        title=f"Clusters at {position}",
        y="cluster score s",
        caption=caption,
        zero=True,
    )


def shown(group: str) -> str:
    """A group as people read it."""
    return group.replace("_", " ")


GAP = "accepted harmful minus refused harmless"


def _mean(s: NDArray[np.float64]) -> Estimate:
    """Mean over prompts of the mean over layers 1 to L (equations 3 and 4)."""
    return bootstrap_mean(s[:, 1:].mean(1))


def _gap(groups: Curves) -> Estimate:
    """How far apart both misbehaving groups are; no threshold enters."""
    first, second = (groups[group][:, 1:].mean(1) for group in MISBEHAVING)
    return bootstrap_mean(first, minus=second)


def _sides(records: Records) -> tuple[str, str]:
    """Of which prompts the centroids are: without a refusal axis, of all that are labelled."""
    paired = "t_post" in records.at
    return ("refused harmful", "accepted harmless") if paired else ("harmful", "harmless")


def _row(
    position: str, group: Group, s: NDArray[np.float64], sides: tuple[str, str]
) -> tuple[Cell, ...]:
    sign = 1 if group in CLAIMED[position] else -1
    claimed = sign * s[:, 1:]
    prompts = cells(proportion(claimed.mean(1) > 0))[:3]
    layers = cells(bootstrap(lambda x: float((x.mean(0) > 0).mean()), claimed))[:3]
    side = sides[sign < 0]
    return (position, shown(group), *cells(_mean(s)), side, *prompts, *layers)


def _table(rows: list[tuple[Cell, ...]]) -> Table:
    note = (
        "s: mean over layers 1 to L. The claimed side is that of Figure 2; beside it, the share of "
        "prompts whose mean s, and of layers whose mean over the prompts, lies there. The paper "
        "sets the threshold to 0 and says that it may lie elsewhere: the difference of both "
        "misbehaving groups needs none. The claim is that it is above 0 at t_inst and below 0 at "
        "t_post."
    )
    ends = ("low", "high")
    shares = ("share of prompts", "prompts low", "prompts high")
    layers = ("share of layers", "layers low", "layers high")
    columns = ("position", "group", "s", *ends, "n", "claimed side", *shares, *layers)
    return Table("Clusters by position", columns, tuple(rows), note)


def _caveats(records: Records, settings: Settings) -> tuple[str, ...]:
    lines = []
    for group in MISBEHAVING:
        count = max((len(groups.get(group, ())) for groups in records.at.values()), default=0)
        if count < settings.enough:
            lines.append(f"Figure 2: {count} {shown(group)} prompts are too few to place them.")
    if "t_post" not in records.at:
        lines.append(
            "Figure 2: there are no clusters at t_post, and those at t_inst are not the paper's. "
            f"{records.note}."
        )
    return tuple(lines)


def _section(parts: list[Table | Figure], sides: tuple[str, str]) -> Section:
    text = (
        f"s compares a state with the centroids of {sides[0]} and {sides[1]} prompts, "
        "fitted anew at each position. If t_inst encodes harmfulness, accepted harmful prompts lie "
        "above 0 there and refused harmless ones below; if t_post encodes refusal, it is the other "
        "way round there."
    )
    return Section("Figure 2: clusters at t_inst and t_post", text, tuple(parts))
