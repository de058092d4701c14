"""Categories: which risk a prompt is nearest to, and packs of categories that were added later.

Each category is one direction in the states that the guard reads anyway (same positions, same
layers): a ridge regression of its harmful prompts against all others, harmless ones and those of
other categories, on the log-odds scale of Platt's method. A *pack* is a category that can also
flag. Its log-odds are moved to the scale of the guard's own score, so that on harmless prompts
that neither was fitted on the medians agree, and the 95th percentiles; the guard's score is then
the greatest of its own and those of its packs, and one threshold, calibrated on that greatest,
keeps the stated false-positive rate of all together.

Axis names in shapes: n prompts, s slots (each position in turn, each layer in turn), d width,
c categories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import linear

from latentguard.data.hazards import HAZARDS
from latentguard.guard.probabilities import fit_platt
from latentguard.guard.score_scale import ScoreScale
from latentguard.guard.verdict import Part, Verdict
from latentguard.probes.fitting import slots
from latentguard.probes.ridge import Design, Ridge, folds_of
from latentguard.states import States

FEWEST = 10
"""Harmful prompts that a category needs."""

STRENGTH = 1.0
"""Ridge penalty, in units of the mean eigenvalue; cross-validation on training data chose it."""


@dataclass(frozen=True)
class Pack:
    """What makes a category able to flag, and what it was made of."""

    tail: ScoreScale
    """Of its log-odds on harmless prompts."""

    examples: int
    """Harmful prompts that it was fitted on."""

    harmless: int
    """Harmless prompts that it was fitted on."""

    data_sha256: str
    """Of both."""

    against: tuple[int, ...] = ()
    """Marks of the user's own harmless texts among them, which never calibrate (``learnt``)."""

    shared: tuple[int, ...] = ()
    """Of such that the user's other rows have, too."""

    learnt: tuple[int, ...] = ()
    """Marks of the harmful ones, on which probabilities are not measured."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Log-odds of c categories; ``states . weight + bias``."""

    names: tuple[str, ...]
    """Of each category."""

    weight: Float[Tensor, "c s d"]
    """Float32."""

    bias: Float[Tensor, "c"]
    """Float32."""

    def __call__(self, states: Float[Tensor, "n s d"]) -> Float[Tensor, "n c"]:
        """The log-odds of each category, in float32."""
        return linear(states.float().flatten(1), self.weight.flatten(1), self.bias)

    def only(self, names: Sequence[str]) -> Directions:
        """Some of them."""
        rows = [self.names.index(name) for name in names]
        return Directions(tuple(names), self.weight[rows], self.bias[rows])

    def join(self, other: Directions) -> Directions:
        """These and the others."""
        return Directions(
            self.names + other.names,
            torch.cat([self.weight, other.weight]),
            torch.cat([self.bias, other.bias]),
        )


@dataclass(frozen=True, eq=False)
class Fitted:
    """Directions with their log-odds on folds that they did not see."""

    directions: Directions
    """Fitted on all rows."""

    held_out: NDArray[np.float64]
    """[n c]."""


def fit_directions(
    states: Float[Tensor, "n s d"], members: Mapping[str, Sequence[bool]], groups: Sequence[str]
) -> Fitted:
    """Fit one direction for each category.

    Args:
        states: Of all rows.
        members: Category -> which rows belong to it; every other row is against it.
        groups: Rows with the same group fall into the same fold (pairs).
    """
    targets = torch.tensor([list(rows) for rows in members.values()], dtype=torch.float64).T
    ridge = Ridge(Design(states, targets, torch.ones(len(states))), STRENGTH)
    raw = ridge.held_out(folds_of(groups)).numpy()
    pairs = [fit_platt(raw[:, i], np.array(rows)) for i, rows in enumerate(members.values())]
    slope, intercept = np.array(pairs).T
    weight, bias = ridge.solve()
    a, b = (torch.tensor(values, dtype=torch.float32) for values in (slope, intercept))
    directions = Directions(tuple(members), weight * a[:, None, None], bias * a + b)
    return Fitted(directions, raw * slope + intercept)


@dataclass(frozen=True, eq=False)
class Categories(Part):
    """Names the nearest category, and holds the packs."""

    name: ClassVar[str] = "categories"

    reads: tuple[str, ...]
    """The positions of the guard's probe."""

    directions: Directions
    """Of the categories that the guard was fitted with."""

    tail: ScoreScale
    """Of the guard's own score on harmless training prompts, cross-fitted."""

    packs: Mapping[str, Pack]
    """Category -> what makes it able to flag."""

    added: Directions
    """Of the packs, in their order."""

    @staticmethod
    def fit(states: States, reads: tuple[str, ...], held_out: NDArray[np.float64]) -> Categories:
        """Fit a direction for every category that has enough harmful prompts.

        Args:
            states: Labelled, at the layers of the guard's probe.
            reads: The positions of the guard's probe.
            held_out: The guard's own score of each prompt, cross-fitted, [n].
        """
        prompts, values = states.prompts, slots(states, reads)
        of = [p.category if p.harmful else None for p in prompts]
        names = sorted({n for n in of if n is not None and of.count(n) >= FEWEST})
        none = Directions((), torch.zeros(0, *values.shape[1:]), torch.zeros(0))
        directions = none
        if len(names) > 1:
            members = {name: [c == name for c in of] for name in names}
            groups = [p.pair or p.text for p in prompts]
            directions = fit_directions(values, members, groups).directions
        calm = held_out[[not p.harmful for p in prompts]]
        return Categories(reads, directions, ScoreScale.of(calm), {}, none)

    @property
    def positions(self) -> tuple[str, ...]:
        """See ``Part``."""
        return self.reads

    def with_pack(self, pack: Pack, direction: Directions) -> Categories:
        """These categories and one more, that can flag."""
        packs = {**self.packs, direction.names[0]: pack}
        return replace(self, packs=packs, added=self.added.join(direction))

    def without(self, name: str) -> Categories:
        """These categories but one pack."""
        packs = {n: pack for n, pack in self.packs.items() if n != name}
        return replace(self, packs=packs, added=self.added.only(tuple(packs)))

    def pack_scores(self, states: States) -> Float[Tensor, "n c"]:
        """The score of each pack on the scale of the guard's own score, float64."""
        odds = self.added(slots(states, self.reads)).double()
        moved = [p.tail.moved(odds[:, i], self.tail) for i, p in enumerate(self.packs.values())]
        return torch.stack(moved, dim=-1)

    def cut_off(self, name: str, threshold: float) -> float:
        """The probability of a pack from which on it flags, at the guard's threshold."""
        tail = self.packs[name].tail
        moved = self.tail.moved(torch.tensor([threshold], dtype=torch.float64), tail)
        return float(expit(moved.item()))

    def adjust(self, states: States, scores: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """See ``Part``: the greatest of the guard's own score and those of the packs."""
        if not self.packs:
            return scores
        return torch.maximum(scores, self.pack_scores(states).amax(-1))

    def judge(self, states: States, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """See ``Part``: the scores of all categories, and the nearest.

        A flagged prompt whose score is a pack's is named for the pack.
        """
        known = self.directions.join(self.added) if self.packs else self.directions
        if not known.names:
            return list(verdicts)
        chances = expit(known(slots(states, self.reads)).double().numpy())
        found = [_scores(known.names, row.tolist()) for row in chances]
        nearest = [max(scores, key=lambda name: scores[name]) for scores in found]
        if self.packs:
            raised, which = self.pack_scores(states).max(-1)
            for i, verdict in enumerate(verdicts):
                if verdict.flagged and raised[i].item() >= verdict.score:
                    nearest[i] = self.added.names[int(which[i])]
        return [
            replace(v, category=name, category_scores=scores)
            for v, name, scores in zip(verdicts, nearest, found, strict=True)
        ]

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See ``Part``."""
        packs = {name: asdict(pack) for name, pack in self.packs.items()}
        record = dict(reads=self.reads, names=self.directions.names, packs=packs)
        record |= dict(tail=asdict(self.tail))
        both = self.directions.join(self.added)
        return record, dict(weight=both.weight, bias=both.bias)

    @classmethod
    def unpack(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part``."""
        names, weight, bias = tuple(record["names"]), tensors["weight"], tensors["bias"]
        packs = {name: _pack(held) for name, held in record["packs"].items()}
        sound = weight.ndim == 3 and len(weight) == len(bias) == len(names) + len(packs)
        if not sound or not all(torch.isfinite(t).all() for t in (weight, bias)):
            raise ValueError("the directions of the categories are damaged")
        cut = len(names)
        own = Directions(names, weight[:cut], bias[:cut])
        added = Directions(tuple(packs), weight[cut:], bias[cut:])
        return cls(tuple(record["reads"]), own, ScoreScale.unpack(record["tail"]), packs, added)

    def notes(self) -> list[str]:
        """See ``Part``."""
        names = ", ".join(map(_with_code, self.directions.names))
        said = [f"Names the nearest of these risk categories: {names}."] if names else []
        return said + [
            f"Category pack `{name}`: fitted on {pack.examples} harmful and {pack.harmless} "
            "harmless prompts; it can flag by itself, and the promise covers it."
            for name, pack in self.packs.items()
        ]


def _scores(names: Sequence[str], chances: Sequence[float]) -> dict[str, float]:
    """The probability of each name; of a pack with the name of a category, the greater."""
    scores = dict[str, float]()
    for name, chance in zip(names, chances, strict=True):
        scores[name] = max(chance, scores.get(name, 0.0))
    return scores


def _with_code(name: str) -> str:
    code = HAZARDS[name][0] if name in HAZARDS else None
    return f"{name} ({code})" if code else name


def _pack(record: Mapping[str, Any]) -> Pack:
    """One without marks is of an older version."""
    marks = {name: tuple(record.get(name, ())) for name in ("against", "shared", "learnt")}
    return Pack(**{**record, "tail": ScoreScale.unpack(record["tail"]), **marks})
