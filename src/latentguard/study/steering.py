"""Steering along a direction or along chance, one layer at a time (section 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from latentguard.interventions import Edit, Intervention, Tokens
from latentguard.probes.axis import Axis
from latentguard.prompts import Prompt, Reply
from latentguard.study.axes import Axes, Which
from latentguard.study.cached_model import CachedModel

K = TypeVar("K")


def steer(
    axis: Axis,
    layer: int,
    coefficient: float = 1.0,
    *,
    tokens: Tokens,
    label: str,
    from_layer: int | None = None,
    while_replying: bool = False,
) -> Intervention:
    """Add an axis's direction at one layer (equation 5): h + c v.

    Args:
        axis: Whose direction, at every layer from 0.
        layer: Where it is added.
        coefficient: How often; negative is the reverse direction.
        tokens: At which tokens of the prompt.
        label: What replies are marked with.
        from_layer: Whose direction is added; if None, the layer's own.
        while_replying: Whether it is added at each token of the reply, too.
    """
    vector = axis.direction[layer if from_layer is None else from_layer]
    return Intervention(layer, vector, coefficient, tokens, label, while_replying)


def steer_at_random(
    axis: Axis,
    layer: int,
    coefficient: float = 1.0,
    *,
    draw: int,
    **how: Any,
) -> Intervention:
    """The control: a random direction of equal norm, the same for a draw at every layer.

    Args:
        axis: Whose norm.
        layer: Where it is added.
        coefficient: How often.
        draw: Number of the random direction.
        how: The rest, as of ``steer``.
    """
    plain = steer(axis, layer, coefficient, **how)
    (vector,) = plain.vectors
    return replace(plain, vector=random_like(vector, draw))


def random_like(vector: Float[Tensor, "d"], draw: int) -> Float[Tensor, "d"]:
    """A random direction of equal norm."""
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(1000 + draw))
    scaled: Tensor = noise * (vector.norm() / noise.norm())
    return scaled


def random_axis(axis: Axis, draw: int) -> Axis:
    """The axis about its own middle, along a random direction of equal norm, as one draw has it."""
    middle = (axis.positive + axis.negative) / 2
    half = torch.stack([random_like(v, draw) for v in axis.direction]) / 2
    return replace(axis, positive=middle + half, negative=middle - half)


@dataclass(frozen=True)
class Steering:
    """One curve of a figure: how prompts are steered, one layer at a time."""

    name: str
    """What the curve is called."""

    of: Which
    """Whose direction, or whose norm."""

    coefficient: float
    """How often it is added; negative is the reverse direction."""

    tokens: Tokens
    """Where."""

    draws: int = 0
    """How many random directions of that norm take its place; 0 is the direction itself."""

    from_layer: int | None = None
    """The layer whose direction is added everywhere; None: each layer's own."""

    while_replying: bool = False
    """Whether it is added at each token of the reply, too."""

    def interventions(self, axes: Axes, layers: Sequence[int]) -> list[Intervention]:
        """One for each draw and layer, draw by draw; none if there is no such axis."""
        axis = axes.harmful if self.of == "harmful" else axes.refuse
        if axis is None:
            return []
        how: dict[str, Any] = dict(
            coefficient=self.coefficient,
            tokens=self.tokens,
            label=self.name,
            from_layer=self.from_layer,
            while_replying=self.while_replying,
        )
        if not self.draws:
            return [steer(axis, layer, **how) for layer in layers]
        draws = range(self.draws)
        return [steer_at_random(axis, layer, **how, draw=n) for n in draws for layer in layers]


def reply_to_each(
    model: CachedModel, prompts: Sequence[Prompt], edits: Mapping[K, Sequence[Edit]], **how: Any
) -> tuple[list[Reply], dict[K, list[list[Reply]]]]:
    """Replies of the model as it is, and under each edit of each kind, all asked in one sweep.

    Args:
        model: The model.
        prompts: What it is asked.
        edits: What is changed in it, by kind.
        how: ``what``, ``max_new_tokens`` and ``watch`` of ``CachedModel.replies``.

    Returns:
        The replies of the model as it is, [n], and those of each kind, [edits][n].
    """
    every = [None, *(edit for of in edits.values() for edit in of)]
    unedited, *edited = model.replies(prompts, every, **how)
    remaining = iter(edited)
    return unedited, {kind: [next(remaining) for _ in of] for kind, of in edits.items()}


def steer_each(
    model: CachedModel,
    prompts: Sequence[Prompt],
    ways: Sequence[Steering],
    axes: Axes,
    layers: Sequence[int],
    **how: Any,
) -> tuple[list[Reply], dict[Steering, list[list[list[Reply]]]]]:
    """Replies unsteered, and steered in each way in which the model can be.

    Args:
        model: The model.
        prompts: What it is asked.
        ways: How it is steered.
        axes: Along what.
        layers: At which layers, one at a time.
        how: As of ``reply_to_each``.

    Returns:
        The unsteered replies, [n], and those of each way, [draws][layers][n].
    """
    steered = {way: one for way in ways if (one := way.interventions(axes, layers))}
    unsteered, replies = reply_to_each(model, prompts, steered, **how)
    count = len(layers)
    return unsteered, {
        way: [of[start : start + count] for start in range(0, len(of), count)]
        for way, of in replies.items()
    }


def best_layers(hits: ArrayLike) -> NDArray[np.intp]:
    """At which layer each prompt is to be judged: the one that is best for the *other* prompts.

    The best of many layers looks better than it is, so a prompt never takes part in the choice of
    its own layer: that of the prompts in even places is chosen on those in odd places, and so on.

    Args:
        hits: Whether, or how strongly, each prompt shows the effect at each layer, [layers n].

    Returns:
        Index of the layer for each prompt, [n]; of the first, where several are best.
    """
    shares = np.asarray(hits, dtype=float)
    picks = np.zeros(shares.shape[1], dtype=np.intp)
    if shares.shape[1] > 1:
        for half in (0, 1):
            picks[half::2] = shares[:, 1 - half :: 2].mean(1).argmax()
    return picks


def at_layers(hits: NDArray[Any], picks: NDArray[np.intp]) -> NDArray[Any]:
    """Of hits [draws layers n], those at each prompt's own layer, [draws n]."""
    values: NDArray[Any] = hits[:, picks, np.arange(len(picks))]
    return values


def middle_layers(depth: int, band: Sequence[int], *, of: int = 28) -> slice:
    """A band of layers, both ends included, given for a model of ``of`` blocks; 0: for any."""
    scale = depth / of if of else 1
    low, high = (min(max(round(layer * scale), 1), depth) for layer in band)
    return slice(low, high + 1)
