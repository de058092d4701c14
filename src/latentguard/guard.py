"""LatentGuard: a reading, a readout and a threshold, bound to one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from latentguard import __version__, readings
from latentguard.axes import Axis
from latentguard.contrast import load_contrast
from latentguard.errors import GuardError, ModelMismatch
from latentguard.metrics import Bound, threshold_for_fpr
from latentguard.prompts import Prompt
from latentguard.readings import Reading
from latentguard.readouts import Fit, Kind, Readout, fit_centroid, fit_linear
from latentguard.states import Backend, Fingerprint, Progress, States, digest_prompts

CANARIES = 8
"""Prompts whose scores are stored with a guard and checked when it meets a model."""

CANARY_TOLERANCE = 0.1
"""How far a canary's score may move, in standard deviations of the training scores."""


@dataclass(frozen=True)
class Verdict:
    """What a guard says of one prompt."""

    id: str
    """Of the prompt."""

    score: float
    """Higher is more harmful; the unit is the readout's own."""

    probability: float
    """Platt-scaled score: probability of harmful where both classes are equally frequent."""

    flagged: bool
    """Whether the score is above the threshold."""

    beliefs: dict[str, float]
    """Delta of each axis (equations 3 and 4), over the guard's layers."""


@dataclass(frozen=True)
class Canary:
    """A prompt with the score that it had when the guard was fitted."""

    text: str
    """The prompt."""

    score: float
    """Its score."""


@dataclass(frozen=True, eq=False)
class LatentGuard:
    """A guard for one model; immutable."""

    reading: Reading
    """Where it reads."""

    readout: Readout
    """How states become a score."""

    axes: tuple[Axis, ...]
    """``harmful`` at t_inst; ``refuse`` at t_post where refusals were known."""

    fingerprint: Fingerprint
    """The model it is bound to."""

    platt: tuple[float, float]
    """Slope and intercept: probability = sigmoid(slope * score + intercept)."""

    spread: float
    """Standard deviation of the training scores."""

    canaries: tuple[Canary, ...] = ()
    """Checked when the guard meets a model."""

    threshold: float = 0.0
    """A prompt is flagged if its score is greater."""

    bound: Bound | None = None
    """What calibration promises of the threshold; None before."""

    fitted: dict[str, Any] | None = None
    """Provenance: counts, choices, digests of the data, versions."""

    @staticmethod
    def fit(
        backend: Backend,
        prompts: Iterable[Prompt],
        *,
        reading: str = readings.DEFAULT,
        readout: Kind = "linear",
        progress: Progress | None = None,
    ) -> LatentGuard:
        """Capture the states of labelled prompts and fit a guard.

        Args:
            backend: The model.
            prompts: Labelled harmful or harmless.
            reading: ``t_inst``, ``t_post``, ``post+k``, ``sealed`` or ``span``.
            readout: ``centroid`` (the paper) or ``linear``.
            progress: Called with the number of prompts captured.

        Raises:
            GuardError: if a prompt has no label, a class is missing, or a state is not finite.
        """
        where = Reading.of(reading, backend.post)
        states = capture(backend, where, prompts, progress=progress)
        return LatentGuard.from_states(backend, states, where, readout)

    @staticmethod
    def from_states(
        backend: Backend, states: States, reading: Reading, readout: Kind = "linear"
    ) -> LatentGuard:
        """Fit a guard on states that were captured already, all layers, at the right positions."""
        _require_labels(states)
        if readout not in ("centroid", "linear"):
            raise GuardError(f"There is no readout '{readout}': expected centroid or linear.")
        fit = (_fit_linear if readout == "linear" else _fit_centroid)(states, reading)
        labels = [bool(p.harmful) for p in states.prompts]
        guard = LatentGuard(
            reading=reading,
            readout=fit.readout,
            axes=_axes(states, fit.readout.layers),
            fingerprint=backend.fingerprint,
            platt=_platt(fit.held_out, labels),
            spread=float(fit.held_out.std()),
            fitted=_provenance(states, fit),
        )
        texts = _canary_prompts()
        scores = [v.score for v in guard.scan(backend, texts)]
        canaries = tuple(Canary(p.text, s) for p, s in zip(texts, scores, strict=True))
        return replace(guard, canaries=canaries)

    def calibrate(
        self,
        backend: Backend,
        harmless: Iterable[Prompt],
        *,
        max_fpr: float = 0.01,
        confidence: float = 0.95,
        progress: Progress | None = None,
    ) -> LatentGuard:
        """A new guard whose threshold keeps a false-positive rate, from harmless prompts.

        Raises:
            GuardError: if there are too few prompts for the rate; says how many are needed.
        """
        prompts = list(harmless)
        scores = [v.score for v in self.scan(backend, prompts, progress=progress)]
        bound = threshold_for_fpr(scores, max_fpr, confidence)
        record = {**(self.fitted or {}), "calibration_sha256": digest_prompts(prompts)}
        return replace(self, threshold=bound.threshold, bound=bound, fitted=record)

    def scan(
        self,
        backend: Backend,
        prompts: Iterable[Prompt | str],
        *,
        progress: Progress | None = None,
    ) -> Iterator[Verdict]:
        """Yield a verdict for each prompt, in order.

        Raises:
            ModelMismatch: if the model is not the one the guard was fitted on.
            GuardError: if a state is not finite (fail closed).
        """
        self.require_match(backend.fingerprint)
        ready = (self.reading.prepare(_prompt(p, n)) for n, p in enumerate(prompts, start=1))
        batches = backend.capture(
            ready, positions=self.positions, layers=self.readout.layers, progress=progress
        )
        for states in batches:
            yield from self.judge(states)

    @property
    def positions(self) -> tuple[str, ...]:
        """Every position that the readout or an axis reads."""
        return tuple(dict.fromkeys([*self.reading.positions, *(a.position for a in self.axes)]))

    def judge(self, states: States) -> Iterator[Verdict]:
        """Verdicts for states captured at ``positions`` and at least the readout's layers."""
        states = states.select(self.readout.layers)
        scores = self.readout(_flat(states, self.reading.positions)).double()
        if not torch.isfinite(scores).all():
            raise GuardError(
                "A score is not a finite number, so no verdict can be given; use bfloat16 or "
                "float32 instead of float16."
            )
        chances = expit(self.platt[0] * scores.numpy() + self.platt[1])
        beliefs = {axis.name: axis.belief(states.at(axis.position)) for axis in self.axes}
        for i, prompt in enumerate(states.prompts):
            score = float(scores[i])
            believed = {name: float(values[i]) for name, values in beliefs.items()}
            yield Verdict(
                prompt.id, score, float(chances[i]), score > self.threshold, believed
            )

    def require_match(self, found: Fingerprint) -> None:
        """Raise ``ModelMismatch``, saying what differs, unless the model is the guard's own."""
        different = self.fingerprint.differences(found)
        if different:
            raise ModelMismatch(
                f"This guard was fitted on '{self.fingerprint.model}' and met '{found.model}': "
                f"{'; '.join(different)}. Use that model, or fit a guard for this one."
            )

    def check(self, backend: Backend) -> None:
        """Raise ``ModelMismatch`` unless fingerprint and canary scores are as when fitted."""
        texts = [canary.text for canary in self.canaries]
        verdicts = self.scan(backend, texts)
        moved = [abs(v.score - c.score) for v, c in zip(verdicts, self.canaries, strict=True)]
        if max(moved, default=0.0) > CANARY_TOLERANCE * self.spread:
            raise ModelMismatch(
                f"The model looks like the guard's own but scores the canary prompts differently: "
                f"by up to {max(moved) / self.spread:.2f} standard deviations, allowed "
                f"{CANARY_TOLERANCE}. Its weights or the software under it changed; fit again."
            )


def capture(
    backend: Backend,
    reading: Reading,
    prompts: Iterable[Prompt],
    *,
    progress: Progress | None = None,
) -> States:
    """All layers, at the reading's positions and those of the two axes."""
    positions = tuple(dict.fromkeys([*reading.positions, "t_inst", "t_post"]))
    ready = map(reading.prepare, prompts)
    return States.collect(backend.capture(ready, positions=positions, progress=progress))


def _flat(states: States, positions: Sequence[str]) -> Float[Tensor, "n s d"]:
    """Slots: each position in turn, each layer in turn."""
    return torch.cat([states.at(position) for position in positions], dim=1)


def _prompt(item: Prompt | str, number: int) -> Prompt:
    return item if isinstance(item, Prompt) else Prompt(item, id=str(number))


def _require_labels(states: States) -> None:
    missing = [p.id for p in states.prompts if p.harmful is None]
    if missing:
        raise GuardError(
            f"{len(missing)} training prompts have no label (the first is '{missing[0]}'); "
            "expected harmful or harmless for each."
        )


def _fit_linear(states: States, reading: Reading) -> Fit:
    labels = [bool(p.harmful) for p in states.prompts]
    groups = [p.pair or p.id or p.text for p in states.prompts]
    slots = states.layers * len(reading.positions)
    return fit_linear(_flat(states, reading.positions), labels, groups, slots)


def _fit_centroid(states: States, reading: Reading) -> Fit:
    """The paper averages over all blocks; the embedding layer carries no context."""
    keep = [slot for slot, layer in enumerate(states.layers) if layer > 0]
    layers = tuple(states.layers[slot] for slot in keep)
    values = torch.cat([states.at(p)[:, keep] for p in reading.positions], dim=1)
    flat = replace(states, values=values[:, None], positions=("slots",), layers=layers * len(reading.positions))
    fit = fit_centroid(Axis.fit(flat, "slots"), values)
    return replace(fit, readout=replace(fit.readout, layers=layers))


def _axes(states: States, layers: tuple[int, ...]) -> tuple[Axis, ...]:
    """``harmful`` always, ``refuse`` where both refused harmful and accepted harmless are known."""
    part = states.select(layers)
    axes = [Axis.fit(part, "t_inst")]
    if {"refused_harmful", "accepted_harmless"} <= {p.group for p in states.prompts}:
        groups = {"positive": "refused_harmful", "negative": "accepted_harmless"}
        axes.append(Axis.fit(part, "t_post", name="refuse", **groups))
    return tuple(axes)


def _platt(scores: NDArray[np.float64], labels: Sequence[bool]) -> tuple[float, float]:
    scale = float(scores.std()) or 1.0
    model = LogisticRegression(C=1e3, class_weight="balanced")
    model.fit(scores[:, None] / scale, np.asarray(labels))
    return float(model.coef_[0, 0]) / scale, float(model.intercept_[0])


def _canary_prompts() -> list[Prompt]:
    """Half harmful, half harmless, from the built-in validation split."""
    prompts = load_contrast("validation")
    sides = [[p for p in prompts if p.harmful is side] for side in (True, False)]
    return [p for side in sides for p in side[:: len(side) // (CANARIES // 2)][: CANARIES // 2]]


def _provenance(states: States, fit: Fit) -> dict[str, Any]:
    harmful = sum(bool(p.harmful) for p in states.prompts)
    return {
        "harmful": harmful,
        "harmless": len(states) - harmful,
        "data_sha256": digest_prompts(states.prompts),
        "sources": sorted({p.source for p in states.prompts if p.source}),
        **fit.choices,
        "versions": {"latentguard": __version__, "torch": torch.__version__},
    }
