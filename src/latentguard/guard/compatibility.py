"""Compatibility: whether a model is the one that a guard was fitted on, and how far scores moved.

A guard is bound to a fingerprint. Canary prompts, whose scores are stored with it, notice what no
digest shows: a few changed weights, other software, a date in the chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentguard.data.builtin import load_contrast
from latentguard.errors import ModelMismatch
from latentguard.prompts import Prompt
from latentguard.states import Backend, Fingerprint

CANARY_COUNT = 8

TOLERANCE = 0.1
"""How far a canary's score may move, in standard deviations of the training scores."""

ROUNDING = 0.02
"""How far it may move if it changes side of the threshold: as on other hardware."""


@dataclass(frozen=True)
class Canary:
    """A prompt with the score that it had when the guard was fitted."""

    text: str
    """The prompt."""

    score: float
    """Its score."""


def canary_prompts() -> list[Prompt]:
    """Half harmful, half harmless, spread over the built-in validation split."""
    prompts = load_contrast("validation")
    half = CANARY_COUNT // 2
    sides = [[p for p in prompts if p.harmful is harmful] for harmful in (True, False)]
    return [p for side in sides for p in side[:: len(side) // half][:half]]


def explain_mismatch(expected: Fingerprint, actual: Fingerprint) -> str | None:
    """What differs, in one sentence, and what to do; None if nothing does."""
    if not (different := expected.differences(actual)):
        return None
    return (
        f"This guard was fitted on '{expected.model}' and met '{actual.model}': "
        f"{'; '.join(different)}. Use that model, fit a guard for this one, or go on with "
        "--allow-mismatch (allow_mismatch=True), which measures how far the scores move."
    )


def require_readable(backend: Backend, *, width: int, layer: int, post: int) -> None:
    """Check that a model has the states that a guard reads.

    Args:
        backend: The model.
        width: Of the guard's weights.
        layer: The last layer that it reads.
        post: The last token after the instruction that it reads.

    Raises:
        ModelMismatch: if the model has not such layers, width or positions.
    """
    states = next(iter(backend.capture([Prompt("a")], positions=("t_inst",), layers=(0,))))
    model_width = states.values.shape[-1]
    if model_width != width or backend.depth < layer or backend.post < post:
        raise ModelMismatch(
            f"'{backend.fingerprint.model}' has width {model_width}, {backend.depth} layers and "
            f"{backend.post} tokens after the instruction; this guard reads width {width}, layer "
            f"{layer} and token {post} after it. Fit a guard for this model."
        )


@dataclass(frozen=True)
class Shift:
    """How far the canaries' scores moved, in standard deviations of the training scores."""

    mean: float
    """Positive if scores rose."""

    largest: float
    """Of the canary that moved most, up or down."""

    changed: int
    """Canaries that changed side of the threshold."""

    n: int
    """Canaries."""

    largest_change: float = 0.0
    """Of the canaries that changed side of the threshold; 0 if none did."""

    differences: tuple[str, ...] = ()
    """What differs between the models; none if the scores alone show it."""

    @staticmethod
    def of(
        before: Sequence[float],
        after: Sequence[float],
        *,
        spread: float,
        threshold: float,
        differences: Sequence[str] = (),
    ) -> Shift:
        """From the canaries' scores on the guard's own model and on another.

        Args:
            before: Scores on the guard's own model, [n].
            after: Scores on the other, [n].
            spread: Standard deviation of the guard's training scores.
            threshold: The guard's.
            differences: What differs between the models.
        """
        was = np.array(before)
        now = np.array(after)
        shifts = (now - was) / spread if len(was) else np.zeros(1)
        changed = (was > threshold) != (now > threshold)
        return Shift(
            mean=float(shifts.mean()),
            largest=float(np.abs(shifts).max()),
            changed=int(changed.sum()),
            n=len(was),
            largest_change=float(np.abs(shifts[changed]).max()) if changed.any() else 0.0,
            differences=tuple(differences),
        )

    @property
    def is_notable(self) -> bool:
        """Whether it is more than rounding: a guard does not go on over it unasked."""
        return self.largest > TOLERANCE or self.largest_change > ROUNDING

    @property
    def complaint(self) -> str:
        """Why a guard does not go on with what looks like its own model."""
        return (
            "The model looks like the guard's own but scores the canary prompts differently: by up "
            f"to {self.largest:.2f} standard deviations, allowed {TOLERANCE}; {self.changed} "
            f"changed side of the threshold, allowed {ROUNDING}. A few of its weights or the "
            "software under it changed, or the date, if its chat template prints it "
            "(strftime_now); fit again, or go on with --allow-mismatch (allow_mismatch=True) and "
            "calibrate again."
        )

    def __str__(self) -> str:
        what = "; ".join(self.differences) or "nothing that is hashed differs"
        return (
            f"Not the guard's own model ({what}): scores of {self.n} canary prompts moved by "
            f"{self.mean:+.2f} standard deviations in the mean and {self.largest:.2f} at most; "
            f"{self.changed} changed side of the threshold. Nothing is promised of it here until "
            "it is calibrated on this model."
        )
