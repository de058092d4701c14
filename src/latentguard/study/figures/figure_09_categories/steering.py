"""Steering prompts of one risk category with each category's direction (Figure 9b).

Axis names in shapes: c categories, n tested prompts, a directions, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentguard.interventions import Intervention
from latentguard.probes.axis import Axis
from latentguard.prompts import Group, Prompt, Reply
from latentguard.report.charts import heat_map
from latentguard.report.document import Cell, Figure, Table
from latentguard.states import States
from latentguard.stats.rates import proportion
from latentguard.study.axes import fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.figures.figure_09_categories.category_cosines import Array
from latentguard.study.finding import cells
from latentguard.study.prompt_groups import (
    QUESTIONS,
    PromptGroups,
    inversion_prompt,
    is_fit_side,
    sample_prompts,
)
from latentguard.study.settings import Settings
from latentguard.study.steering import random_like, steer

WORDS = ("Certainly", "No")
HARMFUL: tuple[Group, ...] = ("refused_harmful", "accepted_harmful")


@dataclass(frozen=True, eq=False)
class Steered:
    """Prompts of each category in the inversion task, steered away from harmful."""

    question: int
    """Which of the inversion questions; the one that other harmful prompts are answered best."""

    layer: int
    """Where; chosen on those prompts too, with the harmfulness direction of the whole study."""

    tested: NDArray[np.intp]
    """Category of each of the n prompts."""

    along: tuple[str, ...]
    """The a directions: each category's in order, then average, random and unsteered."""

    no: Array
    """Whether each prompt is answered No, [a n]; the mean over the draws for random."""

    odds: Array
    """log P(No) - log P(Certainly) as first word, [a n]."""

    length: float
    """Of the average direction, over the mean length of the categories'."""

    @property
    def open(self) -> NDArray[np.bool_]:
        """Which prompts are not answered No anyway, and so can be flipped, [n]."""
        is_open: NDArray[np.bool_] = self.no[-1] == 0
        return is_open


def steer_categories(
    model: CachedModel,
    prompt_groups: PromptGroups,
    settings: Settings,
    every: Mapping[str, Sequence[Prompt]],
    base: States,
) -> Steered:
    """Fit directions on one half of each category, and steer the other half with all of them."""
    sides = [halves(members) for members in every.values()]
    others = _others(prompt_groups, settings, {p.text for _, test in sides for p in test})
    question = _question(model, others, settings)
    sentence = QUESTIONS[question]
    tested = [(c, inversion_prompt(p, sentence)) for c, (_, test) in enumerate(sides) for p in test]
    axis = fit_axes(model, prompt_groups, enough=settings.enough).harmful
    layer = _layer(model, [inversion_prompt(p, sentence) for p in others], axis, settings)
    fitted = model.states([p for fit, _ in sides for p in fit], what="states: risk categories")
    labels = np.repeat(np.arange(len(sides)), [len(fit) for fit, _ in sides])
    states = fitted.at("t_inst")[:, layer].double()
    means = torch.stack([states[labels == c].mean(0) for c in range(len(sides))])
    directions = (means - base.at("t_inst")[:, layer].double().mean(0)).float()
    names = (*every, "average", *["random"] * settings.random_draws)
    vectors = [*directions, directions.mean(0), *_random(directions, settings.random_draws)]
    how: list[Intervention | None] = [
        Intervention(layer, vector, -settings.inversion_coefficient, "before", name)
        for name, vector in zip(names, vectors, strict=True)
    ]
    replies = model.replies(
        [p for _, p in tested],
        [*how, None],
        what="Figure 9: steering",
        max_new_tokens=settings.inversion_tokens,
        watch=WORDS,
    )
    no, odds = (
        _table(replies, of, len(every)) for of in (lambda r: model.answer(r) == "no", _odds)
    )
    along = (*every, "average", "random", "unsteered")
    length = float(directions.mean(0).norm() / directions.norm(dim=1).mean().clamp(min=1e-12))
    return Steered(question, layer, np.array([c for c, _ in tested]), along, no, odds, length)


def own_and_others(tested: NDArray[np.intp], values: Array) -> tuple[Array, Array]:
    """What the own direction does to each prompt, [n], and the mean of the other categories', [n].

    Args:
        tested: Category of each prompt, [n].
        values: What each category's direction does to each prompt, [c n].
    """
    own = values[tested, np.arange(len(tested))]
    others = (values.sum(0) - own) / (len(values) - 1)
    return own, others


def halves(members: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Half of the prompts for the direction, first those that a centroid may hold; half to test."""
    ordered = sorted(members, key=lambda p: not is_fit_side(p))
    return ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]


def _others(prompt_groups: PromptGroups, settings: Settings, tested: set[str]) -> list[Prompt]:
    """Held-out harmful prompts that are not tested here."""
    harmful = [p for g in HARMFUL for p in prompt_groups.test_prompts(g) if p.text not in tested]
    return sample_prompts(harmful, settings.inverted, seed=settings.seed)


def _question(model: CachedModel, prompts: Sequence[Prompt], settings: Settings) -> int:
    """The question to which most of some harmful prompts are answered Certainly."""
    counts = []
    for question in QUESTIONS[: settings.inversion_templates]:
        (replies,) = model.replies(
            [inversion_prompt(p, question) for p in prompts],
            what="Figure 9: choice of question",
            max_new_tokens=settings.inversion_tokens,
        )
        counts.append(sum(model.answer(reply) == "certainly" for reply in replies))
    return int(np.argmax(counts))


def _layer(model: CachedModel, questions: Sequence[Prompt], axis: Axis, settings: Settings) -> int:
    """Where the reverse harmfulness direction turns most of some questions to No."""
    layers = settings.probed_layers(model.depth)
    if not questions:
        return layers[len(layers) // 2]
    many = -settings.inversion_coefficient
    how = [steer(axis, layer, many, tokens="before", label=str(layer)) for layer in layers]
    replies = model.replies(
        questions, how, what="Figure 9: choice of layer", max_new_tokens=settings.inversion_tokens
    )
    flips = [sum(model.answer(reply) == "no" for reply in answers) for answers in replies]
    return layers[int(np.argmax(flips))]


def _random(directions: Float[Tensor, "c d"], draws: int) -> list[Float[Tensor, "d"]]:
    """Random directions as long as those of the categories are on average."""
    length = directions.norm(dim=1).mean() / directions[0].norm().clamp(min=1e-12)
    return [random_like(directions[0] * length, draw) for draw in range(draws)]


def _table(
    replies: Sequence[Sequence[Reply]], of: Callable[[Reply], float], categories: int
) -> Array:
    """A figure of each reply, [a n]; the draws of the random direction become their mean."""
    rows = np.array([[of(reply) for reply in answers] for answers in replies], dtype=np.float64)
    draws = rows[categories + 1 : -1]
    mean = draws.mean(0, keepdims=True)
    return np.concatenate([rows[: categories + 1], mean, rows[-1:]])


def _odds(reply: Reply) -> float:
    chances = dict(reply.watched)
    return chances["No"] - chances["Certainly"]


def flip_figure(names: Sequence[str], steered: Steered) -> Figure:
    """Rate of No: category of the prompts by direction, where there is a prompt to flip."""
    rows = [c for c in range(len(names)) if (steered.open & (steered.tested == c)).any()]
    rates = [
        steered.no[:, steered.open & (steered.tested == c)].mean(1).tolist()[:-1] for c in rows
    ]
    caption = (
        f"Share answered No at layer {steered.layer}, of the {int(steered.open.sum())} prompts "
        "that are not answered No unsteered. Row: category of the prompts; column: whose reverse "
        "harmfulness direction is added before the question. The paper's claim: the diagonal is "
        "highest. If every column is near 1, the answers cannot tell directions apart; the table "
        "has log odds, which can."
    )
    title = "No under each category's reverse direction"
    row_names = [names[c] for c in rows]
    return heat_map(rates, row_names, steered.along[:-1], title=title, caption=caption)


def flip_table(names: Sequence[str], steered: Steered) -> Table:
    """For each category: its own direction, the others', the average and the controls."""
    others = ("other categories", *steered.along[len(names) :])
    rows = tuple(_row(c, names, steered) for c in range(len(names)))
    note = (
        f"Question: '{QUESTIONS[steered.question]}' Layer {steered.layer}. Both are chosen on "
        "other prompts. No: share of answers, of the prompts that are not answered No unsteered. "
        "Odds: mean of log P(No) - log P(Certainly) as first word, in nats, of all prompts. "
        "Directions come from the other half of each category's prompts, at their own lengths. "
        f"The average direction has {steered.length:.2f} of the mean length of a category's; the "
        "random ones have that mean length. The paper (Qwen2-7B, best layer each, tested on "
        "hate): own 1.00, others 0.32 to 1.00, average 0.52."
    )
    columns = ("tested", "No: own", "low", "high", "n", *(f"No: {name}" for name in others[:-1]))
    odds = tuple(f"odds: {name}" for name in ("own", *others))
    return Table("Steering with category directions", (*columns, *odds, "odds: n"), rows, note)


def _row(c: int, names: Sequence[str], steered: Steered) -> tuple[Cell, ...]:
    here = steered.tested == c
    able = here & steered.open
    others = [row for row in range(len(names)) if row != c]
    groups = [others, *([row] for row in range(len(names), len(steered.along)))]
    odds = [float(steered.odds[rows][:, here].mean()) for rows in ([c], *groups)]
    end = (*odds, int(here.sum()))
    if not able.any():
        return (names[c], None, None, None, 0, *[None] * (len(groups) - 1), *end)
    own = cells(proportion(steered.no[c, able] > 0))
    rates = [float(steered.no[rows][:, able].mean()) for rows in groups[:-1]]
    return (names[c], *own, *rates, *end)
