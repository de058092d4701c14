"""The two axes of a study: harmfulness at t_inst and refusal at t_post (section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentguard.probes.axis import Axis
from latentguard.study.cached_model import CachedModel
from latentguard.study.prompt_groups import BEHAVING, PromptGroups

Which = Literal["harmful", "refuse"]
"""Names of the two axes."""

HARMFULNESS = "harmfulness direction"
REFUSAL = "refusal direction"
"""Names of their directions, for people."""


@dataclass(frozen=True)
class Axes:
    """Harmfulness at t_inst and refusal at t_post."""

    harmful: Axis
    """From refused harmful to accepted harmless prompts; all labelled ones if few are refused."""

    refuse: Axis | None
    """From refused harmful to accepted harmless prompts; None if too few are refused."""

    note: str
    """What they were fitted on, with n."""


def refusals_suffice(prompt_groups: PromptGroups, enough: int) -> bool:
    """Whether there are prompts enough for the paper's centroids, which need refused ones."""
    return min(len(prompt_groups.fit_prompts(g)) for g in BEHAVING) >= enough


def fit_axes(model: CachedModel, prompt_groups: PromptGroups, *, enough: int = 10) -> Axes:
    """Fit both axes on the prompts that the prompt_groups sets apart for it.

    Refused harmful prompts as in appendix B; the harmless ones are the plain ones alone, where the
    paper adds accepted ones of XSTest.

    Raises:
        GuardError: if there is no harmful or no harmless prompt.
    """
    refused, accepted = (prompt_groups.fit_prompts(g) for g in BEHAVING)
    every = [p for group in prompt_groups.fit.values() for p in group]
    states = model.states(every, positions=("t_inst", "t_post"), what="centroids")
    if refusals_suffice(prompt_groups, enough):
        groups = dict(positive="refused_harmful", negative="accepted_harmless")
        harmful = Axis.fit(states, "t_inst", name="harmful", **groups)
        refuse = Axis.fit(states, "t_post", name="refuse", **groups)
        return Axes(harmful, refuse, _note("refused harmful", "accepted harmless", harmful))
    harmful = Axis.fit(states, "t_inst", name="harmful", positive="harmful", negative="harmless")
    counts = f"{len(refused)} refused harmful and {len(accepted)} accepted harmless prompts"
    few = f"too few for a refusal axis: {counts}"
    return Axes(harmful, None, f"{_note('harmful', 'harmless', harmful)}; {few}")


def belief(axis: Axis, states: Float[Tensor, "n l d"]) -> NDArray[np.float64]:
    """Delta: the mean of s^l over the layers 1 to L (equations 3 and 4), [n]."""
    beliefs: NDArray[np.float64] = axis.layer_beliefs(states)[:, 1:].mean(1).double().numpy()
    return beliefs


def _note(positive: str, negative: str, axis: Axis) -> str:
    return (
        f"Centroids: {axis.counts[0]} {positive} and {axis.counts[1]} {negative} prompts, "
        "none of which is tested"
    )
