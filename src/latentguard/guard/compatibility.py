"""Binding: what it means that a guard meets another model, in words and in canary scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latentguard.errors import ModelMismatch
from latentguard.guard.canaries import TOLERANCE
from latentguard.guard.spec import Contents
from latentguard.prompts import Prompt
from latentguard.states import Backend, Fingerprint


def explain(bound: Fingerprint, found: Fingerprint) -> str | None:
    """What differs, in one sentence, and what to do; None if nothing does."""
    if not (different := bound.differences(found)):
        return None
    return (
        f"This guard was fitted on '{bound.model}' and met '{found.model}': "
        f"{'; '.join(different)}. Use that model, fit a guard for this one, or go on with "
        "--allow-mismatch (allow_mismatch=True), which measures how far the scores move."
    )


def require_like(guard: Contents, backend: Backend) -> None:
    """Check that a guard can read the states of a model at all.

    Raises:
        ModelMismatch: if the model has not the layers, width or positions that the guard reads.
    """
    steps = [int(p.removeprefix("post+")) for p in guard.positions if p.startswith("post+")]
    states = next(iter(backend.capture([Prompt("a")], positions=("t_inst",), layers=(0,))))
    needs = (guard.probe.weight.shape[-1], max(guard.probe.layers), max(steps, default=0))
    width, depth, post = states.values.shape[-1], backend.depth, backend.post
    if width != needs[0] or depth < needs[1] or post < needs[2]:
        raise ModelMismatch(
            f"'{backend.fingerprint.model}' has width {width}, {depth} layers and {post} tokens "
            f"after the instruction; this guard reads width {needs[0]}, layer {needs[1]} and "
            f"token {needs[2]} after it. Fit a guard for this model."
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

    differences: tuple[str, ...] = ()
    """What differs between the models; none if the scores alone tell."""

    @staticmethod
    def between(then: Contents, now: Contents) -> Shift:
        """From a guard on its own model to the same guard, bound to another."""
        before, after = (np.array([c.score for c in guard.canaries]) for guard in (then, now))
        moved = (after - before) / then.spread if len(before) else np.zeros(1)
        return Shift(
            mean=float(moved.mean()),
            largest=float(np.abs(moved).max()),
            changed=int(((before > then.threshold) != (after > then.threshold)).sum()),
            n=len(before),
            differences=tuple(then.fingerprint.differences(now.fingerprint)),
        )

    @property
    def notable(self) -> bool:
        """Whether it is more than rounding: a guard does not go on over it unasked."""
        return self.largest > TOLERANCE

    @property
    def complaint(self) -> str:
        """Why a guard does not go on with what looks like its own model."""
        return (
            "The model looks like the guard's own but scores the canary prompts differently: by up "
            f"to {self.largest:.2f} standard deviations, allowed {TOLERANCE}. A few of its weights "
            "or the software under it changed, or the date, if its chat template prints it "
            "(strftime_now); fit again, or go on with "
            "--allow-mismatch (allow_mismatch=True) and calibrate again."
        )

    def __str__(self) -> str:
        what = "; ".join(self.differences) or "nothing that is hashed differs"
        return (
            f"Not the guard's own model ({what}): scores of {self.n} canary prompts moved by "
            f"{self.mean:+.2f} standard deviations in the mean and {self.largest:.2f} at most; "
            f"{self.changed} changed side of the threshold. Nothing is promised of it here until "
            "it is calibrated on this model."
        )
