"""Detectors: scores of prompts whose sign is a decision, and the controls of each.

Axis names in shapes: k draws (1 but for random directions), n prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from latentguard.data.surface_audit import ngram_scores
from latentguard.probes.axis import Axis
from latentguard.probes.probe import Probe, centroid
from latentguard.states import States
from latentguard.study.form_controls import form_scores
from latentguard.study.steering import random_like

Scores = NDArray[np.float64]
"""[k n]; a prompt is flagged if its score is greater than 0."""

Detector = Callable[[States], Scores]
"""States captured at the rule's positions, all layers -> scores of their prompts."""

RANDOM, LENGTH, NGRAMS, FORM = "random direction", "length", "n-grams", "form"
"""Names of the controls."""


def belief_detector(axis: Axis) -> Detector:
    """The paper's rule: Delta over the layers 1 to L (equations 3 and 4), threshold 0."""
    probe = _probe(axis)
    return lambda states: _read(probe, states, axis.position)[None]


def control_detectors(axis: Axis, fit: States, draws: int) -> dict[str, Detector]:
    """What an axis must beat: random directions of equal norm, length, n-grams, all of form.

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
        FORM: lambda states: form_scores(fit.prompts, states.prompts)[None],
    }


def oriented(rule: Detector, fit: States) -> Detector:
    """A rule turned so that harmful prompts score more, with 0 midway between the classes."""
    harmful = np.array([bool(p.harmful) for p in fit.prompts])
    scores = rule(fit)
    up, down = (scores[:, side].mean(1, keepdims=True) for side in (harmful, ~harmful))
    sign = np.where(up >= down, 1.0, -1.0)
    return lambda states: sign * (rule(states) - (up + down) / 2)


def _probe(axis: Axis) -> Probe:
    """The compiled axis without the embedding layer, which knows the last token alone."""
    keep = [slot for slot, layer in enumerate(axis.layers) if layer > 0]
    layers = tuple(axis.layers[slot] for slot in keep)
    poles = axis.positive[keep], axis.negative[keep]
    return centroid(replace(axis, layers=layers, positive=poles[0], negative=poles[1]))


def _read(probe: Probe, states: States, position: str) -> NDArray[np.float64]:
    scores: NDArray[np.float64] = probe(states.select(probe.layers).at(position)).double().numpy()
    return scores
