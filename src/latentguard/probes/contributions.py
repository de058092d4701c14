"""Contributions: what each token and each layer adds to a probe's score.

A probe is linear in the states of its slots (a position at a layer), and a position is one token or
the mean of several, so its score is a sum over tokens and layers. States share large components
that say nothing of a prompt; each slot is therefore compared with its value on reference prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    spans: Sequence[tuple[int, int]],
    reference: Float[Tensor, "s"],
) -> Contributions:
    """What each token and layer adds to the score of one text.

    Args:
        probe: Reads ``spans`` in turn, each at the probe's layers.
        states: Of each token, at the probe's layers.
        spans: The first and the last token of each position.
        reference: The mean of ``slot_terms`` on the reference prompts.
    """
    weight = probe.weight.double().reshape(len(spans), *states.shape[1:])
    usual = reference.double().reshape(len(spans), -1)
    terms = torch.zeros(states.shape[:2], dtype=torch.float64)
    for (first, last), own_weight, own_usual in zip(spans, weight, usual, strict=True):
        values = states[first : last + 1].double()
        scale = 1 / values.mean(0).norm(dim=-1) if probe.kind == "centroid" else 1.0
        raw = (values * own_weight).sum(-1) * scale
        terms[first : last + 1] += (raw - own_usual) / len(values)
    baseline = probe.bias + float(usual.sum())
    return Contributions(baseline, terms.sum(1), terms.sum(0))
