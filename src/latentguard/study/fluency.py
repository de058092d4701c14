"""Replies under interventions: whether they are refusals, and how fluent they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from latentguard.prompts import Reply
from latentguard.study.cached_model import CachedModel

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MeasuredReplies:
    """Replies of n prompts, in one row for each intervention or in more axes."""

    refused: Array
    """Whether they are refusals, [.. n]; nan if unclear."""

    losses: Array
    """Loss of the replies under the model as it is, nats a token, [.. n]."""

    repetitions: Array
    """Share of repeated word pairs in them, [.. n]."""

    @property
    def is_refusal(self) -> NDArray[np.bool_]:
        """Whether each reply is a refusal, [.. n]; one that says neither is not."""
        return np.nan_to_num(self.refused).astype(bool)


def measure_replies(
    model: CachedModel, replies: Sequence[Sequence[Reply]], *, what: str
) -> MeasuredReplies:
    """Refusals and fluency of the replies under each intervention, [e n]."""
    losses = model.reply_losses([reply for of in replies for reply in of], what=what)
    return MeasuredReplies(
        np.array([model.refused(of) for of in replies], dtype=float),
        np.array(losses).reshape(len(replies), -1),
        np.array([[repetition(reply.text) for reply in of] for of in replies]),
    )


def repetition(text: str) -> float:
    """Share of word pairs that stood in the text before; 0 if there is at most one pair."""
    pairs = list(pairwise(text.lower().split()))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
