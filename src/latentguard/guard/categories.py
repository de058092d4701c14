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
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import linear

from latentguard.data.hazards import HAZARDS
from latentguard.guard.leakage import TrainingPrompts
from latentguard.guard.probabilities import fit_platt
from latentguard.guard.reading_plan import CategoryScores
from latentguard.guard.score_scale import ScoreScale
from latentguard.probes.fitting import slots
from latentguard.probes.ridge import Design, Ridge, folds_of
from latentguard.states import States

MIN_PROMPTS = 10
"""Harmful prompts that a category needs."""

STRENGTH = 1.0
"""Ridge penalty, in units of the mean eigenvalue; cross-validation on training data chose it."""


@dataclass(frozen=True)
class Pack:
    """What makes a category able to flag, and what it was made of."""

    scale: ScoreScale
    """Of its log-odds on harmless prompts."""

    examples: int
    """Harmful prompts that it was fitted on."""

    harmless: int
    """Harmless prompts that it was fitted on."""

    data_sha256: str
    """Of both."""

    harmless_alone: tuple[int, ...] = ()
    """Digests of the user's own harmless texts among them, which never calibrate (``leakage``)."""

    harmless_shared: tuple[int, ...] = ()
    """Of such that the user's other rows have, too."""

    harmful_digests: tuple[int, ...] = ()
    """Of the harmful ones, on which probabilities are not measured."""

    @property
    def training_prompts(self) -> TrainingPrompts:
        """The user's harmless prompts that it was trained on."""
        return TrainingPrompts(frozenset(self.harmless_alone), frozenset(self.harmless_shared))

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Pack:
        """What ``dataclasses.asdict`` and JSON made of one.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        fields = dict(record)
        for name in ("harmless_alone", "harmless_shared", "harmful_digests"):
            fields[name] = tuple(record[name])
        fields["scale"] = ScoreScale.from_dict(record["scale"])
        return Pack(**fields)


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
class DirectionFit:
    """Directions with their log-odds on folds that they did not see."""

    directions: Directions
    """Fitted on all rows."""

    held_out: NDArray[np.float64]
    """[n c]."""


def fit_directions(
    states: Float[Tensor, "n s d"], members: Mapping[str, Sequence[bool]], groups: Sequence[str]
) -> DirectionFit:
    """Fit one direction for each category.

    Args:
        states: Of all rows.
        members: Category -> which rows belong to it; every other row is against it.
        groups: Rows with the same group fall into the same fold (pairs).
    """
    targets = torch.tensor([list(rows) for rows in members.values()], dtype=torch.float64).T
    ridge = Ridge(Design(states, targets, torch.ones(len(states))), STRENGTH)
    raw = ridge.held_out(folds_of(groups)).numpy()
    maps = [fit_platt(raw[:, i], np.array(rows)) for i, rows in enumerate(members.values())]
    slope, intercept = np.array(maps).T
    weight, bias = ridge.solve()
    scale = torch.tensor(slope, dtype=torch.float32)
    shift = torch.tensor(intercept, dtype=torch.float32)
    directions = Directions(tuple(members), weight * scale[:, None, None], bias * scale + shift)
    return DirectionFit(directions, raw * slope + intercept)


@dataclass(frozen=True, eq=False)
class Categories:
    """Names the nearest category, and holds the packs."""

    positions: tuple[str, ...]
    """The positions of the guard's probe."""

    directions: Directions
    """Of the categories that the guard was fitted with."""

    scale: ScoreScale
    """Of the guard's own score on harmless training prompts, cross-fitted."""

    packs: Mapping[str, Pack]
    """Category -> what makes it able to flag."""

    pack_directions: Directions
    """Of the packs, in their order."""

    @staticmethod
    def fit(
        states: States, positions: tuple[str, ...], harmless: NDArray[np.float64]
    ) -> Categories:
        """Fit a direction for every category that has enough harmful prompts.

        Args:
            states: Labelled, at the layers of the guard's probe.
            positions: Those of the guard's probe.
            harmless: The guard's own scores of harmless prompts, cross-fitted.
        """
        prompts = states.prompts
        values = slots(states, positions)
        category = [p.category if p.harmful else None for p in prompts]
        counts = {name: category.count(name) for name in category if name is not None}
        names = sorted(name for name, count in counts.items() if count >= MIN_PROMPTS)
        none = Directions((), torch.zeros(0, *values.shape[1:]), torch.zeros(0))
        directions = none
        if len(names) > 1:
            members = {name: [own == name for own in category] for name in names}
            groups = [p.fold_group for p in prompts]
            directions = fit_directions(values, members, groups).directions
        return Categories(positions, directions, ScoreScale.of(harmless), {}, none)

    def with_pack(self, pack: Pack, direction: Directions) -> Categories:
        """These categories and one more, that can flag."""
        packs = {**self.packs, direction.names[0]: pack}
        return replace(self, packs=packs, pack_directions=self.pack_directions.join(direction))

    def without_pack(self, name: str) -> Categories:
        """These categories but one pack."""
        packs = {other: pack for other, pack in self.packs.items() if other != name}
        directions = self.pack_directions.only(tuple(packs))
        return replace(self, packs=packs, pack_directions=directions)

    @property
    def training_prompts(self) -> TrainingPrompts:
        """The user's harmless prompts that packs were trained on, which never calibrate."""
        every = TrainingPrompts()
        for pack in self.packs.values():
            every |= pack.training_prompts
        return every

    def pack_scores(self, states: States) -> Float[Tensor, "n c"]:
        """The score of each pack on the scale of the guard's own score, float64."""
        odds = self.pack_directions(slots(states, self.positions)).double()
        converted = [
            pack.scale.convert(odds[:, i], self.scale) for i, pack in enumerate(self.packs.values())
        ]
        return torch.stack(converted, dim=-1)

    def cut_off(self, name: str, threshold: float) -> float:
        """The probability of a pack from which on it flags, at the guard's threshold."""
        own = torch.tensor([threshold], dtype=torch.float64)
        return float(expit(self.scale.convert(own, self.packs[name].scale).item()))

    def measure(self, states: States) -> list[CategoryScores]:
        """How near each of n states is to each category and pack."""
        every = self.directions.join(self.pack_directions) if self.packs else self.directions
        if not every.names:
            return [CategoryScores({})] * len(states)
        probabilities = expit(every(slots(states, self.positions)).double().numpy())
        scores = [_greatest(every.names, row.tolist()) for row in probabilities]
        if not self.packs:
            return [CategoryScores(own) for own in scores]
        highest, which = self.pack_scores(states).max(-1)
        names = [self.pack_directions.names[n] for n in which.tolist()]
        return list(map(CategoryScores, scores, names, highest.tolist()))

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        record = {
            "positions": self.positions,
            "names": self.directions.names,
            "packs": {name: asdict(pack) for name, pack in self.packs.items()},
            "scale": asdict(self.scale),
        }
        both = self.directions.join(self.pack_directions)
        return record, {"weight": both.weight, "bias": both.bias}

    @staticmethod
    def from_dict(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Categories:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        names = tuple(record["names"])
        weight = tensors["weight"]
        bias = tensors["bias"]
        packs = {name: Pack.from_dict(own) for name, own in record["packs"].items()}
        is_whole = weight.ndim == 3 and len(weight) == len(bias) == len(names) + len(packs)
        if not is_whole or not all(torch.isfinite(t).all() for t in (weight, bias)):
            raise ValueError("the directions of the categories are damaged")
        count = len(names)
        return Categories(
            positions=tuple(record["positions"]),
            directions=Directions(names, weight[:count], bias[:count]),
            scale=ScoreScale.from_dict(record["scale"]),
            packs=packs,
            pack_directions=Directions(tuple(packs), weight[count:], bias[count:]),
        )

    def notes(self) -> list[str]:
        """Paragraphs for the model card."""
        names = ", ".join(map(_with_code, self.directions.names))
        nearest = [f"Names the nearest of these risk categories: {names}."] if names else []
        return nearest + [
            f"Category pack `{name}`: fitted on {pack.examples} harmful and {pack.harmless} "
            "harmless prompts; it can flag by itself, and the promise covers it."
            for name, pack in self.packs.items()
        ]


def nearest_category(
    categories: CategoryScores | None, *, score: float, flagged: bool
) -> str | None:
    """The likely category of a prompt; None if none is known.

    A flagged prompt whose score is a pack's is named for the pack.
    """
    if categories is None or not categories.scores:
        return None
    pack_score = categories.pack_score
    if flagged and pack_score is not None and pack_score >= score:
        return categories.pack
    return max(categories.scores, key=lambda name: categories.scores[name])


def _greatest(names: Sequence[str], probabilities: Sequence[float]) -> dict[str, float]:
    """The probability of each name; of a pack with the name of a category, the greater."""
    scores = dict[str, float]()
    for name, probability in zip(names, probabilities, strict=True):
        scores[name] = max(probability, scores.get(name, 0.0))
    return scores


def _with_code(name: str) -> str:
    code = HAZARDS[name][0] if name in HAZARDS else None
    return f"{name} ({code})" if code else name
