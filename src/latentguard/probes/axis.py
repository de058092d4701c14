"""Axes: two centroids a layer; their difference is the direction, the cosines are the belief.

Equations 2 to 5 of the paper. Centroids are streamed in float64 and merge, so that workers can
each fold their own prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from latentguard.errors import GuardError
from latentguard.prompts import Prompt
from latentguard.states import States, show_numbers

GROUPS: dict[str, Callable[[Prompt], bool]] = {
    "harmful": lambda p: p.harmful is True,
    "harmless": lambda p: p.harmful is False,
    "refused": lambda p: p.refused is True,
    "accepted": lambda p: p.refused is False,
    "refused_harmful": lambda p: p.group == "refused_harmful",
    "accepted_harmful": lambda p: p.group == "accepted_harmful",
    "refused_harmless": lambda p: p.group == "refused_harmless",
    "accepted_harmless": lambda p: p.group == "accepted_harmless",
}
"""Whom an axis can be fitted on: the paper's four groups, or one label alone."""


@dataclass(frozen=True, eq=False)
class Centroid:
    """A running mean of states."""

    count: int
    """How many states were folded in."""

    mean: Float[Tensor, "l d"]
    """Their mean, float64."""

    @staticmethod
    def of(states: Float[Tensor, "n l d"]) -> Centroid:
        """The mean of some states; of none, a count of 0."""
        count = len(states)
        return Centroid(count, states.double().sum(0) / max(count, 1))

    def merge(self, other: Centroid) -> Centroid:
        """The centroid of both sets of states, up to rounding in any order."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        return Centroid(count, self.mean + (other.mean - self.mean) * share)


@dataclass(frozen=True, eq=False)
class Axis:
    """Two poles of a concept, such as harmful and harmless at t_inst.

    Examples:
        >>> axis = lg.Axis.fit(model.capture(lg.load_contrast("test")[:8]), "t_inst")
        >>> axis
        Axis(harmful at t_inst, layers=0..4, width=32, counts=(4, 4))
        >>> axis.direction.shape  # equation 5, to steer with
        torch.Size([5, 32])
    """

    name: str
    """``harmful`` or ``refuse``."""

    position: str
    """Where its states are read."""

    layers: tuple[int, ...]
    """The l layers."""

    positive: Float[Tensor, "l d"]
    """Centroid of the positive group, float32."""

    negative: Float[Tensor, "l d"]
    """Centroid of the negative group, float32."""

    counts: tuple[int, int]
    """How many states each centroid is the mean of."""

    @staticmethod
    def from_dict(
        record: Mapping[str, Any], layers: tuple[int, ...], tensors: Mapping[str, Tensor]
    ) -> Axis:
        """What a guard's file holds of one.

        Raises:
            LookupError, TypeError: if it is damaged.
        """
        name = record["name"]
        positive, negative = tensors[f"{name}.positive"], tensors[f"{name}.negative"]
        return Axis(name, record["position"], layers, positive, negative, tuple(record["counts"]))

    @staticmethod
    def fit(
        batches: States | Iterable[States],
        position: str,
        *,
        positive: str = "harmful",
        negative: str = "harmless",
        name: str = "harmful",
    ) -> Axis:
        """Fold states into an axis, one batch at a time.

        Args:
            batches: States with ``position``; batches are not kept.
            position: Where to read.
            positive: Key of ``GROUPS``.
            negative: Key of ``GROUPS``.
            name: Name of the axis.

        Raises:
            GuardError: if a group has no prompts, or a state is not finite.
        """
        plus = minus = None
        layers: tuple[int, ...] = ()
        for batch in [batches] if isinstance(batches, States) else batches:
            layers = batch.layers
            up, down = (fold(batch, position, group) for group in (positive, negative))
            plus = up if plus is None else plus.merge(up)
            minus = down if minus is None else minus.merge(down)
        return Axis.between(name, position, layers, (plus, positive), (minus, negative))

    @staticmethod
    def between(
        name: str,
        position: str,
        layers: tuple[int, ...],
        plus: tuple[Centroid | None, str],
        minus: tuple[Centroid | None, str],
    ) -> Axis:
        """An axis between two centroids, each with the name of its group.

        Raises:
            GuardError: if a group had no prompts.
        """
        for centroid, group in (plus, minus):
            if centroid is None or centroid.count == 0:
                raise GuardError(
                    f"The {name} axis needs {group} prompts and found none; it cannot be fitted."
                )
        (up, _), (down, _) = plus, minus
        assert up is not None and down is not None
        poles = up.mean.float(), down.mean.float()
        return Axis(name, position, layers, *poles, (up.count, down.count))

    def __repr__(self) -> str:
        layers = show_numbers(self.layers)
        width = self.positive.shape[-1]
        return (
            f"Axis({self.name} at {self.position}, layers={layers}, width={width}, "
            f"counts={self.counts})"
        )

    @property
    def direction(self) -> Float[Tensor, "l d"]:
        """Equation 5: the difference of the centroids, to steer with."""
        return self.positive - self.negative

    def layer_beliefs(self, states: Float[Tensor, "n l d"]) -> Float[Tensor, "n l"]:
        """Equation 2: cos(h, positive) - cos(h, negative) by layer."""
        h = states.float()
        return cosine_similarity(h, self.positive, dim=-1) - cosine_similarity(
            h, self.negative, dim=-1
        )

    def belief(self, states: Float[Tensor, "n l d"]) -> Float[Tensor, "n"]:
        """Equations 3 and 4: Delta, the mean over the layers."""
        return self.layer_beliefs(states).mean(-1)


def fold(batch: States, position: str, group: str) -> Centroid:
    """The centroid of one group (a key of ``GROUPS``) at a position; a worker's part of an axis.

    Raises:
        GuardError: if a state is not finite.
    """
    values = batch.where(GROUPS[group]).at(position)
    if not torch.isfinite(values).all():
        raise GuardError(
            f"States of {group} prompts at {position} hold infinite or undefined numbers; use "
            "bfloat16 or float32 instead of float16."
        )
    return Centroid.of(values)
