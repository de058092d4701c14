"""How beliefs change from t_post to the last third of replies, beside the controls.

Axis names in shapes: n prompts, t tokens (the first is t_post), a axes (the model's own, then
random ones), b beliefs (of harmfulness, of refusal).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from latentguard.stats.bootstrap import crossed_mean
from latentguard.stats.estimate import Estimate

Array = NDArray[np.float64]

REFUSED, ACCEPTED, JAILBROKEN = "refused harmful", "accepted harmful", "jailbroken"
HARMLESS = "accepted harmless"
OWN = "own reply"
ANOTHER = "reply of another prompt of the group"
OF_HARMLESS = "reply of a harmless prompt"


@dataclass(frozen=True, eq=False)
class ReplyGroup:
    """Beliefs along the replies of one group; nan behind the end of each."""

    requests: tuple[str, ...]
    """What each prompt asks for, [n]: the same for attacks on one request."""

    wrappers: tuple[str, ...]
    """The wrapper of each, [n]: the same for attacks of one template."""

    at_t_inst: Float[Array, "n a b"]
    """Beliefs where the request ends."""

    beliefs: Mapping[str, Float[Array, "n t a b"]]
    """By whose reply is behind the prompts: ``OWN``, ``ANOTHER``, ``OF_HARMLESS``."""

    def __len__(self) -> int:
        return len(self.requests)

    @cached_property
    def changes(self) -> dict[str, Float[Array, "n a b"]]:
        """From t_post to the last third of each reply; nan where there is no reply."""
        return {whose: last_third(of) - of[:, 0] for whose, of in self.beliefs.items()}

    def mean(self, values: Float[Array, "n"], minus: Array | None = None) -> Estimate | None:
        """The mean over prompts, requests and wrappers drawn again; None if there is none."""
        rows = np.flatnonzero(np.isfinite(values))
        if not len(rows):
            return None
        owners = ([of[row] for row in rows] for of in (self.requests, self.wrappers))
        others = None if minus is None else minus[np.isfinite(minus)]
        return crossed_mean(values[rows], *owners, minus=others)


@dataclass(frozen=True, eq=False)
class Records:
    """Beliefs along replies."""

    groups: Mapping[str, ReplyGroup]
    """By name; a group may be empty."""

    note: str
    """What the axes were fitted on."""


@dataclass(frozen=True)
class Change:
    """How one belief changes along the replies of a group, beside its controls."""

    own: Estimate
    """From t_post to the last third of the reply."""

    chance: Estimate
    """The same along random directions: mean, and the middle 95 % of them."""

    excess: Estimate | None
    """The change less that along accepted harmless replies; None if there are none."""

    chance_excess: Estimate | None
    """The same along random directions."""

    others: Mapping[str, tuple[Estimate, Estimate]] = field(default_factory=dict)
    """By whose reply stands behind the prompts: its change, and the own less it, paired."""


def last_third(beliefs: Float[Array, "n t ..."]) -> Float[Array, "n ..."]:
    """Mean over the last third of each reply's tokens, t_post not counted; nan if it has none."""
    there = np.isfinite(beliefs[:, 1:]).reshape(*beliefs[:, 1:].shape[:2], -1).all(-1)
    lengths = there.sum(1, keepdims=True)
    places = np.arange(there.shape[1])
    is_last = (places < lengths) & (places >= lengths - np.ceil(lengths / 3))
    shape = (*is_last.shape, *[1] * (beliefs.ndim - 2))
    total = np.where(is_last.reshape(shape), beliefs[:, 1:], 0.0).sum(1)
    count = is_last.sum(1).reshape(-1, *shape[2:])
    mean: Array = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean


def change_of(group: ReplyGroup, b: int, harmless: ReplyGroup | None) -> Change:
    """The change of one belief (0: of harmfulness, 1: of refusal) beside its controls.

    Args:
        group: Of prompts that have replies.
        b: Which belief.
        harmless: What it is compared with; None if there are no such replies.
    """
    changes = {whose: of[..., b] for whose, of in group.changes.items()}
    own = group.mean(changes[OWN][:, 0])
    assert own is not None
    draws = np.nanmean(changes[OWN][:, 1:], axis=0)
    others = {}
    for whose in (ANOTHER, OF_HARMLESS):
        if whose in changes:
            theirs = group.mean(changes[whose][:, 0])
            difference = group.mean(changes[OWN][:, 0] - changes[whose][:, 0])
            if theirs is not None and difference is not None:
                others[whose] = (theirs, difference)
    if harmless is None:
        return Change(own, spread(draws), None, None, others)
    reference = harmless.changes[OWN][..., b]
    excess = group.mean(changes[OWN][:, 0], minus=reference[:, 0])
    chance_excess = spread(draws - np.nanmean(reference[:, 1:], axis=0))
    return Change(own, spread(draws), excess, chance_excess, others)


def spread(draws: Array) -> Estimate:
    """Mean of random directions and the middle 95 % of them."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(draws.mean()), float(low), float(high), (len(draws), 0))


def answer(change: Change) -> str:
    """Whether a belief rises while the model complies, in words."""
    excess, chance = change.excess, change.chance_excess
    if excess is None or chance is None:
        return "there are too few harmless replies to compare with"
    if change.own.high < 0:
        less = ", less than along accepted harmless replies" if excess.low > 0 else ""
        return f"no, it falls{less}"
    if change.own.low <= 0:
        return "no clear change"
    if excess.low <= 0:
        return "it rises, but not clearly more than along accepted harmless replies"
    if excess.value <= chance.high:
        return "it rises, but beyond harmless replies no more than random directions do"
    return f"yes, more than along accepted harmless replies{_because(change)}"


def _because(change: Change) -> str:
    """Whether the words of the reply do it."""
    if OF_HARMLESS not in change.others:
        return ""
    theirs, difference = change.others[OF_HARMLESS]
    if difference.low > 0:
        return ", and more than with a harmless prompt's reply: the words of the reply count"
    return ", and also with a harmless prompt's reply" if theirs.low > 0 else ""
