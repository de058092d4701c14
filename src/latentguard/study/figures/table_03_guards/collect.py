"""Fit every guard, ask the jailbreaks, and score each group of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from latentguard.prompts import Group, Prompt
from latentguard.study.attacks import holds, with_suffix
from latentguard.study.cached_model import CachedModel
from latentguard.study.detectors import Detector
from latentguard.study.figures.figure_06_jailbreaks.collect import search_suffixes
from latentguard.study.figures.table_03_guards.compared_guards import (
    LINEAR,
    Scored,
    rules,
    scored,
    training,
)
from latentguard.study.figures.table_03_guards.user_traffic import (
    LONGEST,
    Traffic,
    judge_traffic,
    sample_texts,
)
from latentguard.study.prompt_groups import PromptGroups, sample_prompts
from latentguard.study.settings import Settings

COLUMNS: tuple[Group, ...] = ("refused_harmless", "accepted_harmful")
"""Groups that are columns of the paper's Table 3, after the jailbreaks."""


@dataclass(frozen=True, eq=False)
class Records:
    """All groups, and what in-domain examples change."""

    groups: tuple[Scored, ...] = ()
    """The columns of Table 3, then refused harmful and accepted harmless prompts."""

    harmless: Scored | None = None
    """Accepted harmless and over-refusal prompts: who is flagged there is flagged wrongly."""

    traffic: Traffic | None = None
    """Texts of users, of both labels."""

    toxicchat: Scored | None = None
    """ToxicChat, the set of the paper's Table 8."""

    note: str = ""
    """What the guards learnt from."""

    missing: tuple[str, ...] = ()
    """What was not measured, and why."""

    models: tuple[str, ...] = ()
    """The guards among the rules that are models of their own."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Fit every guard, ask the jailbreaks, and score each group."""
    training_set = training(model, prompt_groups, settings)
    if training_set is None:
        return Records(
            missing=("No guard: harmful or accepted harmless prompts to fit are missing.",)
        )
    detectors = rules(model, training_set, settings)
    groups = _jailbreaks(model, prompt_groups, settings) | _groups(prompt_groups)
    every = {**groups, "harmless": _harmless(prompt_groups, settings)}
    judged = {
        name: scored(model, name, prompts, detectors)[0]
        for name, prompts in every.items()
        if prompts
    }
    traffic = judge_traffic(
        model, training_set, detectors, prompt_groups.pools.moderation, settings
    )
    toxic = sample_texts(prompt_groups.pools.toxicchat, settings)
    return Records(
        tuple(judged[name] for name in groups if name in judged),
        judged.get("harmless"),
        traffic,
        scored(model, "ToxicChat", toxic, detectors)[0] if toxic else None,
        training_set.note,
        (*_empty(groups), *_missing(model, prompt_groups, detectors, traffic)),
        tuple(model.tools.guards),
    )


def _groups(prompt_groups: PromptGroups) -> dict[str, tuple[Prompt, ...]]:
    names = dict.fromkeys((*COLUMNS, *get_args(Group)))
    return {name.replace("_", " "): prompt_groups.test_prompts(name) for name in names}


def _jailbreaks(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings
) -> dict[str, tuple[Prompt, ...]]:
    """Attacks that succeed, by kind; none whose request a centroid saw."""
    fitted = [p for group in prompt_groups.fit.values() for p in group if p.harmful]
    unseen = [p for p in prompt_groups.pools.jailbreaks if not holds(p, fitted)]
    kinds = {
        kind: [p for p in unseen if (p.category or "other") == kind]
        for kind in dict.fromkeys(p.category or "other" for p in unseen)
    }
    if own := _own_suffixes(model, prompt_groups, settings):
        kinds["own GCG suffixes"] = own
    prompts = {}
    for kind, every in kinds.items():
        members = sample_prompts(every, settings.test, seed=settings.seed)
        (replies,) = model.replies(
            members, what=f"Table 3: {kind}", max_new_tokens=settings.reply_tokens
        )
        refused = model.refused(replies)
        accepted = (p for p, was in zip(members, refused, strict=True) if was is False)
        prompts[f"jailbreak: {kind}"] = tuple(replace(p, refused=False) for p in accepted)
    return prompts


def _own_suffixes(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings
) -> list[Prompt]:
    """Refused requests with the suffix that was searched on this very model, as in Figure 6."""
    most = min(settings.suffixes, settings.attacked, settings.test)
    requests = prompt_groups.test_prompts("refused_harmful")[:most]
    steps = settings.suffix_steps
    suffixes = search_suffixes(model, requests, steps=steps, seed=settings.seed)
    return [with_suffix(*pair) for pair in zip(requests[: len(suffixes)], suffixes, strict=True)]


def _harmless(prompt_groups: PromptGroups, settings: Settings) -> tuple[Prompt, ...]:
    """Accepted harmless and over-refusal prompts, each text once."""
    over = sample_prompts(prompt_groups.pools.over_refusal, settings.test, seed=settings.seed)
    fitted = {p.text for group in prompt_groups.fit.values() for p in group}
    every = {p.text: p for p in (*over, *prompt_groups.test_prompts("accepted_harmless"))}
    return tuple(p for text, p in every.items() if text not in fitted)


def _empty(groups: Mapping[str, tuple[Prompt, ...]]) -> Iterator[str]:
    for name, prompts in groups.items():
        if not prompts:
            yield f"There is no prompt in {name}, so nothing is known of it."


def _missing(
    model: CachedModel,
    prompt_groups: PromptGroups,
    detectors: Mapping[str, Detector],
    traffic: Traffic | None,
) -> Iterator[str]:
    if not prompt_groups.pools.jailbreaks:
        yield "No attacks were given (pool jailbreaks): Table 3 lacks their columns."
    if traffic is None:
        yield "No user traffic of both labels was given (pool moderation): no Tables 8 and 9."
    elif traffic.left_out:
        yield f"{traffic.left_out} texts of user traffic were left out: over {LONGEST} characters."
    if not prompt_groups.pools.toxicchat:
        yield "ToxicChat was not given (pool toxicchat): Table 8 is of other texts."
    if model.tools.suffix is None:
        yield "No GCG suffix was searched on this model: Table 3 lacks the paper's first column."
    if not model.tools.guards:
        yield (
            "No guard model was given (--baseline): Latent Guard is compared with n-grams instead, "
            "which decides nothing about claim 8."
        )
    if LINEAR not in detectors:
        yield "Too few prompts of a label to fit a linear guard."
