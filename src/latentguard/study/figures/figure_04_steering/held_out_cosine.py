"""Held-out prompts along the refusal direction (section 3.4: 0.57 refused, -0.14 accepted).

The paper sets these beside the cosine of the two directions, to say that 0.1 is low. It does not
say about which point the states are taken: both ways are given here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity

from latentguard.prompts import Group
from latentguard.report.document import Cell, Table
from latentguard.stats.bootstrap import mean_curve
from latentguard.study.axes import Axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import cells
from latentguard.study.prompt_groups import PromptGroups

GROUPS: Mapping[str, tuple[Group, Group]] = {
    "refused": ("refused_harmful", "refused_harmless"),
    "accepted": ("accepted_harmful", "accepted_harmless"),
}
PAPER = {"refused": 0.57, "accepted": -0.14}


@dataclass(frozen=True, eq=False)
class HeldOutCosine:
    """Cosines of the states of one kind of held-out prompts at t_post."""

    behaviour: str
    """``refused`` or ``accepted``."""

    as_they_are: NDArray[np.float64]
    """Of the states, layers 1 to L, [n l]."""

    centred: NDArray[np.float64]
    """Of the states less the midpoint of both centroids, [n l]."""


def held_out_cosines(
    model: CachedModel, prompt_groups: PromptGroups, axes: Axes
) -> tuple[HeldOutCosine, ...]:
    """Of refused and of accepted test prompts, where there are any; nothing without a direction."""
    axis, cosines = axes.refuse, []
    if axis is None:
        return ()
    middle = (axis.positive + axis.negative) / 2
    for behaviour, groups in GROUPS.items():
        prompts = [p for group in groups for p in prompt_groups.test_prompts(group)]
        if not prompts:
            continue
        states = model.states(prompts, what=f"states: held-out, {behaviour}").at("t_post").float()
        whole, centred = (
            cosine_similarity(x, axis.direction, dim=-1)[:, 1:].double().numpy()
            for x in (states, states - middle)
        )
        cosines.append(HeldOutCosine(behaviour, whole, centred))
    return tuple(cosines)


def held_out_table(cosines: tuple[HeldOutCosine, ...]) -> Table:
    """Mean over layers 1 to L, beside the paper's figure."""
    rows: list[tuple[Cell, ...]] = []
    for one in cosines:
        for name, values in (("as they are", one.as_they_are), ("centred", one.centred)):
            (mean,) = mean_curve(values.mean(1)[:, None])
            rows.append((one.behaviour, name, *cells(mean), PAPER[one.behaviour]))
    note = (
        "Cosine of the state at t_post with the refusal direction of the same layer: the mean "
        "over layers 1 to L and over held-out prompts of both labels. Centred: less the midpoint "
        "of both centroids. The paper (no model named, nor how states are centred): 0.57 and "
        "-0.14. Intervals: 95 %, bootstrap over prompts."
    )
    columns = ("held-out prompts", "states", "cosine", "low", "high", "n", "paper")
    return Table("Held-out prompts along the refusal direction", columns, tuple(rows), note)
