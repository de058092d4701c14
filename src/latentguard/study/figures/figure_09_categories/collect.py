"""Ask the prompts of each risk category, read their states, and steer those set apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latentguard.prompts import Prompt
from latentguard.study.cached_model import CachedModel
from latentguard.study.figures.figure_09_categories.as_printed import (
    PrintedFlips,
    steer_one_category,
)
from latentguard.study.figures.figure_09_categories.category_cosines import Cloud
from latentguard.study.figures.figure_09_categories.steering import Steered, steer_categories
from latentguard.study.prompt_groups import PromptGroups, sample_prompts
from latentguard.study.settings import Settings

CONCEPTS = {"t_inst": "harmfulness", "t_post": "refusal"}
"""Which direction is read where."""


@dataclass(frozen=True, eq=False)
class Records:
    """Directions of the categories, by the inner products of the states behind them."""

    names: tuple[str, ...]
    """The c categories."""

    refused: tuple[bool, ...]
    """Whether a category's directions come from refused prompts alone, or from all."""

    clouds: Mapping[str, Cloud]
    """By position; empty if there are too few categories."""

    steered: Steered | None
    """None if there are too few categories."""

    note: str = ""
    """What is missing."""

    printed: PrintedFlips | None = None
    """Figure 9b as printed; under the paper's protocol alone."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Ask the prompts of each category, read their states, and steer those set apart."""
    every = _by_category(prompt_groups, settings)
    harmless = prompt_groups.fit_prompts("accepted_harmless")
    if len(every) < 2 or len(harmless) < 2:
        counts = f"{len(every)} categories and {len(harmless)} accepted harmless prompts"
        return Records((), (), {}, None, f"{counts} are too few for directions of categories")
    members, refused = _replies_by_category(model, every, settings)
    prompts = [p for of in members.values() for p in of]
    states = model.states(prompts, what="states: risk categories")
    base = model.states(harmless, what="states: harmless")
    category = [c for c, of in enumerate(members.values()) for _ in of]
    clouds = {at: Cloud.of(states.at(at), base.at(at), category) for at in CONCEPTS}
    steered = steer_categories(model, prompt_groups, settings, every, base)
    printed = None
    if settings.protocol == "paper":
        printed = steer_one_category(model, settings, every, base)
    return Records(tuple(every), refused, clouds, steered, printed=printed)


def _by_category(prompt_groups: PromptGroups, settings: Settings) -> dict[str, list[Prompt]]:
    """The largest categories, at most so many prompts of each; each has enough."""
    prompts_by_category: dict[str, list[Prompt]] = {}
    for prompt in prompt_groups.pools.categories:
        if prompt.category:
            prompts_by_category.setdefault(prompt.category, []).append(prompt)
    most = settings.per_category
    largest = sorted(prompts_by_category.items(), key=lambda one: (-min(len(one[1]), most), one[0]))
    return {
        name: sample_prompts(members, most, seed=settings.seed)
        for name, members in largest[: settings.categories]
        if len(members) >= max(settings.enough, 2)
    }


def _replies_by_category(
    model: CachedModel, every: Mapping[str, Sequence[Prompt]], settings: Settings
) -> tuple[dict[str, list[Prompt]], tuple[bool, ...]]:
    """The prompts behind each category's directions: the refused ones, or all if they are few."""
    prompts = [p for members in every.values() for p in members]
    (replies,) = model.replies(
        prompts, what="labelling: risk categories", max_new_tokens=settings.reply_tokens
    )
    judged = dict(zip(prompts, model.refused(replies), strict=True))
    refused = {name: [p for p in members if judged[p]] for name, members in every.items()}
    some = tuple(len(of) >= max(settings.enough, 2) for of in refused.values())
    pairs = zip(every.items(), some, strict=True)
    return {name: refused[name] if ok else list(of) for (name, of), ok in pairs}, some
