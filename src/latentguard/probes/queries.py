"""Fitting queries: which tokens of an instruction tell harmful from harmless.

A small network is trained, and its queries are kept. Each of its heads has a query, which weighs
the tokens of an instruction at one layer, and a value, a linear probe of the tokens at some layers;
the score is the sum over heads of the weighted mean of values. What the guard reads where the
queries look is fitted anew, by the ridge of ``probe.fit_linear``.

Axis names in shapes: n prompts, t tokens of a prompt, s tokens of several prompts, l layers,
d width, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence

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


def fit_queries(
    states: Sequence[Float[Tensor, "t l d"]], labels: Sequence[bool], layers: Sequence[int]
) -> TokenQueries:
    """Fit queries that look at the first of the layers. The same input gives the same queries.

    Args:
        states: Of the tokens of each instruction.
        labels: True for harmful.
        layers: Layer indices, rising.
    """
    mean, spread = token_moments(states)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs, too
        network = _train(states, torch.tensor(labels), mean, spread)
    return TokenQueries(layers[0], network.query.weight.detach() / spread[0])


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
