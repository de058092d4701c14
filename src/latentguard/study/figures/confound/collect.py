"""Read every labelled set through the paper's axes and through each control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from latentguard.prompts import Group, Prompt
from latentguard.study.cached_model import CachedModel
from latentguard.study.detectors import Scores
from latentguard.study.figures.confound.readings import asked, fit_readings, look
from latentguard.study.form_controls import unseen_matched
from latentguard.study.prompt_groups import BEHAVING, PromptGroups, sample_prompts
from latentguard.study.settings import Settings

OWN, PLAIN = "held-out groups", "held out, refused harmful and accepted harmless"
"""The paper's own test groups; and those two of them whose refusal goes with their label."""


SIDES = {"harmful": True, "harmless": False}


@dataclass(frozen=True, eq=False)
class ReadSet:
    """A labelled set with the score of each of its prompts by each reading."""

    name: str
    """``held-out groups``, or the source of a form-matched set."""

    prompts: tuple[Prompt, ...]
    """The n prompts; ``refused`` is None where the reply says neither."""

    harmful: Mapping[str, Scores]
    """Reading -> Delta_harmful at t_inst, or what stands in its place, [k n]."""

    refuse: Mapping[str, Scores]
    """Reading -> Delta_refuse at t_post, or what stands in its place, [k n]."""


@dataclass(frozen=True, eq=False)
class Records:
    """All sets, as they are and as they are read."""

    audited: Mapping[str, tuple[Prompt, ...]]
    """Each labelled set that the study uses."""

    sets: tuple[ReadSet, ...]
    """The paper's own first."""

    note: str
    """What the axes were fitted on."""

    missing: tuple[str, ...] = ()
    """What could not be done, and why."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Ask and read every test set, through the paper's axes and through each control."""
    sets = _sets(model, prompt_groups, settings)
    tested = [p for prompts in sets.values() for p in prompts]
    readings = fit_readings(model, prompt_groups, tested, settings)
    read = [
        ReadSet(name, prompts, *look(model, prompts, readings.of, f"confound: {name}"))
        for name, prompts in sets.items()
    ]
    return Records(_audited(prompt_groups, settings), tuple(read), readings.note, readings.missing)


def _sets(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings
) -> dict[str, tuple[Prompt, ...]]:
    """The paper's own test groups, and each form-matched set, asked."""
    groups = [prompt_groups.test_prompts(group)[: settings.test] for group in get_args(Group)]
    own = tuple(p for group in groups for p in group)
    plain = tuple(p for p in own if p.group in BEHAVING)
    matched = unseen_matched(prompt_groups)
    sets: dict[str, tuple[Prompt, ...]] = {OWN: own, PLAIN: plain}
    for source in dict.fromkeys(p.source or "unknown" for p in matched):
        members = [p for p in matched if (p.source or "unknown") == source]
        sides = [[p for p in members if p.harmful is side] for side in SIDES.values()]
        sample = [p for s in sides for p in sample_prompts(s, settings.test, seed=settings.seed)]
        sets[source] = asked(model, sample, f"confound: {source}", settings)
    return {name: prompts for name, prompts in sets.items() if prompts}


def _audited(prompt_groups: PromptGroups, settings: Settings) -> dict[str, tuple[Prompt, ...]]:
    """Each set of both labels that an experiment compares."""
    pools = prompt_groups.pools
    sets: dict[str, Sequence[Prompt]] = {
        "centroids: refused harmful, accepted harmless": [
            p for g in BEHAVING for p in prompt_groups.fit_prompts(g)
        ],
        OWN: [p for group in prompt_groups.test.values() for p in group],
        "held-out harmful, over-refusal": [*pools.held_out, *pools.over_refusal],
        "jailbreaks, plain harmless": [*pools.jailbreaks, *pools.harmless],
        "categories, plain harmless": [*pools.categories, *pools.harmless],
        "moderation": pools.moderation,
    }
    for source in dict.fromkeys(p.source or "unknown" for p in pools.matched):
        sets[f"form-matched: {source}"] = [
            p for p in pools.matched if (p.source or "unknown") == source
        ]
    return {name: _sampled(prompts, settings) for name, prompts in sets.items() if prompts}


def _sampled(prompts: Sequence[Prompt], settings: Settings) -> tuple[Prompt, ...]:
    sides = ([p for p in prompts if p.harmful is side] for side in SIDES.values())
    return tuple(
        p for side in sides for p in sample_prompts(side, settings.asked, seed=settings.seed)
    )
