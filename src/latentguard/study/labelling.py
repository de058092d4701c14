"""The four groups (section 3.2, appendix B): what the model refuses, with its own template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from latentguard.prompts import Group, Prompt
from latentguard.report.document import Section, Table
from latentguard.stats.bounds import proportion
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import Finding, cells
from latentguard.study.judge import Outcome, refused
from latentguard.study.prompt_groups import (
    PromptGroups,
    PromptPools,
    is_fit_side,
    pair_key,
    sample_prompts,
)
from latentguard.study.settings import Settings

ASKED = ("harmful", "harmless", "over_refusal", "held_out")
GROUPS: tuple[Group, ...] = (
    "refused_harmful",
    "accepted_harmful",
    "refused_harmless",
    "accepted_harmless",
)
FITTED: tuple[Group, ...] = ("refused_harmful", "accepted_harmless")


@dataclass(frozen=True)
class Asked:
    """One pool, asked."""

    pool: str
    """Its name in ``PromptPools``."""

    prompts: tuple[Prompt, ...]
    """With ``refused`` set; None where the reply says neither."""

    outcomes: tuple[Outcome, ...]
    """What each reply is."""


def collect(model: CachedModel, pools: PromptPools, settings: Settings) -> list[Asked]:
    """Ask every pool, unsteered, and judge the replies."""
    asked = []
    for name in ASKED:
        prompts = sample_prompts(getattr(pools, name), settings.asked, seed=settings.seed)
        (replies,) = model.replies(
            prompts, what=f"ask: {name}", max_new_tokens=settings.reply_tokens
        )
        outcomes = tuple(map(model.judge, replies))
        labelled = map(_labelled, prompts, outcomes)
        asked.append(Asked(name, tuple(labelled), outcomes))
    return asked


def prompt_groups_of(
    asked: Sequence[Asked], pools: PromptPools, settings: Settings
) -> PromptGroups:
    """Sort the prompts into groups; centroids and tests never share a prompt or its twin."""
    rows = {p.text: p for one in asked for p in one.prompts}
    plain = {p.text for one in asked if one.pool in ("harmful", "harmless") for p in one.prompts}
    apart = {pair_key(p) for p in pools.held_out}
    sided = [p for p in rows.values() if p.group and p.text in plain and is_fit_side(p)]
    centre = [p for p in sided if pair_key(p) not in apart]
    used = {pair_key(p) for p in centre}
    fit: dict[Group, tuple[Prompt, ...]] = {}
    test: dict[Group, tuple[Prompt, ...]] = {}
    for group in GROUPS:
        fit[group] = tuple(p for p in centre if p.group == group)[: settings.fit]
        rest = [p for p in rows.values() if p.group == group and pair_key(p) not in used]
        rest = sample_prompts(rest, len(rest), seed=settings.seed)
        if group == "refused_harmful":  # of the centroids' own kind first (appendix B)
            rest.sort(key=lambda p: p.text not in plain)
        test[group] = tuple(rest[: settings.test])
    return PromptGroups(pools, fit, test)


def analyse(asked: Sequence[Asked], prompt_groups: PromptGroups, settings: Settings) -> Finding:
    """How often each set is refused, and how large the groups are."""
    caveats = tuple(
        f"Only {len(prompt_groups.test[g])} {g.replace('_', ' ')} prompts: nothing is concluded of "
        "them."
        for g in GROUPS
        if len(prompt_groups.test[g]) < settings.enough
    )
    text = (
        "Every prompt is asked with the model's own chat template and answered greedily; a reply "
        "is a refusal if it begins like one. Prompts whose reply is empty, or cut before it says "
        "which it is, are in no group."
    )
    section = Section("The four groups", text, (_rates(asked), _groups(prompt_groups)))
    return Finding(section, {}, caveats)


def _labelled(prompt: Prompt, outcome: Outcome) -> Prompt:
    return replace(prompt, refused=refused(outcome))


def _rates(asked: Iterable[Asked]) -> Table:
    rows = []
    for one in asked:
        for source, members in _by_source(one).items():
            known = [p.refused for p, _ in members if p.refused is not None]
            found = Counter(outcome for _, outcome in members)
            rate = cells(proportion(known)) if known else (None, None, None, 0)
            rows.append((one.pool, source, *rate, found["empty"], found["cut"]))
    columns = ("pool", "set", "refused", "low", "high", "n", "empty", "cut")
    return Table("Refusal rates", columns, tuple(rows), "Intervals: 95 %, Wilson.")


def _by_source(one: Asked) -> Mapping[str, list[tuple[Prompt, Outcome]]]:
    found: dict[str, list[tuple[Prompt, Outcome]]] = {}
    for prompt, outcome in zip(one.prompts, one.outcomes, strict=True):
        found.setdefault(prompt.source or "unknown", []).append((prompt, outcome))
    return found


def _groups(prompt_groups: PromptGroups) -> Table:
    rows = tuple(
        (
            g.replace("_", " "),
            len(prompt_groups.fit[g]) if g in FITTED else 0,
            len(prompt_groups.test[g]),
            ", ".join(sorted({str(p.source) for p in prompt_groups.test[g]})),
        )
        for g in GROUPS
    )
    return Table("Groups", ("group", "in centroids", "tested", "tested from"), rows)
