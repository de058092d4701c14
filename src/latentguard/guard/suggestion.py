"""Suggesting which prompts to label next.

Harm is rare in traffic, so labels of random prompts hold little of it. Most suggestions come from
the prompts with the highest scores, the others from all the rest, which keeps what the guard misses
in sight. Within each, prompts are drawn far apart in state space (k-means++, Arthur and
Vassilvitskii, 2007), so that no two labels say the same. Shares were chosen by measurement
(docs/results/adaptation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from latentguard.errors import GuardError
from latentguard.guard.features import FeatureMap, probe_inputs, read_texts
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.leakage import prompt_digest
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress

HIGH = 0.3
"""Share of the traffic with the highest scores."""

FROM_HIGH = 0.7
"""Share of the suggestions that comes from it."""

MAP_ROWS = 256
"""Prompts that standardise states where the guard has no reference."""

Stratum = Literal["high scores", "the rest"]


@dataclass(frozen=True)
class Suggestion:
    """A prompt that is worth a label."""

    prompt: Prompt
    """The prompt."""

    score: float
    """What the guard says of it."""

    stratum: Stratum
    """Which part of the traffic it stands for."""


def suggest(
    guard: LatentGuard,
    backend: Backend,
    prompts: Sequence[Prompt],
    count: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Suggestion]:
    """The prompts of some traffic to label next, those first that say most.

    Prompts that the guard has learned already are left out, and so are repetitions.

    Args:
        guard: That is to learn.
        backend: Its model.
        prompts: Unlabelled traffic.
        count: How many to suggest.
        seed: Of the draw.
        progress: Called with 1 after each prompt.

    Raises:
        ModelMismatch: if the model is not the guard's own.
        GuardError: if the traffic holds fewer prompts than are asked for.
    """
    guard.require_match(backend.fingerprint)
    fresh = require_fresh(guard, prompts, count)
    feature_map = (
        guard.reference.feature_map if guard.reference else _own_map(guard, backend, fresh)
    )
    texts = read_texts(guard, backend, fresh, feature_map, progress=progress)
    scores = texts.combine(texts.scores, guard.chunking, guard.threshold)
    features = texts.features[texts.whole].astype(np.float32)
    chosen = choose_rows(scores, features, count, np.random.default_rng(seed))
    return [Suggestion(fresh[row], float(scores[row]), stratum) for row, stratum in chosen]


def choose_rows(
    scores: Float[NDArray[np.float64], "n"],
    features: Float[NDArray[np.float32], "n k"],
    count: int,
    draw: np.random.Generator,
) -> list[tuple[int, Stratum]]:
    """Rows to label, with the part of the traffic that each stands for.

    Args:
        scores: What the guard says of each prompt.
        features: Of its states.
        count: How many.
        draw: Of random numbers.
    """
    order = np.argsort(-scores, kind="stable")
    cut = max(int(HIGH * len(order)), 1)
    high, rest = order[:cut], order[cut:]
    from_high = max(min(round(FROM_HIGH * count), len(high)), count - len(rest))
    return [
        *((row, "high scores") for row in _spread(features, high, from_high, draw)),
        *((row, "the rest") for row in _spread(features, rest, count - from_high, draw)),
    ]


def require_fresh(guard: LatentGuard, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The different prompts that the guard has not learned yet.

    Raises:
        GuardError: if there are fewer than ``count``, or that is no number of prompts.
    """
    if count < 1:
        raise GuardError(f"Expected to suggest at least one prompt; found {count}.")
    learned = set(guard.adaptation.labels.digests.tolist()) if guard.adaptation else set()
    unique = {prompt_digest(prompt): prompt for prompt in prompts}
    fresh = [prompt for digest, prompt in unique.items() if digest not in learned]
    if len(fresh) < count:
        raise GuardError(
            f"The traffic holds {len(fresh)} different prompts that the guard has not learned yet; "
            f"expected at least {count}. Give more traffic, or ask for fewer."
        )
    return fresh


def _own_map(guard: LatentGuard, backend: Backend, prompts: Sequence[Prompt]) -> FeatureMap:
    sample = prompts[:: max(len(prompts) // MAP_ROWS, 1)]
    return FeatureMap.of(probe_inputs(guard, backend, map(guard.reading.prepare, sample)))


def _spread(
    features: Float[NDArray[np.float32], "n k"],
    rows: NDArray[np.int64],
    count: int,
    draw: np.random.Generator,
) -> list[int]:
    """So many of the rows; each draw prefers those that are far from the rows drawn before."""
    if not count:
        return []
    own = features[rows]
    chosen = [int(draw.integers(len(rows)))]
    distance = np.full(len(rows), np.inf)
    free = np.ones(len(rows), dtype=bool)
    while len(chosen) < count:
        free[chosen[-1]] = False
        distance = np.minimum(distance, ((own - own[chosen[-1]]) ** 2).sum(1, dtype=np.float64))
        chance = np.where(free, distance + 1e-12, 0.0)
        chosen.append(int(draw.choice(len(rows), p=chance / chance.sum())))
    return [int(rows[number]) for number in chosen]
