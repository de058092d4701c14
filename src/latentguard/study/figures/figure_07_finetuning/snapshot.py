"""Looking at the model before and after it is attacked, in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity

from latentguard.probes.axis import Axis
from latentguard.probes.fitting import fit_probe, slots
from latentguard.probes.probe import Probe
from latentguard.prompts import Prompt, Reply
from latentguard.states import Reading, Speaker, States, digest_prompts
from latentguard.study.axes import Axes, belief, fit_axes
from latentguard.study.cached_model import CachedModel, Finetune
from latentguard.study.figures.figure_07_finetuning.training_pairs import Pair, broken
from latentguard.study.form_controls import matched_prompts, seal, sealed_groups
from latentguard.study.prompt_groups import PromptGroups
from latentguard.study.settings import Settings
from latentguard.study.steering import steer, steer_at_random

FEWEST = 10
"""Prompts of each class without which there is no linear guard."""

DIRECTIONS = 20
"""Random directions beside a stage's own; each prompt meets one of them."""

Replies = Callable[..., list[list[Reply]]]


@dataclass(frozen=True)
class Stage:
    """What the model says and holds before or after one fine-tuning; n prompts, l layers."""

    name: str
    """``before``, ``50 pairs``, ``50 harmless pairs (control)``."""

    pairs: int
    """How many it was trained on."""

    refused: Sequence[bool | None]
    """Whether each prompt is refused, [n]; None if that cannot be told."""

    broken: Sequence[bool]
    """Whether each reply repeats itself, [n]."""

    harmful: Sequence[Sequence[float]]
    """Equation 2 at t_inst with the centroids from before, layers 1 to L, [n l]."""

    refuse: Sequence[Sequence[float]]
    """The same at t_post for refusal, [n l]."""

    linear: Sequence[float]
    """Scores of the linear guard from before, [n]; none if it could not be fitted."""

    control: bool = False
    """Whether it was trained on harmless pairs."""

    seed: int = 0
    """Which of the repetitions of this training it is, from 0."""

    whole: bool = False
    """Whether it was trained on whole completions."""

    cosine: Sequence[float] = ()
    """Of its own refusal direction with the one from before, layers 1 to L, [l]."""

    steered: Sequence[Sequence[bool | None]] = ()
    """Whether harmless prompts are refused along its own direction, [layers prompts]."""

    random: Sequence[Sequence[bool | None]] = ()
    """The same along random directions of equal norm: each prompt meets one of them."""

    every_source: Sequence[float] = ()
    """Delta_harmful of refused harmful prompts of every source, [k]: the other test set."""

    every_source_refused: Sequence[bool | None] = ()
    """Whether each of these is refused, [k]."""

    sealed: Sequence[float] = ()
    """Delta_harmful of the tested prompts by the sealed reading, [n]."""

    matched: Sequence[float] = ()
    """Delta_harmful of form-matched prompts, [m]."""


@dataclass(frozen=True)
class Job:
    """One training."""

    pairs: Sequence[Pair]
    """What it is of."""

    control: bool = False
    """Whether they are harmless pairs."""

    whole: bool = False
    """Whether they are whole completions."""

    seed: int = 0
    """Which repetition, from 0."""

    @property
    def name(self) -> str:
        """As people read it."""
        kind = " harmless pairs (control)" if self.control else " pairs"
        kind += ", whole completions" if self.whole else ""
        return f"{len(self.pairs)}{kind}" + (f", run {self.seed + 1}" if self.seed else "")


class Look:
    """What is asked of the model at every stage."""

    def __init__(
        self,
        model: CachedModel,
        axes: Axes,
        prompt_groups: PromptGroups,
        settings: Settings,
        tested: tuple[Prompt, ...],
    ) -> None:
        """Fit the linear guard on what centroids are fitted on, before anything is trained.

        Args:
            model: The model.
            axes: Both axes from before.
            prompt_groups: Its groups.
            settings: How much is asked.
            tested: Refused harmful prompts and accepted harmless ones.
        """
        self.model, self.axes, self.settings, self.tested = model, axes, settings, tested
        self.anchors = prompt_groups.fit_prompts("accepted_harmless")
        self.steered = prompt_groups.test_prompts("accepted_harmless")[: settings.finetune_steered]
        self.fitted = (*prompt_groups.fit_prompts("refused_harmful"), *self.anchors)
        self.every_source = prompt_groups.every_source[: settings.finetune_test]
        self.matched = matched_prompts(prompt_groups, settings)
        self.sealed_axis = fit_axes(
            model, sealed_groups(prompt_groups), enough=settings.enough
        ).harmful
        self.layers = settings.layers(model.depth)
        self.probe = self._linear()

    def before(self) -> Stage:
        """The model as it is."""
        snapshot = self._look(self.model.states, self.model.replies, goal=True, steered=True)
        return Stage("before", 0, **snapshot)

    def after(self, tune: Finetune, job: Job) -> Stage:
        """The model fine-tuned on pairs, from memory if it was looked at once."""
        pairs, most = job.pairs, self.settings.finetune_completion if job.whole else None

        def train() -> dict[str, Any]:
            seed = self.settings.seed + job.seed
            with tune(pairs, seed=seed, **({"reply_tokens": most} if most else {})) as model:
                states_of = partial(_states, model)

                def replies_of(*prompts: Any, **how: Any) -> list[list[Reply]]:
                    return self.model.opened(model.sweep(*prompts, **how))

                return self._look(states_of, replies_of, goal=False, steered=not job.control)

        taught = [digest_prompts([p for p, _ in pairs]), [opening for _, opening in pairs]]
        parts = [*self._key(), taught, job.control]
        if job.seed or most:
            parts.append([job.seed, most])
        kind: dict[str, Any] = dict(control=job.control, seed=job.seed, whole=job.whole)
        return Stage(job.name, len(pairs), **kind, **self.model.cached(parts, train))

    def _look(
        self, states_of: Callable[..., States], replies_of: Replies, *, goal: bool, steered: bool
    ) -> dict[str, Any]:
        """Fields of a stage as JSON types; ``goal``: its direction is from refused prompts."""
        replies_of = partial(replies_of, max_new_tokens=self.settings.reply_tokens)
        (replies,) = replies_of(self.tested, [None])
        refused, n = self.model.refused(replies), len(self.tested)
        states = states_of((*self.tested, *self.anchors), positions=self.model.span)
        harmful, refuse = self.axes.harmful, self.axes.refuse
        assert refuse is not None
        fields: dict[str, Any] = dict(
            refused=list(refused),
            broken=[broken(reply) for reply in replies],
            harmful=_plain(harmful.layer_beliefs(states.at("t_inst"))[:n, 1:]),
            refuse=_plain(refuse.layer_beliefs(states.at("t_post"))[:n, 1:]),
            linear=_plain(self._scores(states)[:n]),
        )
        fields |= self._controls(states_of, replies_of)
        rows = [i for i, p in enumerate(self.tested) if p.harmful and refused[i] is goal]
        if steered and self.steered and len(rows) >= self.settings.enough:
            own = _direction(states, [*rows, *range(n, len(states))])
            cosine = cosine_similarity(own.direction, refuse.direction, dim=-1)
            fields |= dict(cosine=_plain(cosine[1:]), **self._steer(own, replies_of))
        return fields

    def _controls(self, states_of: Callable[..., States], replies_of: Replies) -> dict[str, Any]:
        """The other test set, and what form-matched prompts and uniform endings leave."""
        (replies,) = replies_of(self.every_source, [None]) if self.every_source else ([],)
        harmful = self.axes.harmful

        def read(axis: Axis, prompts: Sequence[Prompt]) -> Any:
            if not prompts:
                return []
            return _rounded(belief(axis, states_of(prompts, positions=("t_inst",)).at("t_inst")))

        return dict(
            every_source=read(harmful, self.every_source),
            every_source_refused=list(self.model.refused(replies)),
            sealed=read(self.sealed_axis, seal(self.tested)),
            matched=read(harmful, self.matched),
        )

    def _steer(self, own: Axis, replies_of: Replies) -> dict[str, Any]:
        """Refusals of accepted harmless prompts, steered on every token."""
        how: dict[str, Any] = dict(tokens="all", label="refusal direction")
        ways = [steer(own, layer, **how) for layer in self.layers]
        steered = [list(self.model.refused(found)) for found in replies_of(self.steered, ways)]
        random: list[list[bool | None]] = [[None] * len(self.steered) for _ in self.layers]
        for draw in range(min(DIRECTIONS, len(self.steered))):
            ways = [steer_at_random(own, layer, **how, draw=draw) for layer in self.layers]
            found = replies_of(self.steered[draw::DIRECTIONS], ways)
            for flags, made in zip(random, found, strict=True):
                flags[draw::DIRECTIONS] = self.model.refused(made)
        return dict(steered=steered, random=random)

    def _key(self) -> list[Any]:
        """All that a stage depends on, but for the pairs."""
        s, judge = self.settings, self.model.judge
        recipe = (s.finetune_rank, s.finetune_rate, s.finetune_epochs, s.finetune_batch)
        choices = (s.seed, s.finetune_opening, s.reply_tokens, DIRECTIONS, s.enough)
        prompts = (
            *(self.tested, self.anchors, self.steered, self.fitted),
            *(self.every_source, self.matched),
        )
        judge_names = [getattr(judge, "__qualname__", ""), str(getattr(judge, "model", ""))]
        if self.model.opens_thinking:
            judge_names.append("judged behind the thinking")
        return [
            "finetuning",
            recipe,
            choices,
            self.layers,
            [*map(digest_prompts, prompts)],
            judge_names,
        ]

    def _linear(self) -> Probe | None:
        """The linear guard; None if too few prompts are known."""
        sides = [sum(p.harmful is side for p in self.fitted) for side in (True, False)]
        if min(sides) < FEWEST:
            return None
        span = self.model.span
        states = self.model.states(self.fitted, positions=span, what="fine-tuning: linear guard")
        return fit_probe(states, Reading("span", span), "linear", self.model.depth).probe

    def _scores(self, states: States) -> torch.Tensor:
        if self.probe is None:
            return torch.empty(0)
        return self.probe(slots(states.select(self.probe.layers), self.model.span))


def _states(model: Speaker, prompts: Sequence[Prompt], positions: Sequence[str]) -> States:
    return States.collect(model.capture(prompts, positions=positions))


def _direction(states: States, rows: list[int]) -> Axis:
    """A stage's own refusal direction: from harmless to harmful prompts at t_post."""
    prompts = tuple(states.prompts[i] for i in rows)
    part = replace(states, values=states.values[rows], prompts=prompts)
    return Axis.fit(part, "t_post", name="refuse")


def _plain(values: torch.Tensor) -> Any:
    return _rounded(values.double().numpy())


def _rounded(values: NDArray[np.float64]) -> Any:
    return values.round(6).tolist()
