"""Rules: what turns prompts into scores whose sign is a decision, and the controls of each.

Axis names in shapes: k draws (1 but for random directions), n prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from latentguard.data.surface_audit import ngram_scores
from latentguard.errors import GuardError
from latentguard.probes.axis import Axis
from latentguard.probes.probe import Probe, centroid
from latentguard.states import States
from latentguard.stats.metrics import Estimate
from latentguard.study.directions import random_like

Scores = NDArray[np.float64]
"""[k n]; a prompt is flagged if its score is greater than 0."""

Rule = Callable[[States], Scores]
"""States captured at the rule's positions, all layers -> scores of their prompts."""

RANDOM, LENGTH, NGRAMS = "random direction", "length", "n-grams"
"""Names of the controls."""


def belief_rule(axis: Axis) -> Rule:
    """The paper's rule: Delta over the layers 1 to L (equations 3 and 4), threshold 0."""
    probe = _probe(axis)
    return lambda states: _read(probe, states, axis.position)[None]


def control_rules(axis: Axis, fit: States, draws: int) -> dict[str, Rule]:
    """What an axis must beat: random directions of equal norm, length, and n-grams.

    Sign and threshold of each come from the prompts that the axis was fitted on.

    Args:
        axis: What is controlled for.
        fit: Labelled states with its position.
        draws: How many random directions.
    """
    real = _probe(axis)
    random = [
        replace(real, weight=torch.stack([random_like(row, draw) for row in real.weight]))
        for draw in range(draws)
    ]

    def by_chance(states: States) -> Scores:
        return np.stack([_read(one, states, axis.position) for one in random])

    def by_length(states: States) -> Scores:
        return np.array([[len(p.text) for p in states.prompts]], dtype=np.float64)

    return {
        RANDOM: oriented(by_chance, fit),
        LENGTH: oriented(by_length, fit),
        NGRAMS: lambda states: ngram_scores(fit.prompts, states.prompts)[None],
    }


def oriented(rule: Rule, fit: States) -> Rule:
    """A rule turned so that harmful prompts score more, with 0 midway between the classes."""
    harmful = np.array([bool(p.harmful) for p in fit.prompts])
    found = rule(fit)
    up, down = (found[:, side].mean(1, keepdims=True) for side in (harmful, ~harmful))
    sign = np.where(up >= down, 1.0, -1.0)
    return lambda states: sign * (rule(states) - (up + down) / 2)


def separation(positive: Scores, negative: Scores) -> Estimate:
    """AUROC between two groups, [k n] and [k m]: the mean over the draws, bootstrap interval.

    Raises:
        GuardError: if a group is empty.
    """
    areas = resampled_areas(positive, negative)
    return interval(areas, (positive.shape[1], negative.shape[1]))


def resampled_areas(positive: Scores, negative: Scores, *, seed: int = 0) -> NDArray[np.float64]:
    """AUROC between two groups, [k n] and [k m], then 1,000 of their resamples, [1001].

    The area is the share of pairs that are in the right order, ties counted half; so a resample
    weighs the same table of pairs by how often each row was drawn.

    Raises:
        GuardError: if a group is empty.
    """
    n, m = positive.shape[1], negative.shape[1]
    if not n or not m:
        raise GuardError(f"An area needs prompts of both groups; found {n} and {m}.")
    over = np.sign(positive[:, :, None] - negative[:, None]).mean(0) / 2 + 0.5  # [n m]
    rng = np.random.default_rng(seed)
    ups, downs = (rng.multinomial(size, np.full(size, 1 / size), size=1000) for size in (n, m))
    draws = ((ups @ over) * downs).sum(1) / (n * m)
    return np.concatenate([[over.mean()], draws])


def interval(values: NDArray[np.float64], n: tuple[int, int]) -> Estimate:
    """A figure [0] and its resamples [1:] as an estimate with its 95 % interval."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high), n)


def _probe(axis: Axis) -> Probe:
    """The compiled axis without the embedding layer, which knows the last token alone."""
    keep = [slot for slot, layer in enumerate(axis.layers) if layer > 0]
    layers = tuple(axis.layers[slot] for slot in keep)
    poles = axis.positive[keep], axis.negative[keep]
    return centroid(replace(axis, layers=layers, positive=poles[0], negative=poles[1]))


def _read(probe: Probe, states: States, position: str) -> NDArray[np.float64]:
    found: NDArray[np.float64] = probe(states.select(probe.layers).at(position)).double().numpy()
    return found
