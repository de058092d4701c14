"""Asking the inversion questions, steered in every way.

The harmfulness direction is added to the tokens before the question, the refusal direction to
every token and, with the first question, to those before the question alone (Figure 10).

Small models do not answer every question sensibly; the paper takes another template for another
model (appendix E.2). Here all four are asked unsteered, and that which is answered best comes
first: it alone is asked beside random directions, and claims are decided by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latentguard.interventions import Tokens
from latentguard.prompts import Prompt, Reply
from latentguard.study.axes import Axes, Which, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.judge import Answer, answer
from latentguard.study.prompt_groups import (
    QUESTIONS,
    PromptGroups,
    inversion_prompt,
    sample_prompts,
)
from latentguard.study.settings import Settings
from latentguard.study.steering import Steering, steer_each

NAMES = ("Table 2", "Table 6, first", "Table 6, second", "Table 7")
"""Where the paper prints each of ``QUESTIONS``."""

WORDS = ("Certainly", "No")
"""Answers whose probability as first word is noted."""

CALLED: dict[Which, str] = {"harmful": "harmfulness", "refuse": "refusal"}
"""Names of the directions."""


@dataclass(frozen=True)
class Side:
    """Instructions of one label: what is answered of them, and what should turn it."""

    name: str
    """``harmful`` or ``harmless``."""

    right: Answer
    """The right answer."""

    wrong: Answer
    """The answer that it is to be turned to."""

    sign: int
    """Sign of the coefficient that should do it."""


SIDES = (Side("harmful", "certainly", "no", -1), Side("harmless", "no", "certainly", 1))


@dataclass(frozen=True)
class Task:
    """One question, about the instructions of one label."""

    side: Side
    """The label."""

    question: str
    """Its name."""

    unsteered: NDArray[np.str_]
    """Answers, [n]."""

    odds: NDArray[np.float64]
    """Log-odds of 'Certainly' against 'No' as first word, [n]."""

    answers: Mapping[Steering, NDArray[np.str_]]
    """Answers when steered, [draws layers n]; nothing if this question is not steered."""

    steered_odds: Mapping[Steering, NDArray[np.float64]]
    """Log-odds when steered, [draws layers n]."""

    own_answers: Mapping[Steering, NDArray[np.str_]] = field(default_factory=dict)
    """Answers when steered as the program's own judge takes them, where another one decides."""

    own_unsteered: NDArray[np.str_] | None = None
    """The same of those that are not steered."""

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which instructions are answered right when they are not steered, [n]."""
        is_right: NDArray[np.bool_] = self.unsteered == self.side.right
        return is_right


@dataclass(frozen=True)
class Records:
    """Answers to every question, and where the refusal direction acts."""

    layers: tuple[int, ...]
    """Where prompts are steered, one layer at a time."""

    tasks: tuple[Task, ...]
    """By question, that which is answered best first; of each question, harmful first."""

    refused: Mapping[str, NDArray[np.float64]]
    """Label -> whether the same instructions, asked as they are, are refused with the refusal
    direction added as it is in the task, [layers n]; nan where the reply is empty or cut. Only
    labels whose instructions are all refused harmful, or accepted harmless, ones."""

    by_chance: Mapping[str, NDArray[np.float64]]
    """The same with random directions as long in its place, [draws layers n]."""

    note: str
    """What the directions were fitted on."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Ask every question about held-out instructions of both labels, steered in every way."""
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    instructions = {side: _instructions(prompt_groups, side, settings) for side in SIDES}
    tasks = [
        _task(model, instructions[side], _Steering(side, number, rank), axes, settings)
        for rank, number in enumerate(_ranked(model, instructions, settings))
        for side in SIDES
    ]
    plain = {
        side.name: _plain(model, side, prompts, axes, settings)
        for side, prompts in instructions.items()
        if axes.refuse is not None and prompts and all(p.refused is p.harmful for p in prompts)
    }
    refused, by_chance = ({name: of[k] for name, of in plain.items()} for k in (0, 1))
    return Records(settings.layers(model.depth), tuple(tasks), refused, by_chance, axes.note)


def along(of: Which, coefficient: float, *, before: bool = False) -> Steering:
    """A direction on the tokens that the paper steers, or on those before the question alone."""
    name = ("reverse " if coefficient < 0 else "") + CALLED[of]
    if of == "refuse" and before:
        name += ", before the question"
    return Steering(name, of, coefficient, "before" if before or of == "harmful" else "all")


def chance(of: Which, settings: Settings) -> Steering:
    """Random directions as long as a direction, on the same tokens."""
    tokens: Tokens = "before" if of == "harmful" else "all"
    name = f"random, norm of {CALLED[of]}"
    return Steering(name, of, settings.inversion_coefficient, tokens, settings.random_draws)


def _instructions(prompt_groups: PromptGroups, side: Side, settings: Settings) -> list[Prompt]:
    """Held-out refused harmful or accepted harmless prompts; all of the label if those are few."""
    harmful = side.name == "harmful"
    usual = prompt_groups.test_prompts("refused_harmful" if harmful else "accepted_harmless")
    every = [p for group in prompt_groups.test.values() for p in group if p.harmful is harmful]
    members = usual if len(usual) >= settings.enough else every
    return sample_prompts(members, settings.inverted, seed=settings.seed)


def _ranked(
    model: CachedModel, instructions: Mapping[Side, Sequence[Prompt]], settings: Settings
) -> list[int]:
    """Numbers of the questions, best answered unsteered first: mean over the labels."""
    right = []
    for question in QUESTIONS:
        shares = []
        for side, prompts in instructions.items():
            (replies,) = model.replies(
                [inversion_prompt(p, question) for p in prompts],
                what=f"unsteered: {side.name} instructions",
                max_new_tokens=settings.inversion_tokens,
                watch=WORDS,
            )
            shares += [np.mean([model.answer(r) == side.right for r in replies])] if replies else []
        right.append(float(np.mean(shares)) if shares else 0.0)
    return sorted(range(len(QUESTIONS)), key=lambda number: -right[number])


@dataclass(frozen=True)
class _Steering:
    """What a task is about."""

    side: Side
    number: int
    """Of the question in ``QUESTIONS``."""

    rank: int
    """Of the question among those that are asked."""

    def ways(self, settings: Settings) -> list[Steering]:
        """Both directions and signs; with the first question also what they are compared with."""
        if self.rank >= settings.inversion_templates:
            return []
        both = (settings.inversion_coefficient, -settings.inversion_coefficient)
        ways = [along(of, c) for of in CALLED for c in both]
        if self.rank == 0:
            ways += [along("refuse", c, before=True) for c in both]
            ways += [along("harmful", self.side.sign * c) for c in settings.inversion_others]
            ways += [chance(of, settings) for of in CALLED]
        return list(dict.fromkeys(ways))


def _task(
    model: CachedModel, prompts: Sequence[Prompt], of: _Steering, axes: Axes, settings: Settings
) -> Task:
    unsteered, steered = steer_each(
        model,
        [inversion_prompt(p, QUESTIONS[of.number]) for p in prompts],
        of.ways(settings),
        axes,
        settings.layers(model.depth),
        what=f"{NAMES[of.number]}: {of.side.name} instructions",
        max_new_tokens=settings.inversion_tokens,
        watch=WORDS,
    )
    own = model.answer is not answer
    return Task(
        of.side,
        NAMES[of.number],
        np.array([model.answer(reply) for reply in unsteered]),
        np.array(_odds(unsteered)),
        _each(steered, model.answer),
        {w: np.array([[_odds(r) for r in d] for d in draws]) for w, draws in steered.items()},
        _each(steered, answer) if own else {},
        np.array(list(map(answer, unsteered))) if own else None,
    )


def _plain(
    model: CachedModel, side: Side, prompts: Sequence[Prompt], axes: Axes, settings: Settings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ask the instructions as they are, along the refusal direction that should turn them, [layers
    n], and along chance, [draws layers n].
    """
    _, steered = steer_each(
        model,
        prompts,
        [along("refuse", side.sign * settings.inversion_coefficient), chance("refuse", settings)],
        axes,
        settings.layers(model.depth),
        what=f"Figure 5: {side.name} instructions as they are",
        max_new_tokens=settings.reply_tokens,
    )
    found, none = (
        np.array([[model.refused(of) for of in draw] for draw in draws], dtype=float)
        for draws in steered.values()
    )
    return found[0], none


def _each(
    steered: Mapping[Steering, Sequence[Sequence[Sequence[Reply]]]],
    says: Callable[[Reply], Answer],
) -> dict[Steering, NDArray[np.str_]]:
    """What each reply is, [draws layers n]."""
    return {
        way: np.array([[list(map(says, replies)) for replies in draw] for draw in draws])
        for way, draws in steered.items()
    }


def _odds(replies: Sequence[Reply]) -> list[float]:
    watched = (dict(reply.watched) for reply in replies)
    return [one[WORDS[0]] - one[WORDS[1]] for one in watched]
