"""Contributions: what each token and each layer adds to a probe's score.

A probe is linear in the states of its slots (a position at a layer), and a position is one token or
the mean of several, so its score is a sum over tokens and layers. States share large components
that say nothing of a prompt; each slot is therefore compared with its value on reference prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.probes.probe import Probe


@dataclass(frozen=True, eq=False)
class Contributions:
    """A score as a sum: ``score = baseline + by_token.sum() = baseline + by_layer.sum()``."""

    baseline: float
    """The mean score of the reference prompts."""

    by_token: Float[Tensor, "t"]
    """What each token adds, float64."""

    by_layer: Float[Tensor, "l"]
    """What each layer of the probe adds, float64."""

    @property
    def score(self) -> float:
        """The score that they add up to."""
        return self.baseline + float(self.by_token.sum())


def slot_terms(probe: Probe, slots: Float[Tensor, "n s d"]) -> Float[Tensor, "n s"]:
    """What each slot adds to the probe's score, without its bias, in float64."""
    values = slots.double()
    terms = (values * probe.weight.double()).sum(-1)
    return terms / values.norm(dim=-1) if probe.kind == "centroid" else terms


def explain_score(
    probe: Probe,
    states: Float[Tensor, "t l d"],
    shares: Float[Tensor, "p t"],
    reference: Float[Tensor, "s"],
) -> Contributions:
    """What each token and layer adds to the score of one text.

    Args:
        probe: Reads p positions in turn, each at the probe's layers.
        states: Of each token, at the probe's layers.
        shares: What each token weighs in the mean that a position is; each row sums to 1.
        reference: The mean of ``slot_terms`` on the reference prompts.
    """
    weight = probe.weight.double().reshape(len(shares), *states.shape[1:])
    usual = reference.double().reshape(len(shares), -1)
    values = states.double()
    terms = torch.zeros(states.shape[:2], dtype=torch.float64)
    for share, own_weight, own_usual in zip(shares.double(), weight, usual, strict=True):
        mean = torch.einsum("t,tld->ld", share, values)
        scale = 1 / mean.norm(dim=-1) if probe.kind == "centroid" else 1.0
        terms += share[:, None] * ((values * own_weight).sum(-1) * scale - own_usual)
    baseline = probe.bias + float(usual.sum())
    return Contributions(baseline, terms.sum(1), terms.sum(0))
