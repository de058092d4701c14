"""Score scale: where harmless scores lie, so that scores of two kinds share one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentguard.errors import GuardError


@dataclass(frozen=True)
class ScoreScale:
    """Where the scores of harmless prompts lie that were not fitted on."""

    center: float
    """Their median."""

    width: float
    """From there to the 95th percentile."""

    @staticmethod
    def of(scores: NDArray[np.float64]) -> ScoreScale:
        """The scale of some scores.

        Raises:
            GuardError: if they do not differ.
        """
        center, high = (float(np.quantile(scores, q)) for q in (0.5, 0.95))
        if not high > center:
            raise GuardError("The scores of harmless prompts do not differ; nothing can be fitted.")
        return ScoreScale(center, high - center)

    def convert(self, scores: Float[Tensor, "n"], to: ScoreScale) -> Float[Tensor, "n"]:
        """Scores of this scale on another."""
        return to.center + (scores - self.center) * (to.width / self.width)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> ScoreScale:
        """What ``dataclasses.asdict`` and JSON made of one.

        Raises:
            LookupError, TypeError, ValueError: if it is no range of scores.
        """
        scale = ScoreScale(float(record["center"]), float(record["width"]))
        if not np.isfinite([scale.center, scale.width]).all() or not scale.width > 0:
            raise ValueError("a score scale of the categories is no range of scores")
        return scale
