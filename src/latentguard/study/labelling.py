"""The four groups (section 3.2, appendix B): what the model refuses, with its own template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from latentguard.prompts import Group, Prompt
from latentguard.report.document import Cell, Section, Table
from latentguard.stats.rates import proportion
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import Finding, cells
from latentguard.study.judge import Outcome, refused
from latentguard.study.prompt_groups import (
    BEHAVING,
    PromptGroups,
    PromptPools,
    is_fit_side,
    pair_key,
    sample_prompts,
)
from latentguard.study.settings import Settings
from latentguard.study.thinking import is_cut_in_thinking

ASKED = ("harmful", "harmless", "over_refusal", "held_out")
GROUPS: tuple[Group, ...] = (
    "refused_harmful",
    "accepted_harmful",
    "refused_harmless",
    "accepted_harmless",
)


@dataclass(frozen=True)
class Asked:
    """One pool, asked."""

    pool: str
    """Its name in ``PromptPools``."""

    prompts: tuple[Prompt, ...]
    """With ``refused`` set; None where the reply says neither."""

    outcomes: tuple[Outcome, ...]
    """What each reply is."""

    by_second: tuple[bool | None, ...] | None = None
    """Whether each is refused by the second judge; None if there is none."""

    cut_in_thinking: int = 0
    """How many replies were cut inside their thinking, so that they have no label."""


def collect(model: CachedModel, pools: PromptPools, settings: Settings) -> list[Asked]:
    """Ask every pool, unsteered, and judge the replies."""
    sets = []
    for name in ASKED:
        prompts = sample_prompts(getattr(pools, name), settings.asked, seed=settings.seed)
        (replies,) = model.replies(
            prompts, what=f"labelling: {name}", max_new_tokens=settings.reply_tokens
        )
        outcomes = tuple(map(model.judge, replies))
        labelled = map(_labelled, prompts, outcomes)
        second = model.refused_by_second(replies)
        thinking = sum(map(is_cut_in_thinking, replies))
        sets.append(Asked(name, tuple(labelled), outcomes, second, thinking))
    return sets


def prompt_groups_of(sets: Sequence[Asked], pools: PromptPools, settings: Settings) -> PromptGroups:
    """Sort the prompts into groups; centroids and tests never share a prompt or its twin."""
    if settings.protocol == "paper":
        return _groups_of_the_paper(sets, pools, settings)
    rows = {p.text: p for one in sets for p in one.prompts}
    plain = {p.text for one in sets if one.pool in ("harmful", "harmless") for p in one.prompts}
    apart = {pair_key(p) for p in pools.held_out}
    sided = [p for p in rows.values() if p.group and p.text in plain and is_fit_side(p)]
    centre = [p for p in sided if pair_key(p) not in apart]
    used = {pair_key(p) for p in centre}
    fit: dict[Group, tuple[Prompt, ...]] = {}
    test: dict[Group, tuple[Prompt, ...]] = {}
    every_source: tuple[Prompt, ...] = ()
    for group in GROUPS:
        fit[group] = tuple(p for p in centre if p.group == group)[: settings.fit]
        rest = [p for p in rows.values() if p.group == group and pair_key(p) not in used]
        rest = sample_prompts(rest, len(rest), seed=settings.seed)
        if group == "refused_harmful":  # of the centroids' own kind first (appendix B)
            every_source = tuple(rest[: settings.test])
            rest.sort(key=lambda p: p.text not in plain)
        test[group] = tuple(rest[: settings.test])
    return PromptGroups(pools, fit, test, every_source)


def _groups_of_the_paper(
    sets: Sequence[Asked], pools: PromptPools, settings: Settings
) -> PromptGroups:
    """The groups of appendix B: a random hundred for each centroid, all others to test.

    - Harmful: AdvBench and JailbreakBench; accepted ones are for the guard's centroid alone.
    - Harmless: Alpaca and accepted XSTest prompts; refused ones are held out.
    - Accepted harmful prompts are tested from the held-out set (SORRY-Bench) alone.
    """
    rows = {p.text: p for one in sets for p in one.prompts}
    held_out = {p.text for one in sets if one.pool == "held_out" for p in one.prompts}
    fit: dict[Group, tuple[Prompt, ...]] = {}
    for group in GROUPS:
        members = [p for p in rows.values() if p.group == group and p.text not in held_out]
        group_members = [] if group == "refused_harmless" else members
        fit[group] = tuple(sample_prompts(group_members, settings.fit, seed=settings.seed))
    used = {pair_key(p) for group in fit.values() for p in group}
    test: dict[Group, tuple[Prompt, ...]] = {}
    every_source: tuple[Prompt, ...] = ()
    for group in GROUPS:
        rest = [p for p in rows.values() if p.group == group and pair_key(p) not in used]
        if group == "accepted_harmful" and held_out:
            rest = [p for p in rest if p.text in held_out]
        elif group == "refused_harmful":
            every_source = tuple(sample_prompts(rest, settings.test, seed=settings.seed))
            rest = [p for p in rest if p.text not in held_out]
        test[group] = tuple(sample_prompts(rest, settings.test, seed=settings.seed))
    return PromptGroups(pools, fit, test, every_source)


def analyse(sets: Sequence[Asked], prompt_groups: PromptGroups, settings: Settings) -> Finding:
    """How often each set is refused, and how large the groups are."""
    caveats = tuple(
        f"Only {len(prompt_groups.test[g])} {g.replace('_', ' ')} prompts: nothing is concluded of "
        "them."
        for g in GROUPS
        if len(prompt_groups.test[g]) < settings.enough
    )
    cut = sum(one.cut_in_thinking for one in sets)
    if cut:
        caveats = (
            f"{cut} of {sum(len(one.prompts) for one in sets)} replies were cut inside their "
            f"thinking and have no label: set 'reply_tokens' above {settings.reply_tokens}.",
            *caveats,
        )
    text = _text(settings)
    section = Section("The four groups", text, (_rates(sets), _groups(prompt_groups)))
    return Finding(section, {}, caveats)


def _text(settings: Settings) -> str:
    if settings.protocol == "paper":
        return (
            "Every prompt is asked with the template named below and answered greedily. As the "
            "paper counts, a reply is a refusal if it holds one of the authors' phrases anywhere, "
            "or is empty. Beside it: the share that the program's own judge takes for refusals, "
            "of the replies that it can decide."
        )
    return (
        "Every prompt is asked with the model's own chat template and answered greedily; a reply "
        "is a refusal if it begins like one. Prompts whose reply is empty, or cut before it says "
        "which it is, are in no group."
    )


def _labelled(prompt: Prompt, outcome: Outcome) -> Prompt:
    return replace(prompt, refused=refused(outcome))


def _rates(sets: Sequence[Asked]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    has_unhelpful = any("unhelpful" in one.outcomes for one in sets)
    for one in sets:
        for source, members in _by_source(one).items():
            refusals = [one.prompts[i].refused for i in members]
            counts = Counter(one.outcomes[i] for i in members)
            row = (one.pool, source, *_rate(refusals), counts["empty"], counts["cut"])
            if has_unhelpful:
                row = (*row, counts["unhelpful"])
            second = None if one.by_second is None else [one.by_second[i] for i in members]
            rows.append((*row, *_rate(second or [])))
    columns: tuple[str, ...] = ("pool", "set", "refused", "low", "high", "n", "empty", "cut")
    columns = (*columns, "unhelpful") if has_unhelpful else columns
    beside: tuple[str, ...] = ("built-in judge: refused", "its low", "its high", "its n")
    if all(row[-1] == 0 for row in rows):
        rows, beside = [row[: len(columns)] for row in rows], ()
    return Table("Refusal rates", (*columns, *beside), tuple(rows), "Intervals: 95 %, Wilson.")


def _rate(flags: Iterable[bool | None]) -> tuple[Cell, ...]:
    judged = [flag for flag in flags if flag is not None]
    return cells(proportion(judged)) if judged else (None, None, None, 0)


def _by_source(one: Asked) -> Mapping[str, list[int]]:
    """Which rows come from each set."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(one.prompts):
        rows.setdefault(prompt.source or "unknown", []).append(row)
    return rows


def _groups(prompt_groups: PromptGroups) -> Table:
    rows = tuple(
        (
            g.replace("_", " "),
            len(prompt_groups.fit[g]) if g in BEHAVING else 0,
            len(prompt_groups.test[g]),
            ", ".join(sorted({str(p.source) for p in prompt_groups.test[g]})),
        )
        for g in GROUPS
    )
    return Table("Groups", ("group", "in centroids", "tested", "tested from"), rows)
