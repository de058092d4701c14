"""A guard as columns: what each token adds to the score and to each belief, if it is read.

A probe sums over positions and layers, and an axis over layers, so both split into one number for
each position: ``column_c(token) = sum_l f_c(h_l) . weight_lc``. A guard with p positions and a axes
has p + a columns, then one for each of its queries, and one more if it judges replies; no hidden
state needs to be kept. What a linear probe makes of a mean over tokens is the mean of what it makes
of each, with the weights of the softmax of a query's column where a query looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from latentguard.errors import GuardError
from latentguard.guard.reading_plan import VariantScore
from latentguard.guard.spec import NOT_FINITE, GuardSpec
from latentguard.states import MEAN_POSITIONS, attended_slots

SMALLEST = 1e-12
"""The least norm that is divided by, as in ``normalize``."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The compiled guard."""

    positions: tuple[str, ...]
    """Where columns are read in a prompt: first the probe's positions, then the axes'."""

    layers: tuple[int, ...]
    """The l layers, rising."""

    weight: Float[Tensor, "l c d"]
    """Float32."""

    unit: Bool[Tensor, "c"]
    """Which columns divide states by their norm."""

    queries: Mapping[int, int] = field(default_factory=dict)
    """Column of an attended position -> column of its query."""

    has_replies: bool = False
    """Whether the last column scores the tokens of replies."""

    @staticmethod
    def of(guard: GuardSpec) -> Columns:
        """Compile a guard.

        Raises:
            GuardError: if it cannot run inside vLLM (``require_columns``).
        """
        require_columns(guard)
        layers, where = guard.probe.layers, guard.reading.positions
        scores = guard.probe.weight.reshape(len(where), len(layers), -1)
        beliefs = [
            (normalize(a.positive, dim=-1) - normalize(a.negative, dim=-1)) / len(layers)
            for a in guard.axes
        ]
        unit = [guard.probe.kind == "centroid"] * len(where) + [True] * len(beliefs)
        parts = [(layers, torch.stack([*scores, *beliefs], dim=1))]
        attended = attended_slots(where, layers, guard.reading.queries)
        queries = dict[int, int]()
        if attended is not None:
            queries = {slot: len(unit) + n for n, slot in enumerate(attended.slots)}
            parts.append(((min(layers),), attended.vectors[None]))
            unit += [False] * len(queries)
        if guard.replies is not None:
            parts.append((guard.replies.probe.layers, guard.replies.probe.weight[:, None]))
            unit.append(False)
        read = tuple(sorted({layer for own, _ in parts for layer in own}))
        return Columns(
            (*where, *(a.position for a in guard.axes)),
            read,
            torch.cat([_spread(weight, own, read) for own, weight in parts], dim=1),
            torch.tensor(unit),
            queries,
            guard.replies is not None,
        )

    def to(self, device: torch.device) -> Columns:
        """The same on a device."""
        return replace(self, weight=self.weight.to(device), unit=self.unit.to(device))

    def __call__(self, states: Sequence[Float[Tensor, "t d"]]) -> Float[Tensor, "t c"]:
        """Every column for every token, from the states of each layer, in float32."""
        shape = (len(self.unit), len(states[0]))
        total = torch.zeros(shape, dtype=torch.float32, device=states[0].device)
        for h, weight in zip(states, self.weight, strict=True):
            h = h.float()  # noqa: PLW2901
            norm = h.norm(dim=-1).clamp_min(SMALLEST)
            total += (weight @ h.T) / torch.where(self.unit[:, None], norm, 1.0)
        return total.T  # a wide product of few rows is many times as fast as a narrow one

    def same_as(self, other: Columns) -> bool:
        """Whether both read the same."""
        return (
            self.positions == other.positions
            and self.layers == other.layers
            and torch.equal(self.weight, other.weight)
            and torch.equal(self.unit, other.unit)
            and self.queries == other.queries
            and self.has_replies == other.has_replies
        )


def _spread(
    weight: Float[Tensor, "k c d"], own: Sequence[int], layers: Sequence[int]
) -> Float[Tensor, "l c d"]:
    """Weights of some layers among all that are read, in float32; zero at the others."""
    spread = torch.zeros(len(layers), *weight.shape[1:], dtype=torch.float32)
    spread[[layers.index(layer) for layer in own]] = weight.float()
    return spread


def require_columns(guard: GuardSpec) -> None:
    """Check that a guard can be read from columns alone.

    Raises:
        GuardError: if it reads a changed text (``sealed``), as the engine computes another; if it
            reads the cosines of a mean, which are no mean of cosines; or if it has packs, which
            decide on whole states.
    """
    reading = guard.reading
    has_means = reading.queries is not None or set(MEAN_POSITIONS) & set(reading.positions)
    if guard.probe.kind == "centroid" and has_means:
        raise GuardError(
            "A centroid probe of a mean over tokens cannot be put together from what each "
            "token adds; fit a linear one, or with --reading span."
        )
    if reading.name == "sealed":
        raise GuardError(
            "A guard that reads 'sealed' changes the prompt and needs a pass of its own, so it "
            "cannot run inside vLLM; fit one with --reading span."
        )
    if guard.categories and guard.categories.packs:
        raise GuardError(
            f"The category packs of this guard ({', '.join(guard.categories.packs)}) decide on "
            "whole states, which do not leave vLLM; remove them, or put 'latentguard serve "
            "--upstream' before it."
        )


def variant_score(guard: GuardSpec, read: Sequence[float]) -> VariantScore:
    """The score and the beliefs of one text, in float64, from each column at its position.

    Raises:
        GuardError: if a number is missing or not finite.
    """
    columns = torch.tensor(read, dtype=torch.float64)
    count = len(guard.reading.positions)
    score = float(columns[:count].sum() + guard.probe.bias)
    beliefs = {axis.name: float(columns[count + k]) for k, axis in enumerate(guard.axes)}
    if not all(map(math.isfinite, (score, *beliefs.values()))):
        raise GuardError(NOT_FINITE)
    return VariantScore(score, beliefs)
