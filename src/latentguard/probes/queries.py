"""Attention over an instruction's tokens: which of them tell harmful from harmless.

A small network is trained. Each of its heads has a query, which weighs the tokens of an instruction
at one layer, and a value, a linear probe of the tokens at some layers. The score is the sum over
heads of the weighted mean of values: a linear probe of the states at the attended positions.

Axis names in shapes: n prompts, t tokens of a prompt, s tokens of several prompts, l layers,
d width, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence

from latentguard.probes.ridge import folds_of
from latentguard.states import TokenQueries

HEADS = 8
"""Queries; with ``EPOCHS`` and ``RATE`` chosen on SmolLM2-135M (docs/results/lab-notes.md)."""

EPOCHS = 12
"""Passes over the prompts."""

RATE = 0.04
"""Learning rate, times the root of the number of inputs."""

DECAY = 1.0
"""Weight decay of AdamW."""

BATCH = 64
"""Prompts of a step."""

SMALLEST_SPREAD = 1e-4
"""The least standard deviation that states are divided by."""


class AttendedScore(nn.Module):
    """The network that is trained."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        """Begin with queries of zero, which weigh all tokens alike."""
        super().__init__()
        self.value = nn.Linear(layers * width, heads)
        self.query = nn.Linear(width, heads, bias=False)
        nn.init.zeros_(self.query.weight)

    def forward(self, tokens: Float[Tensor, "s l d"], lengths: list[int]) -> Float[Tensor, "n"]:
        """The scores of prompts whose tokens lie one behind the other."""
        values = pad_sequence(self.value(tokens.flatten(1)).split(lengths), batch_first=True)
        logits = pad_sequence(
            self.query(tokens[:, 0]).split(lengths), batch_first=True, padding_value=-torch.inf
        )
        return (logits.softmax(1) * values).sum((1, 2))


@dataclass(frozen=True, eq=False)
class AttendedFit:
    """The network, as queries and a linear probe of what they attend to."""

    queries: TokenQueries
    """They look at the first of the layers."""

    layers: tuple[int, ...]
    """The layers that are read."""

    weight: Float[Tensor, "h l d"]
    """Of the state at each attended position and layer, float32."""

    bias: float
    """Added to the sum."""

    held_out: NDArray[np.float64]
    """Score of each prompt by a network that did not see its fold, [n]; NaN for prompts that no
    network was trained on."""


def fit_attended(
    states: Sequence[Float[Tensor, "t l d"]],
    labels: Sequence[bool],
    groups: Sequence[str],
    layers: Sequence[int],
) -> AttendedFit:
    """Train the network on all prompts, and once without each fold. The same input, the same fit.

    Args:
        states: Of the tokens of each instruction.
        labels: True for harmful.
        groups: Rows with the same group fall into the same fold (pairs).
        layers: Layer indices, rising.
    """
    y = torch.tensor(labels)
    held_out = np.empty(len(y))
    for fold in folds_of(groups):
        rest = np.setdiff1d(np.arange(len(y)), fold.numpy()).tolist()
        trained = _fit([states[n] for n in rest], y[rest], layers)
        held_out[fold.numpy()] = [_score(trained, states[n]) for n in fold.tolist()]
    queries, weight, bias = _fit(states, y, layers)
    return AttendedFit(queries, tuple(layers), weight, bias, held_out)


Trained = tuple[TokenQueries, Float[Tensor, "h l d"], float]
"""Queries, weights and bias, in the units of raw states."""


def _fit(
    states: Sequence[Float[Tensor, "t l d"]], labels: Bool[Tensor, "n"], layers: Sequence[int]
) -> Trained:
    mean, spread = token_moments(states)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs, too
        network = _train(states, labels, mean, spread)
    weight = network.value.weight.detach().view(-1, *mean.shape) / spread
    bias = network.value.bias.detach().sum() - (weight * mean).sum()
    return TokenQueries(layers[0], network.query.weight.detach() / spread[0]), weight, float(bias)


def _score(trained: Trained, tokens: Float[Tensor, "t l d"]) -> float:
    queries, weight, bias = trained
    tokens = tokens.float()
    shares = (queries.vectors @ tokens[:, 0].T).softmax(1)
    return float(torch.einsum("ht,tld,hld->", shares, tokens, weight)) + bias


def token_moments(
    states: Sequence[Float[Tensor, "t l d"]],
) -> tuple[Float[Tensor, "l d"], Float[Tensor, "l d"]]:
    """Mean and standard deviation over all tokens, float32."""
    count = sum(map(len, states))
    total = torch.stack([one.double().sum(0) for one in states]).sum(0)
    squares = torch.stack([one.double().square().sum(0) for one in states]).sum(0)
    mean = total / count
    spread = (squares / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), spread.float().clamp_min(SMALLEST_SPREAD)


def _train(
    states: Sequence[Float[Tensor, "t l d"]],
    labels: Bool[Tensor, "n"],
    mean: Float[Tensor, "l d"],
    spread: Float[Tensor, "l d"],
) -> AttendedScore:
    """Train the network; both classes have the same weight."""
    layers, width = mean.shape
    network = AttendedScore(layers, width, HEADS)
    rate = RATE / mean.numel() ** 0.5
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=DECAY)
    share = labels.float().mean()
    weights = torch.where(labels, 0.5 / share, 0.5 / (1 - share))
    for _ in range(EPOCHS):
        order = torch.randperm(len(states)).tolist()
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            tokens = (torch.cat([states[n] for n in rows]).float() - mean) / spread
            scores = network(tokens, [len(states[n]) for n in rows])
            loss = binary_cross_entropy_with_logits(
                scores, labels[rows].float(), weight=weights[rows]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            optimizer.step()
    return network
