"""Probes that ``reading_levers.py`` tries: trained over tokens, of low rank, weighted ridges.

Each is chosen by cross-validation on the training rows; rows of a pair stay in one fold.
Axis names in shapes: n rows, t tokens of all rows, p positions, l layers, d width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence

from latentguard.probes.probe import choose
from latentguard.probes.ridge import Design, Ridge
from latentguard.stats.detection import auroc

Array = NDArray[np.float64]

EPOCHS = (3, 6, 12)
"""Epochs after which a trained probe is scored; cross-validation picks one."""

BATCH = 64
"""Rows of a step."""

SCORED = 256
"""Rows that are scored at once."""

DECAY = 1.0
"""Weight decay of AdamW."""

STRENGTHS = (1.0, 3.0, 10.0)
"""Ridge penalties, those of the default rule."""


# ---- what probes read


class Inputs(Protocol):
    """What a trained probe reads, row by row."""

    def __len__(self) -> int:
        """Number of rows."""

    def take(self, rows: Tensor) -> tuple[Any, ...]:
        """The arguments of the probe for some rows."""


@dataclass(frozen=True, eq=False)
class TokenStates:
    """States at the instruction's tokens, all rows in one piece."""

    values: Float[Tensor, "t l d"]
    """Float16."""

    lengths: tuple[int, ...]
    """Tokens of each row."""

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Tensor) -> tuple[Float[Tensor, "t k"], list[int]]:
        """The tokens of some rows, layers side by side, and how many each row has."""
        ends = np.cumsum(self.lengths)
        spans = [slice(ends[i] - self.lengths[i], ends[i]) for i in rows.tolist()]
        values = torch.cat([self.values[span] for span in spans]).float()
        return values.flatten(1), [self.lengths[i] for i in rows.tolist()]

    def layer(self, slots: Sequence[int]) -> TokenStates:
        """The same at some of the layers."""
        return TokenStates(self.values[:, list(slots)], self.lengths)

    def moments(self) -> tuple[Float[Tensor, "l d"], Float[Tensor, "l d"]]:
        """Mean and spread over tokens."""
        values = self.values.float()
        return values.mean(0), values.std(0).clamp_min(1e-4)

    def standardise(self, mean: Float[Tensor, "l d"], spread: Float[Tensor, "l d"]) -> TokenStates:
        """The same in units of the training tokens."""
        return TokenStates(((self.values.float() - mean) / spread).half(), self.lengths)


@dataclass(frozen=True, eq=False)
class SlotStates:
    """States at some positions and layers, in units of the training rows."""

    values: Float[Tensor, "n p l d"]
    """Standardised states."""

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Tensor) -> tuple[Float[Tensor, "b p l d"]]:
        """The states of some rows, float32."""
        return (self.values[rows].float(),)


# ---- probes that are trained


class TokenProbe(nn.Module):
    """A number a token and head, pooled over the tokens, summed over heads.

    - ``mean``: the mean over tokens, a linear probe.
    - ``attention``: a mean with softmax weights from a learnt query for each head.
    - ``max``: the largest token of each head (MultiMax: Kramar et al. 2026,
      "Building Production-Ready Probes For Gemini", without its layers before the heads).
    """

    def __init__(self, width: int, pooling: str, heads: int) -> None:
        """Start from small random values, and from a query that weighs all tokens the same."""
        super().__init__()
        self.pooling = pooling
        self.value = nn.Linear(width, heads)
        self.query = nn.Linear(width, heads, bias=False)
        nn.init.zeros_(self.query.weight)

    def forward(self, tokens: Float[Tensor, "t k"], lengths: list[int]) -> Float[Tensor, "n"]:
        """Score rows."""
        each = self.value(tokens)
        values = pad_sequence(each.split(lengths), batch_first=True)
        places = torch.arange(values.shape[1])
        is_padding = (places >= torch.tensor(lengths)[:, None])[..., None]
        if self.pooling == "max":
            return values.masked_fill(is_padding, -torch.inf).amax(1).sum(-1)
        queries = self.query(tokens) if self.pooling == "attention" else torch.zeros_like(each)
        logits = pad_sequence(queries.split(lengths), batch_first=True)
        weights = logits.masked_fill(is_padding, -torch.inf).softmax(1)
        return (weights * values).sum((1, 2))


class LowRankProbe(nn.Module):
    """A linear probe whose weights are a sum of products: position x layer x width."""

    def __init__(self, shape: tuple[int, int, int], rank: int) -> None:
        """Start near the mean over positions and layers, with no weight on the width."""
        super().__init__()
        positions, layers, width = shape
        self.position = nn.Parameter((1 + 0.5 * torch.randn(positions, rank)) / positions)
        self.layer = nn.Parameter((1 + 0.5 * torch.randn(layers, rank)) / layers)
        self.width = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, states: Float[Tensor, "n p l d"]) -> Float[Tensor, "n"]:
        """Score rows."""
        parts = states @ self.width
        return torch.einsum("nplr,pr,lr->n", parts, self.position, self.layer) + self.bias


@dataclass(frozen=True)
class Setting:
    """What is chosen of a trained probe."""

    size: int
    """Heads, or rank."""

    rate: float
    """Learning rate times the root of the width: the step of a score is alike for all widths."""

    slots: tuple[int, ...] = ()
    """Which of the captured token layers are read."""


@dataclass(frozen=True, eq=False)
class Selection:
    """A probe on all training rows, and how it was chosen."""

    score: Callable[[Any], Array]
    """Scores of other rows, read as the training rows were."""

    held_out: Array
    """Scores of the training rows by probes that did not see their fold, [n]."""

    choices: Mapping[str, Any]
    """What was chosen, its cross-validated AUROC, and how many choices were tried."""


def select_trained(
    make: Callable[[Setting], nn.Module],
    read: Callable[[Setting], Inputs],
    labels: Bool[Tensor, "n"],
    folds: Sequence[Tensor],
    settings: Sequence[Setting],
) -> tuple[Setting, Selection]:
    """Choose a setting on the first fold and epochs on all folds, and train on all rows.

    Args:
        make: A new probe.
        read: The training rows as a probe of a setting reads them.
        labels: True for harmful.
        folds: Rows of each fold.
        settings: What is tried, each after every number of epochs in ``EPOCHS``.
    """
    first = folds[0]

    def screen(setting: Setting) -> float:
        scores = hold_out(make, setting, read(setting), labels, [first])
        return max(auroc(labels[first].numpy(), one[first]) for one in scores.values())

    setting = max(settings, key=screen)
    held_out = hold_out(make, setting, read(setting), labels, folds)
    figures = {count: auroc(labels.numpy(), scores) for count, scores in held_out.items()}
    epochs = max(figures, key=lambda count: figures[count])
    passes = train(make, setting, read(setting), labels, torch.arange(len(labels)))
    probe = next(one for count, one in passes if count == epochs)
    choices = {**vars(setting), "epochs": epochs, "tried": len(settings) * len(EPOCHS)}
    choices["cross_validated_auroc"] = round(figures[epochs], 4)

    def score(inputs: Inputs) -> Array:
        return score_rows(probe, inputs, torch.arange(len(inputs)))

    return setting, Selection(score, held_out[epochs], choices)


def hold_out(
    make: Callable[[Setting], nn.Module],
    setting: Setting,
    inputs: Inputs,
    labels: Bool[Tensor, "n"],
    folds: Sequence[Tensor],
) -> dict[int, Array]:
    """Epochs -> scores of the rows of some folds by probes that did not see the row's fold, [n]."""
    scores = {epochs: np.full(len(labels), np.nan) for epochs in EPOCHS}
    for fold in folds:
        rest = rows_without(fold, len(labels))
        for epochs, probe in train(make, setting, inputs, labels, rest):
            scores[epochs][fold.numpy()] = score_rows(probe, inputs, fold)
    return scores


def train(
    make: Callable[[Setting], nn.Module],
    setting: Setting,
    inputs: Inputs,
    labels: Bool[Tensor, "n"],
    rows: Tensor,
) -> Iterator[tuple[int, nn.Module]]:
    """Train a probe; yields it after each number of epochs in ``EPOCHS``.

    Both classes have the same weight. The seed is fixed.
    """
    torch.manual_seed(0)
    probe = make(setting)
    width = inputs.take(rows[:1])[0].shape[-1]
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr=setting.rate / width**0.5, weight_decay=DECAY
    )
    weights = class_weights(labels, rows)
    for epoch in range(1, max(EPOCHS) + 1):
        for batch in rows[torch.randperm(len(rows))].split(BATCH):
            loss = binary_cross_entropy_with_logits(
                probe(*inputs.take(batch)), labels[batch].float(), weight=weights[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in EPOCHS:
            yield epoch, probe


@torch.inference_mode()
def score_rows(probe: nn.Module, inputs: Inputs, rows: Tensor) -> Array:
    """Scores of some rows."""
    parts = [probe(*inputs.take(part)) for part in rows.split(SCORED)]
    scores: Array = torch.cat(parts).double().numpy()
    return scores


def rows_without(fold: Tensor, count: int) -> Tensor:
    """The rows that are not in a fold."""
    is_kept = torch.ones(count, dtype=torch.bool)
    is_kept[fold] = False
    return is_kept.nonzero()[:, 0]


def class_weights(labels: Bool[Tensor, "n"], rows: Tensor | None = None) -> Float[Tensor, "n"]:
    """Weights of mean 1 with which both classes count the same among some rows; all if None."""
    share = (labels if rows is None else labels[rows]).float().mean()
    return torch.where(labels, 0.5 / share, 0.5 / (1 - share))


# ---- ridges


def select_ridge(
    states: Float[Tensor, "n s d"],
    targets: Float[Tensor, "n"],
    weights: Float[Tensor, "n"],
    folds: Sequence[Tensor],
    quality: Callable[[Array], float],
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Selection:
    """Ridge regression on any targets, its penalty chosen as that of the default rule is.

    Args:
        states: Training states, a slot for each position and layer.
        targets: What is predicted.
        weights: Of the rows.
        folds: Rows of each fold.
        quality: Figure of held-out scores, between 0 and 1.
        strengths: Penalties that are tried.
    """
    design = Design(states, targets[:, None], weights / weights.mean())
    held_out: dict[float, Array] = {}
    solutions: dict[float, tuple[Tensor, Tensor]] = {}
    for strength in strengths:
        ridge = Ridge(design, strength)
        held_out[strength] = ridge.held_out(folds)[:, 0].numpy()
        solutions[strength] = ridge.solve()
    figures = {strength: quality(scores) for strength, scores in held_out.items()}
    strength = choose(figures)
    weight, bias = solutions[strength]
    choices = {
        "strength": strength,
        "tried": len(STRENGTHS),
        "quality": round(figures[strength], 4),
    }

    def score(slots: Float[Tensor, "m s d"]) -> Array:
        total = torch.einsum("nsd,sd->n", slots.float(), weight[0]) + bias
        return np.asarray(total.double().numpy())

    return Selection(score, held_out[strength], choices)


MARGINS = (0.0, 0.5)
"""A row is hard if its held-out score is on the wrong side, or as near as this to the threshold."""

FACTORS = (2.0, 4.0)
"""How much more a hard row counts."""


def select_hard_rows(
    states: Float[Tensor, "n s d"],
    labels: Bool[Tensor, "n"],
    folds: Sequence[Tensor],
    held_out: Array,
    strength: float,
) -> Selection:
    """Fit again with more weight on the rows that the default rule gets wrong or nearly wrong.

    Args:
        states: Training states.
        labels: True for harmful.
        folds: Rows of each fold.
        held_out: Scores of the default rule, which is fitted on +1 and -1.
        strength: Its penalty.
    """
    signs = labels.float() * 2 - 1
    margin = torch.from_numpy(held_out).float() * signs
    quality = partial(auroc, labels.numpy())
    figures: dict[tuple[float, float], Selection] = {}
    for edge in MARGINS:
        for factor in FACTORS:
            weights = class_weights(labels) * torch.where(margin < edge, factor, 1.0)
            figures[edge, factor] = select_ridge(
                states, signs, weights, folds, quality, strengths=[strength]
            )
    edge, factor = max(figures, key=lambda key: figures[key].choices["quality"])
    best = figures[edge, factor]
    share = round(float((margin < edge).float().mean()), 4)
    choices = {
        **best.choices,
        "margin": edge,
        "factor": factor,
        "hard": share,
        "tried": len(figures),
    }
    return Selection(best.score, best.held_out, choices)
