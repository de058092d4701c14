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
        """The tail of some scores.

        Raises:
            GuardError: if they do not differ.
        """
        center, high = (float(np.quantile(scores, q)) for q in (0.5, 0.95))
        if not high > center:
            raise GuardError("The scores of harmless prompts do not differ; nothing can be fitted.")
        return ScoreScale(center, high - center)

    def moved(self, scores: Float[Tensor, "n"], to: ScoreScale) -> Float[Tensor, "n"]:
        """Scores of this tail on the scale of another."""
        return to.center + (scores - self.center) * (to.width / self.width)

    @staticmethod
    def unpack(record: Mapping[str, Any]) -> ScoreScale:
        """What ``dataclasses.asdict`` and JSON made of one.

        Raises:
            ValueError: if it is no range of scores.
        """
        tail = ScoreScale(float(record["center"]), float(record["width"]))
        if not np.isfinite([tail.center, tail.width]).all() or not tail.width > 0:
            raise ValueError("a tail of the categories is no range of scores")
        return tail
