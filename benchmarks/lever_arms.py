"""The arms of ``reading_levers.py``: each is fitted on the training rows alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lever_probes import (
    Array,
    LowRankProbe,
    Selection,
    Setting,
    SlotStates,
    TokenProbe,
    TokenStates,
    class_weights,
    select_hard_rows,
    select_ridge,
    select_trained,
)
from torch import Tensor

from latentguard.data.surface_audit import ngram_scores
from latentguard.probes.axis import Axis
from latentguard.probes.probe import Probe, centroid, fit_linear, random_probes
from latentguard.probes.ridge import folds_of
from latentguard.prompts import Prompt
from latentguard.states import digest_prompts
from latentguard.stats.detection import auroc


@dataclass(frozen=True, eq=False)
class ReadRows:
    """Labelled prompts with what the model held."""

    prompts: tuple[Prompt, ...]
    """The n prompts."""

    states: Float[Tensor, "n p l d"]
    """At the positions and layers of the default rule."""

    tokens: TokenStates | None = None
    """At the instruction's tokens, in three of these layers."""

    variants: Mapping[str, ReadRows] = field(default_factory=dict)
    """The same prompts, or the first of them, in other surroundings."""

    @property
    def labels(self) -> Tensor:
        """True for harmful, [n]."""
        return torch.tensor([bool(p.harmful) for p in self.prompts])

    @property
    def slots(self) -> Float[Tensor, "n s d"]:
        """Each position in turn, each layer in turn."""
        return self.states.flatten(1, 2)


Score = Callable[[ReadRows], Array]


@dataclass(frozen=True, eq=False)
class Arm:
    """A way of reading, fitted."""

    name: str
    """Its name in the record."""

    score: Score
    """Scores of labelled rows, [n]."""

    held_out: Array | None = None
    """Scores of the training rows by probes that did not see their fold, [n]."""

    choices: Mapping[str, Any] = field(default_factory=dict)
    """What was chosen, and how many choices were tried."""

    reads: int = 1
    """How often a prompt is read."""


DEFAULT = "default"

HEADS, RANKS = 4, (1, 4, 16)
"""Heads of a probe over tokens; ranks that are tried."""

RATES = (0.01, 0.04)
"""Learning rates that are tried, times the root of the width."""

TOKEN_SLOTS = ((1,), (0, 1, 2))
"""Token layers that are tried: the middle one, or all three."""


def score_plain(probe: Probe, rows: ReadRows) -> Array:
    """Scores of prompts as they are."""
    return np.asarray(probe(rows.slots).double().numpy())


def score_mean(probe: Probe, rows: ReadRows) -> Array:
    """Mean scores over prompts as they are and in every other surroundings."""
    every = [rows, *rows.variants.values()]
    return np.asarray(np.mean([score_plain(probe, one) for one in every], axis=0))


def correlation(targets: Array, scores: Array) -> float:
    """Pearson's."""
    return float(np.corrcoef(targets, scores)[0, 1])


class Training:
    """The training rows, and the arms that are fitted on them."""

    def __init__(
        self, rows: ReadRows, layers: Sequence[int], teacher: Mapping[str, float] | None = None
    ) -> None:
        """Fit the default rule, with which most arms begin."""
        self.rows = rows
        self.layers = tuple(layers)
        self.teacher = teacher or {}
        self.labels = rows.labels
        self.groups = [p.fold_group for p in rows.prompts]
        self.folds = folds_of(self.groups)
        slots = self.layers * rows.states.shape[1]
        self.fit = fit_linear(rows.slots, self.labels.tolist(), self.groups, slots)
        self.probe: Probe = self.fit.probe

    def key_of(self, name: str) -> str:
        """The name of a file for the scores of some arms; other inputs give another name."""
        inputs: dict[str, Any] = {
            "teacher": sorted(self.teacher.items()),
            "surroundings": [digest_prompts(v.prompts) for v in self.rows.variants.values()],
        }
        prompts = digest_prompts(self.rows.prompts)
        text = json.dumps([name, prompts, self.layers, inputs.get(name)])
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{name.replace(' ', '-')}-{digest[:16]}"

    def default(self) -> Iterator[Arm]:
        """The present default rule."""
        choices = {**self.fit.choices, "tried": 3}
        yield Arm(DEFAULT, partial(score_plain, self.probe), self.fit.held_out, choices)

    def pooled_tokens(self, pooling: str) -> Iterator[Arm]:
        """A probe over the instruction's tokens."""
        assert self.rows.tokens is not None
        mean, spread = self.rows.tokens.moments()
        tokens = self.rows.tokens.standardise(mean, spread)
        width = tokens.values.shape[2]
        heads = 1 if pooling == "mean" else HEADS
        settings = [Setting(heads, rate, slots) for slots in TOKEN_SLOTS for rate in RATES]
        setting, chosen = select_trained(
            lambda one: TokenProbe(width * len(one.slots), pooling, one.size),
            lambda one: tokens.layer(one.slots),
            self.labels,
            self.folds,
            settings,
        )

        def score(rows: ReadRows) -> Array:
            assert rows.tokens is not None
            own = rows.tokens.standardise(mean, spread)
            return chosen.score(own.layer(setting.slots))

        yield Arm(f"tokens: {pooling}", score, chosen.held_out, chosen.choices)

    def low_rank(self) -> Iterator[Arm]:
        """A probe of low rank over positions, layers and width."""
        mean = self.rows.states.float().mean(0)
        spread = self.rows.states.float().std(0).clamp_min(1e-4)
        inputs = SlotStates((self.rows.states.float() - mean) / spread)
        shape = tuple(self.rows.states.shape[1:])
        _, chosen = select_trained(
            lambda one: LowRankProbe(shape, one.size),
            lambda one: inputs,
            self.labels,
            self.folds,
            [Setting(rank, rate) for rank in RANKS for rate in RATES],
        )

        def score(rows: ReadRows) -> Array:
            return chosen.score(SlotStates((rows.states.float() - mean) / spread))

        yield Arm("low rank", score, chosen.held_out, chosen.choices)

    def hard_rows(self) -> Iterator[Arm]:
        """More weight on rows that the default rule gets wrong or nearly wrong."""
        strength = float(self.fit.choices["strength"])
        states, held_out = self.rows.slots, self.fit.held_out
        one = select_hard_rows(states, self.labels, self.folds, held_out, strength)
        yield self.ridge_arm("hard rows", one)

    def surroundings(self) -> Iterator[Arm]:
        """Prompts read in several surroundings: in training, when a prompt is judged, or both."""
        variants = self.rows.variants
        if not variants:
            return
        every = [self.rows, *variants.values()]
        prompts = [p for rows in every for p in rows.prompts]
        fit = fit_linear(
            torch.cat([rows.slots for rows in every]),
            [bool(p.harmful) for p in prompts],
            [self.group_of[p.id] for p in prompts],
            self.layers * self.rows.states.shape[1],
        )
        reads = len(every)
        choices = {**fit.choices, "tried": 3, "variants": list(variants), "rows": len(prompts)}
        yield Arm("variants: fit", partial(score_plain, fit.probe), None, choices)
        yield Arm("variants: fit and read", partial(score_mean, fit.probe), None, choices, reads)
        yield Arm("variants: read", partial(score_mean, self.probe), None, {}, reads)

    @property
    def group_of(self) -> dict[str, str]:
        """What each prompt shares with those in its fold, in whatever surroundings."""
        return {p.id: group for p, group in zip(self.rows.prompts, self.groups, strict=True)}

    def distilled(self) -> Iterator[Arm]:
        """Ridges on a teacher's scores, on the labels of the same rows, and on the mean of both."""
        kept = [i for i, p in enumerate(self.rows.prompts) if p.id in self.teacher]
        if not kept:
            return
        scores = torch.tensor([self.teacher[self.rows.prompts[i].id] for i in kept])
        scores = (scores - scores.mean()) / scores.std()
        labels = self.labels[kept]
        signs = labels.float() * 2 - 1
        states, folds = self.rows.slots[kept], folds_of([self.groups[i] for i in kept])
        even, balanced = torch.ones(len(kept)), class_weights(labels)
        by_label = partial(auroc, labels.numpy())
        by_teacher = partial(correlation, scores.numpy())
        plans = {
            "teacher: labels of its rows": (signs, balanced, by_label),
            "teacher: scores": (scores, even, by_teacher),
            "teacher: labels and scores": ((signs + scores) / 2, balanced, by_label),
        }
        for name, (targets, weights, quality) in plans.items():
            chosen = select_ridge(states, targets, weights, folds, quality)
            yield self.ridge_arm(name, chosen, rows=len(kept))

    def ridge_arm(self, name: str, chosen: Selection, **facts: int) -> Arm:
        """The arm of a ridge."""
        choices = {**chosen.choices, **facts}
        return Arm(name, lambda rows: chosen.score(rows.slots), chosen.held_out, choices)

    def baselines(self) -> Iterator[Arm]:
        """n-grams, the paper's rule on the same rows and layers, and random directions."""
        known = list(self.rows.prompts)
        yield Arm("n-grams", lambda rows: ngram_scores(known, rows.prompts))
        paper = self.paper_rule()
        yield Arm("the paper's rule", lambda rows: paper(rows.states[:, 0]).double().numpy())
        yield Arm("random direction", self.score_random)

    def paper_rule(self) -> Probe:
        """Centroids at t_inst."""
        at_inst = self.rows.states[:, 0].double()
        poles = [at_inst[self.labels == side].mean(0).float() for side in (True, False)]
        counts = int(self.labels.sum()), int((~self.labels).sum())
        return centroid(Axis("harmful", "t_inst", self.layers, *poles, counts))

    def score_random(self, rows: ReadRows) -> Array:
        """The random direction of median AUROC among five, each in its better direction."""
        labels = rows.labels.numpy()
        draws = [probe(rows.slots).double().numpy() for probe in random_probes(self.probe, 5)]
        draws = [one if auroc(labels, one) >= 0.5 else -one for one in draws]
        return np.asarray(sorted(draws, key=partial(auroc, labels))[2])


ARMS: dict[str, Callable[[Training], Iterator[Arm]]] = {
    "baselines": Training.baselines,
    "default": Training.default,
    "mean": partial(Training.pooled_tokens, pooling="mean"),
    "attention": partial(Training.pooled_tokens, pooling="attention"),
    "max": partial(Training.pooled_tokens, pooling="max"),
    "low rank": Training.low_rank,
    "hard rows": Training.hard_rows,
    "surroundings": Training.surroundings,
    "teacher": Training.distilled,
}
"""Name on the command line -> what fits the arms."""
