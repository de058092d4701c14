"""Fitting: labelled states -> probe, axes and probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentguard import __version__
from latentguard.errors import GuardError
from latentguard.probes.axis import Axis, Centroid, fold
from latentguard.probes.capture_cache import CaptureCache
from latentguard.probes.probe import (
    Fit,
    Kind,
    Probe,
    fit_centroid,
    fit_linear,
    layers_of,
    require_kind,
)
from latentguard.probes.queries import AttendedFit
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, Reading, States, digest_prompts
from latentguard.stats.detection import auroc


def capture(
    backend: Backend,
    reading: Reading,
    prompts: Iterable[Prompt],
    *,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
    cache: CaptureCache | None = None,
) -> States:
    """Capture states at the reading's positions and those of the two axes.

    Args:
        backend: The model.
        reading: Where; it also prepares the prompts.
        prompts: What to read.
        layers: At which layers; all if None.
        progress: Called with the number of prompts just done.
        cache: Keeps what is captured, so that a killed run goes on from it; None keeps nothing.
    """
    positions = tuple(dict.fromkeys([*reading.positions, "t_inst", "t_post"]))
    at_layers = tuple(range(backend.depth + 1)) if layers is None else tuple(layers)
    prepared = [reading.prepare(prompt) for prompt in prompts]
    read = backend.capture if cache is None else partial(cache.capture, backend)
    batches = read(
        prepared,
        positions=positions,
        layers=at_layers,
        queries=reading.queries,
        progress=progress,
    )
    return States.collect(batches)


def fit_probe(
    states: States,
    reading: Reading,
    kind: Kind,
    depth: int,
    *,
    attended: AttendedFit | None = None,
) -> Fit:
    """Fit a probe on labelled states at the reading's positions.

    Args:
        states: At the layers that such a probe reads (``layers_of``), and others if you like.
        reading: Which positions.
        kind: Which probe.
        depth: Of the model, in blocks.
        attended: What the reading ``attended`` adds; None for other readings.

    Raises:
        GuardError: if a prompt has no label, a class is missing, the kind is unknown or not for
            this reading, or a state is not finite.
    """
    require_kind_for(reading, kind)
    if reading.name == "attended" and (reading.queries is None or attended is None):
        raise GuardError(
            "The reading 'attended' needs queries and their probe: fit them with LatentGuard.fit, "
            "which reads each token of the training prompts."
        )
    require_labels(states.prompts)
    _require_finite(states, reading)
    part = states.select(layers_of(kind, depth))
    if attended is not None:
        return _fit_attended(part, reading, attended)
    if kind == "linear":
        return _fit_linear(part, reading.positions)
    return _fit_centroid(part, reading)


def require_kind_for(reading: Reading, kind: Kind) -> None:
    """Raise a GuardError unless there is such a probe for a reading."""
    require_kind(kind)
    if reading.name == "attended" and kind != "linear":
        raise GuardError(
            f"The reading 'attended' has a linear probe; found '{kind}'. Use 'pooled' for others."
        )


def slots(states: States, positions: Sequence[str]) -> Float[Tensor, "n s d"]:
    """Each position in turn, each layer in turn."""
    return torch.cat([states.at(position) for position in positions], dim=1)


AXES = (
    ("harmful", "t_inst", "harmful", "harmless"),
    ("refuse", "t_post", "refused_harmful", "accepted_harmless"),
)
"""Name, position, positive and negative group of the two axes of the paper."""

Poles = list[tuple[Centroid, Centroid]]
"""The centroids of both groups, for each of ``AXES``."""


def fit_axes(states: States, layers: tuple[int, ...]) -> tuple[Axis, ...]:
    """``harmful`` always, ``refuse`` where both refused harmful and accepted harmless are known."""
    return axes_of(fold_axes(states.select(layers)), layers)


def fold_axes(states: States) -> Poles:
    """What some states add to the two axes; parts of a whole are joined by ``merge_poles``."""
    return [(fold(states, at, plus), fold(states, at, minus)) for _, at, plus, minus in AXES]


def merge_poles(one: Poles, other: Poles) -> Poles:
    """The poles of both sets of states, up to rounding in any order."""
    pairs = zip(one, other, strict=True)
    return [(a.merge(c), b.merge(d)) for (a, b), (c, d) in pairs]


def axes_of(poles: Poles, layers: tuple[int, ...]) -> tuple[Axis, ...]:
    """The axes between poles, as ``fit_axes`` makes them.

    Raises:
        GuardError: if there are no harmful or no harmless prompts.
    """
    return tuple(
        Axis.between(name, at, layers, (up, plus), (down, minus))
        for (name, at, plus, minus), (up, down) in zip(AXES, poles, strict=True)
        if name == "harmful" or (up.count and down.count)
    )


def provenance(states: States, fit: Fit) -> dict[str, Any]:
    """What a guard was made of: counts, digests, choices, versions."""
    harmful = sum(bool(p.harmful) for p in states.prompts)
    return {
        "harmful": harmful,
        "harmless": len(states) - harmful,
        "data_sha256": digest_prompts(states.prompts),
        "sources": sorted({p.source for p in states.prompts if p.source}),
        **fit.choices,
        "versions": {"latentguard": __version__, "torch": torch.__version__},
    }


def require_labels(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts, each of them labelled.

    Raises:
        GuardError: if one is not; names it.
    """
    rows = list(prompts)
    missing = [p.id for p in rows if p.harmful is None]
    if missing:
        raise GuardError(
            f"{len(missing)} training prompts have no label (the first is '{missing[0]}'); "
            "expected harmful or harmless for each."
        )
    return rows


def _require_finite(states: States, reading: Reading) -> None:
    for position in reading.positions:
        if not torch.isfinite(states.at(position)).all():
            raise GuardError(
                f"States at {position} hold infinite or undefined numbers; use bfloat16 or float32 "
                "instead of float16."
            )


def _fit_linear(states: States, positions: Sequence[str]) -> Fit:
    labels = [bool(p.harmful) for p in states.prompts]
    groups = [p.fold_group for p in states.prompts]
    return fit_linear(slots(states, positions), labels, groups, states.layers * len(positions))


def _fit_attended(states: States, reading: Reading, attended: AttendedFit) -> Fit:
    """The mean of two scores: the ridge's over the other positions, and the queries' own.

    The queries' score is brought to the spread of the ridge's. One ridge over all positions gains
    less (docs/results/lab-notes.md).
    """
    own_positions = attended.queries.positions
    ridge = _fit_linear(states, [p for p in reading.positions if p not in own_positions])
    weight = torch.zeros(len(own_positions), len(states.layers), states.values.shape[-1])
    weight[:, [states.layers.index(layer) for layer in attended.layers]] = attended.weight
    own = Probe("linear", states.layers, weight.flatten(0, 1), attended.bias)
    is_new = np.isnan(attended.held_out)
    scores = own(slots(states, own_positions)).double().numpy()
    scores = np.where(is_new, scores, attended.held_out)
    factor = float(ridge.held_out.std() / scores.std()) if scores.std() > 0 else 0.0
    probe = replace(
        ridge.probe,
        weight=torch.cat([ridge.probe.weight, own.weight * factor]) / 2,
        bias=(ridge.probe.bias + own.bias * factor) / 2,
    )
    held_out = (ridge.held_out + scores * factor) / 2
    labels = np.array([bool(p.harmful) for p in states.prompts])
    figure = round(auroc(labels, held_out), 4)
    return Fit(probe, held_out, {**ridge.choices, "cross_validated_auroc": figure})


def _fit_centroid(states: States, reading: Reading) -> Fit:
    """The paper's mean over layers, taken over positions, too."""
    values = slots(states, reading.positions)
    layers = states.layers * len(reading.positions)
    flat = replace(states, values=values[:, None], positions=("slots",), layers=layers)
    fit = fit_centroid(Axis.fit(flat, "slots"), values)
    return replace(fit, probe=replace(fit.probe, layers=states.layers))
