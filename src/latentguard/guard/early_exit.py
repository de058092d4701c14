"""Early exit: prompts that are surely harmless leave the pass at the guard's first layer.

That layer lies at a third of the depth. An estimate of the guard's score is read there. A prompt
whose estimate lies under a cut is allowed at once; the others are read on.

- No prompt that the whole pass allows is flagged, so the false-positive rate can only fall.
- What is lost is bounded: of the prompts that the whole pass does not allow, at most a stated share
  leaves early.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.probes.probe import Probe
from latentguard.stats.bounds import Bound, smallest_n, threshold_for_fpr


@dataclass(frozen=True, eq=False)
class EarlyExit:
    """When a prompt leaves the pass early."""

    probe: Probe
    """Estimates the guard's score, from its positions at its first layer."""

    bound: Bound
    """Of the negative estimates of prompts that the whole pass does not allow: a prompt leaves if
    its own is above the threshold. ``observed`` of ``n`` did."""

    left: int
    """How many calibration prompts left."""

    n: int
    """How many there were."""

    guard: str
    """Digest of the guard without this part; a guard that was changed does not use it."""

    @property
    def cut(self) -> float:
        """A prompt leaves if its estimate is lower."""
        return -self.bound.threshold

    def notes(self) -> list[str]:
        """What it does and promises, in Markdown."""
        return [
            f"In files and corpora, prompts that are surely harmless leave the pass after layer "
            f"{self.probe.layers[0]}; {self.left} of {self.n} calibration prompts did. Of the "
            f"prompts that the whole pass does not allow, at most {self.bound.max_fpr:.1%} are "
            f"lost by it, with {100 * self.bound.confidence:g}% confidence: {self.bound.observed} "
            f"of {self.bound.n} were."
        ]

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        record = {
            "layer": self.probe.layers[0],
            "bias": self.probe.bias,
            "bound": asdict(self.bound),
            "left": self.left,
            "n": self.n,
            "guard": self.guard,
        }
        return record, {"weight": self.probe.weight}

    @staticmethod
    def from_dict(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> EarlyExit:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        weight, bias = tensors["weight"], float(record["bias"])
        if not torch.isfinite(weight).all() or not np.isfinite(bias):
            raise ValueError("the weights of the early exit are not finite")
        return EarlyExit(
            probe=Probe("linear", (int(record["layer"]),), weight, bias),
            bound=Bound.from_dict(record["bound"]),
            left=int(record["left"]),
            n=int(record["n"]),
            guard=str(record["guard"]),
        )


def bound_lost(
    estimates: Float[NDArray[np.float64], "n"],
    scores: Float[NDArray[np.float64], "n"],
    lowest: float,
    max_lost: float,
    confidence: float,
) -> Bound:
    """The highest cut that keeps the share of lost prompts, as the bound of negative estimates.

    Args:
        estimates: Of prompts like those to come.
        scores: Of the whole pass.
        lowest: Prompts whose score is above it are not allowed.
        max_lost: Share of these that may leave.
        confidence: Of the bound.

    Raises:
        GuardError: if too few prompts are not allowed.
    """
    not_allowed = estimates[scores > lowest]
    if len(not_allowed) < (enough := smallest_n(max_lost, confidence)):
        raise GuardError(
            f"The guard allows all but {len(not_allowed)} of {len(scores)} short prompts; to "
            f"promise that at most {max_lost:.1%} of such prompts are lost takes {enough}. Give "
            "more harmful prompts, or allow a larger share."
        )
    bound = threshold_for_fpr(-not_allowed, max_lost, confidence)
    if -bound.threshold <= lowest:
        return bound
    lost = int((not_allowed < lowest).sum())  # what is estimated over the threshold never leaves
    return replace(bound, threshold=-lowest, observed=lost)
