"""Beliefs as weights: Delta is an inner product with states that have norm 1 at each layer.

A cosine is linear in such a state. So the beliefs by many axes, random ones too, are one product.

Axis names in shapes: n states, a axes, l layers, d width.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from latentguard.probes.axis import Axis


def belief_weights(axis: Axis) -> Float[Tensor, "l d"]:
    """The weights of Delta over the layers 1 to L (equations 3 and 4)."""
    weights = normalize(axis.positive, dim=-1) - normalize(axis.negative, dim=-1)
    weights[0] = 0
    return weights / (len(axis.layers) - 1)


def weighted_beliefs(
    states: Float[Tensor, "n l d"], weights: Float[Tensor, "a l d"]
) -> Float[Tensor, "n a"]:
    """Delta of states by the weights of each of some axes."""
    return normalize(states.float(), dim=-1).flatten(1) @ weights.flatten(1).T
