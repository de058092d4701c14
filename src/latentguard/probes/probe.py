"""Probes: states [n l d] -> scores [n], each one einsum and one bias.

``centroid`` is the paper's rule (equations 2 to 4): the mean over layers of the difference of
cosines. ``linear`` is a regularised linear probe: ridge regression on the states of a
band of layers, standardised per layer; its strength comes from cross-validation over
pair-disjoint folds of the training data, with a bias to strong penalties (``choose``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from latentguard.errors import GuardError
from latentguard.probes.axis import Axis
from latentguard.probes.ridge import Design, Ridge, folds_of
from latentguard.stats.detection import auroc

Kind = Literal["centroid", "linear"]

STRENGTHS = (1.0, 3.0, 10.0)
"""Ridge penalties tried, in units of the mean eigenvalue of the Gram matrix."""

BAND = (0.33, 0.67)
"""The layers of a linear probe, as shares of the depth; other bands in the middle do as well
(docs/results/detection.md), and a pass is left behind the last layer that is read."""

SLACK = 0.02
"""Cross-validated AUROC that may be given up for a stronger penalty: folds are written by the same
people, traffic is not, and what carries over to other people's prompts is the smoother probe."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A compiled rule: ``score = sum_l f(h_l) . weight_l + bias``."""

    kind: Kind
    """``centroid`` (f divides by the norm) or ``linear`` (f is the identity)."""

    layers: tuple[int, ...]
    """The layers it reads."""

    weight: Float[Tensor, "l d"]
    """Float32; one row a slot: each position in turn, each layer in turn."""

    bias: float
    """Added to the sum."""

    def __post_init__(self) -> None:
        require_kind(self.kind)

    def __call__(self, states: Float[Tensor, "n l d"]) -> Float[Tensor, "n"]:
        """Score states, in float32."""
        return self.score_inputs(self.inputs(states))

    def inputs(self, states: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
        """What the weight is applied to, float32."""
        h = states.float()
        return normalize(h, dim=-1) if self.kind == "centroid" else h

    def score_inputs(self, inputs: Float[Tensor, "n l d"]) -> Float[Tensor, "n"]:
        """Score ``inputs`` of states."""
        return torch.einsum("nld,ld->n", inputs, self.weight) + self.bias


def require_kind(kind: str) -> None:
    """Raise ``GuardError`` unless there is such a probe."""
    if kind not in get_args(Kind):
        raise GuardError(f"There is no probe '{kind}': expected {' or '.join(get_args(Kind))}.")


def require_both_classes(labels: Sequence[bool], kind: Kind) -> None:
    """Raise a GuardError if a class has too few prompts for a probe."""
    harmful = sum(labels)
    harmless = len(labels) - harmful
    fewest = 10 if kind == "linear" else 1
    if min(harmful, harmless) < fewest:
        raise GuardError(
            f"A {kind} probe needs at least {fewest} prompts of each class; found {harmful} "
            f"harmful and {harmless} harmless."
            + (" Give more, or use the centroid probe." if kind == "linear" else "")
        )


@dataclass(frozen=True, eq=False)
class Fit:
    """A probe with what cross-validation says of it."""

    probe: Probe
    """Fitted on all training states."""

    held_out: NDArray[np.float64]
    """Score of each training prompt by probes that did not see its fold, [n]."""

    choices: dict[str, float | str]
    """What was chosen, and its cross-validated AUROC."""


def centroid(axis: Axis) -> Probe:
    """The paper's rule: mean_l [cos(h, c+) - cos(h, c-)] = mean_l [h / |h| . (c+ - c-)]."""
    weight = normalize(axis.positive, dim=-1) - normalize(axis.negative, dim=-1)
    return Probe("centroid", axis.layers, weight / len(axis.layers), 0.0)


def fit_centroid(axis: Axis, states: Float[Tensor, "n l d"]) -> Fit:
    """The paper's rule with its scores on the states it was fitted on (it has nothing to tune)."""
    probe = centroid(axis)
    return Fit(probe, probe(states).double().numpy(), {})


def fit_linear(
    states: Float[Tensor, "n l d"],
    labels: Sequence[bool],
    groups: Sequence[str],
    layers: Sequence[int],
    *,
    seed: int = 0,
) -> Fit:
    """Fit the linear probe.

    Args:
        states: Training states.
        labels: True for harmful.
        groups: Rows with the same group fall into the same fold (pairs).
        layers: Layer index of each slot of ``states`` (several positions repeat the layers).
        seed: Of the folds.

    Raises:
        GuardError: if there are fewer than 10 prompts of a class.
    """
    require_both_classes(labels, "linear")
    y = torch.tensor(labels, dtype=torch.bool)
    design, folds = balanced(states, y), folds_of(groups, seed)
    solutions = {strength: _solved(design, strength, folds) for strength in STRENGTHS}
    figures = {s: auroc(y.numpy(), held_out) for s, (held_out, *_) in solutions.items()}
    strength = choose(figures)
    held_out, weight, bias = solutions[strength]
    band = tuple(dict.fromkeys(layers))
    choices: dict[str, float | str] = {
        "layers": f"{min(band)}-{max(band)}",
        "strength": strength,
        "cross_validated_auroc": round(figures[strength], 4),
    }
    return Fit(Probe("linear", band, weight, bias), held_out, choices)


def _solved(
    design: Design, strength: float, folds: Sequence[Tensor]
) -> tuple[NDArray[np.float64], Float[Tensor, "s d"], float]:
    """Held-out scores, weights and bias of one strength; the matrices of its ridge are let go."""
    ridge = Ridge(design, strength)
    weight, bias = ridge.solve()
    return ridge.held_out(folds)[:, 0].numpy(), weight[0], float(bias[0])


def random_probes(probe: Probe, draws: int, *, seed: int = 0) -> list[Probe]:
    """Probes with random weights of equal norm in each slot, and no bias: what chance scores."""
    generator = torch.Generator().manual_seed(seed)
    norms = probe.weight.norm(dim=-1, keepdim=True)
    probes = []
    for _ in range(draws):
        noise = torch.randn(probe.weight.shape, generator=generator)
        weight = noise / noise.norm(dim=-1, keepdim=True) * norms
        probes.append(replace(probe, weight=weight, bias=0.0))
    return probes


def choose(figures: Mapping[float, float]) -> float:
    """The strongest penalty that costs at most ``SLACK``."""
    return max(s for s, figure in figures.items() if figure >= max(figures.values()) - SLACK)


def balanced(states: Float[Tensor, "n s d"], y: Bool[Tensor, "n"]) -> Design:
    """The design that predicts +1 and -1, each class with half of the weight."""
    share = y.double().mean()
    weights = torch.where(y, 0.5 / share, 0.5 / (1 - share))
    return Design(states, (y.double() * 2 - 1)[:, None], weights)


def layers_of(kind: Kind, depth: int, band: tuple[float, float] = BAND) -> tuple[int, ...]:
    """The layers that a probe reads: a band, or all blocks (the paper); 0 has no context."""
    low, high = (share * depth for share in (band if kind == "linear" else (0, 1)))
    return tuple(k for k in range(1, depth + 1) if low <= k <= high) or (depth,)
