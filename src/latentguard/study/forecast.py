"""What a study can decide and how long it takes, from a few prompts, before an hour is spent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch

from latentguard.interventions import Intervention
from latentguard.prompts import Group, Prompt
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion
from latentguard.study.attacks import TEMPLATES
from latentguard.study.cached_model import CachedModel
from latentguard.study.claims import CLAIMS
from latentguard.study.figures.beyond_knockout import CUTS, WINDOWED
from latentguard.study.figures.beyond_replies import READINGS
from latentguard.study.figures.figure_13_positions import BEFORE
from latentguard.study.labelling import ASKED
from latentguard.study.prompt_groups import (
    BEHAVING,
    PromptPools,
    inversion_prompt,
    sample_prompts,
)
from latentguard.study.refusal_odds import JUDGED
from latentguard.study.settings import Settings

SAMPLE = 12
"""Prompts of each pool that are asked; labelling takes their replies from the store."""

TIMED = 3
"""Of these, how many of each label are asked without the store, to measure the time of a reply."""

TIMED_LAYERS = 4
"""At how many layers these are read anew, as steered prompts are."""

READING = 8
"""A prompt's own tokens take about as long as so many tokens of a reply."""

GROUPS_NEEDED: Mapping[str, tuple[Group, ...]] = {
    "template": ("refused_harmful",),
    "clusters": ("refused_harmful", "accepted_harmful", "refused_harmless"),
    "beliefs": ("refused_harmful", "refused_harmless"),
    "steering": ("refused_harmful", "accepted_harmless"),
    "inversion": ("refused_harmful", "accepted_harmless"),
    "categories": ("refused_harmful",),
    "jailbreaks": ("refused_harmful",),
    "finetuning": ("refused_harmful", "accepted_harmless"),
    "positions": ("refused_harmful", "accepted_harmless"),
}
"""Experiment -> the groups without which its claims decide nothing."""

LABELS: Mapping[str, tuple[Group, Group]] = {
    "harmful": ("refused_harmful", "accepted_harmful"),
    "held_out": ("refused_harmful", "accepted_harmful"),
    "harmless": ("refused_harmless", "accepted_harmless"),
    "over_refusal": ("refused_harmless", "accepted_harmless"),
}
"""Pool -> what its prompts are, refused or accepted."""


class Planned(NamedTuple):
    """Some replies that a study will make."""

    replies: int
    """How many."""

    tokens: int
    """The longest that they may be."""

    is_answer: bool = False
    """Whether they answer an inversion question, mostly in one word."""


@dataclass(frozen=True)
class Forecast:
    """What is known of a study after a few prompts."""

    refused: Mapping[str, Estimate]
    """Share of the sample that is refused, by pool."""

    groups: Mapping[Group, int]
    """About how many prompts each group will have."""

    enough: int
    """Prompts of a group from which anything is concluded."""

    seconds: float
    """About how long all replies take on this machine, without what the store has."""

    replies: int
    """About how many replies that is."""

    def missing(self, experiment: str) -> tuple[Group, ...]:
        """The groups that will be too small for the claims of an experiment."""
        return tuple(
            group
            for group in GROUPS_NEEDED.get(experiment, ())
            if self.groups[group] < self._needed(group)
        )

    def _needed(self, group: Group) -> int:
        """Prompts of a group that claims need: twice as many where centroids take half."""
        return self.enough * (2 if group in BEHAVING else 1)

    def lines(self, only: Collection[str] = ()) -> Iterator[str]:
        """What people read at the start of a study."""
        for pool, rate in self.refused.items():
            count = round(rate.value * rate.total)
            name = pool.replace("_", " ")
            yield (
                f"{name}: {count} of {rate.total} sampled prompts are refused (95 % interval "
                f"{rate.low:.0%} to {rate.high:.0%})"
            )
        run = [(n, c) for n, c in enumerate(CLAIMS, 1) if not only or c.experiment in only]
        able = [str(n) for n, claim in run if not self.missing(claim.experiment)]
        yield f"claims that can decide: {', '.join(able) or 'none'}"
        for group in dict.fromkeys(g for _, c in run for g in self.missing(c.experiment)):
            numbers = [str(n) for n, c in run if group in self.missing(c.experiment)]
            yield (
                f"claims that will hardly decide: {', '.join(numbers)}: about "
                f"{self.groups[group]} {group.replace('_', ' ')} prompts, "
                f"{self._needed(group)} are needed"
            )
        yield (
            f"about {self.replies:,} replies, {spoken(self.seconds)} in all on this machine; what "
            "the store has already takes no time"
        )


def forecast(
    model: CachedModel,
    pools: PromptPools,
    settings: Settings,
    *,
    only: Collection[str] = (),
    clock: Callable[[], float] = perf_counter,
) -> Forecast:
    """Ask a few prompts of each pool, and time some of them.

    Args:
        model: Under study.
        pools: What it will be asked.
        settings: How much of it.
        only: Experiments that will run; all if empty.
        clock: Seconds.
    """
    counts = {
        name: sample_prompts(getattr(pools, name), settings.asked, seed=settings.seed)
        for name in ASKED
    }
    refused, sizes = {}, dict[Group, float]()
    for name, prompts in counts.items():
        flags = _refused(model, prompts[:SAMPLE], settings)
        if flags:
            refused[name] = proportion(flags)
            for group, share in zip(
                LABELS[name], (refused[name].value, 1 - refused[name].value), strict=True
            ):
                sizes[group] = sizes.get(group, 0) + share * len(prompts)
    planned = list(planned_replies(model, pools, settings, only=only))
    timed = [prompt for name in ("harmful", "harmless") for prompt in counts[name][:TIMED]]
    seconds = _seconds(model, timed, planned, settings, clock)
    groups = {group: round(sizes.get(group, 0)) for of in LABELS.values() for group in of}
    replies = sum(one.replies for one in planned)
    return Forecast(refused, groups, settings.enough, seconds, replies)


def planned_replies(
    model: CachedModel, pools: PromptPools, settings: Settings, *, only: Collection[str] = ()
) -> Iterator[Planned]:
    """About how many replies, of which length and kind, each part of a study takes."""
    layers, draws = len(settings.layers(model.depth)), settings.random_draws
    short, long = settings.inversion_tokens, settings.reply_tokens
    prompts = sum(min(len(getattr(pools, name)), settings.asked) for name in ASKED)
    probed = len(settings.probed_layers(model.depth))
    tested = settings.categories * settings.per_category
    positions = len(model.span) + len(BEFORE)
    kinds = 4 + len({p.category for p in pools.jailbreaks})
    finetuned = len(settings.finetune_sizes) * settings.finetune_seeds + settings.finetune_controls
    questions = 4 + layers * (4 * settings.inversion_templates + 2 + 2 * draws)
    parts: dict[str, Sequence[tuple[int, int] | Planned]] = {
        "template": [(settings.test, long)],
        "steering": [
            (settings.steered * layers * len(settings.coefficients) * (4 + 2 * draws), long)
        ],
        "inversion": [
            Planned(2 * settings.inverted * questions, short, is_answer=True),
            (2 * settings.inverted * layers * (1 + draws), long),
        ],
        "positions": [
            Planned(settings.inverted * probed * (positions + draws), short, is_answer=True)
        ],
        "categories": [
            (min(tested, len(pools.categories)), long),
            Planned(tested // 2 * (settings.categories + 1 + draws), short, is_answer=True),
        ],
        "jailbreaks": [(2 * settings.attacked * kinds, long)],
        "guards": [(settings.test, long)],
        "finetuning": [
            (finetuned * (2 * settings.finetune_test + settings.finetune_steered * layers), long),
            (finetuned * settings.finetune_epochs * max(settings.finetune_sizes), READING),
        ],
    }
    parts |= _beyond_the_paper(model, settings)
    has_attacks = not only or "jailbreaks" in only
    attacks = 0 if has_attacks else settings.attacked * (kinds - 4 + len(TEMPLATES))
    parts["replies"] = [(attacks, long), (READINGS * settings.test, 1)]
    yield Planned(prompts, long)
    for name, of in parts.items():
        if not only or name in only:
            yield from (Planned(*one) for one in of)


def _beyond_the_paper(
    model: CachedModel, settings: Settings
) -> dict[str, Sequence[tuple[int, int]]]:
    """The same of patching, knock-out, ablation and dose curves.

    A patched prompt starts at its layer and its position, so three take about as long as one.
    """
    n = settings.interventions
    layers, probed = len(settings.layers(model.depth)), len(settings.probed_layers(model.depth))
    places = len(model.span) + len(BEFORE) + 1
    judged, long = min(n, JUDGED), settings.reply_tokens
    cuts = sum(cut.draws for cut in CUTS) + layers * sum(cut.draws for cut in WINDOWED)
    return {
        "patching": [
            (2 * n * layers * (2 * places + 5) // 3, 1),
            (2 * judged * (2 * probed + 1), long),
        ],
        "knockout": [(2 * n * (cuts + 1) // 3, 1), (2 * judged * (len(CUTS) + 2), long)],
        "ablation": [(2 * n * (3 * probed + 5), 2 * long)],
        "dose": [(n * (4 * layers * len(settings.doses) + 1), 2 * long)],
    }


def spoken(seconds: float) -> str:
    """A duration in words, rounded as an estimate is."""
    if seconds < 90:
        return "about a minute"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"


def _refused(model: CachedModel, prompts: Sequence[Prompt], settings: Settings) -> list[bool]:
    if not prompts:
        return []
    (replies,) = model.replies(prompts, what="forecast", max_new_tokens=settings.reply_tokens)
    return [flag for flag in model.refused(replies) if flag is not None]


def _seconds(
    model: CachedModel,
    prompts: Sequence[Prompt],
    planned: Sequence[Planned],
    settings: Settings,
    clock: Callable[[], float],
) -> float:
    """Time some replies and some answers of these prompts; what all planned ones take."""
    asked = {False: prompts, True: [inversion_prompt(prompt) for prompt in prompts]}
    longest = {False: settings.reply_tokens, True: settings.inversion_tokens}
    total = 0.0
    for is_answer in {one.is_answer for one in planned}:
        limit = longest[is_answer]
        each = _seconds_each(model, asked[is_answer], limit, clock) / (limit + READING)
        of_kind = (one for one in planned if one.is_answer is is_answer)
        total += each * sum(one.replies * (one.tokens + READING) for one in of_kind)
    return total


def _seconds_each(
    model: CachedModel, prompts: Sequence[Prompt], tokens: int, clock: Callable[[], float]
) -> float:
    """Seconds that a reply takes among steered ones; no vector of any length is added."""
    zero = torch.zeros(model.uncached.width)
    layers = [n * model.depth // TIMED_LAYERS for n in range(TIMED_LAYERS)]
    start = clock()
    model.uncached.sweep(
        tuple(prompts),
        [Intervention(layer, zero, tokens="all") for layer in layers],
        max_new_tokens=tokens,
    )
    return (clock() - start) / (len(prompts) * TIMED_LAYERS)
