"""Table 1: refusal rate with and without the post-instruction tokens (section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentguard.prompts import Prompt
from latentguard.report.document import Cell, Section, Table
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion, rate_difference
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import Finding, cells
from latentguard.study.prompt_groups import PromptGroups, sample_prompts
from latentguard.study.settings import Settings


@dataclass(frozen=True)
class Records:
    """What is refused with and without the post-instruction tokens; None if it cannot be told."""

    prompts: tuple[Prompt, ...]
    """The n plain harmful requests."""

    whole: tuple[bool | None, ...]
    """Whether each is refused when asked with the whole template."""

    cut: tuple[bool | None, ...]
    """Whether each is refused when the prompt ends at t_inst: all that is no refusal is none."""

    answered: tuple[bool | None, ...]
    """The same, None where the reply only goes on with the user's own sentence."""

    by_second: tuple[tuple[bool | None, ...], tuple[bool | None, ...]] | None = None
    """``whole`` and ``cut`` by the second judge, where there is one: the program's own."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Ask plain harmful prompts in both ways; the paper's protocol: those of AdvBench alone."""
    pool = prompt_groups.pools.harmful
    if settings.protocol == "paper":
        pool = tuple(p for p in pool if p.source == "advbench") or pool
    prompts = tuple(sample_prompts(pool, settings.test, seed=settings.seed))
    most = settings.reply_tokens
    (whole,) = model.replies(prompts, what="Table 1: whole template", max_new_tokens=most)
    (cut,) = model.replies(prompts, what="Table 1: ends at t_inst", max_new_tokens=most, post=False)
    refusals = model.refused(cut)
    refused, second = model.refused(whole), None
    first, last = (model.refused_by_second(replies) for replies in (whole, cut))
    if first is not None and last is not None:
        second = first, last
    return Records(prompts, refused, tuple(one is True for one in refusals), refusals, second)


def analyse(records: Records, settings: Settings) -> Finding:
    """The rates, and their differences over the prompts whose replies are both judged."""
    as_paper = _pairs(records.whole, records.cut)
    refusal_pairs = _pairs(records.whole, records.answered)
    rows: list[tuple[Cell, ...]] = []
    ways = [("any reply", as_paper), ("replies that answer", refusal_pairs)]
    if records.by_second is not None:
        ways = [("as the paper counts", as_paper), ("built-in judge", _pairs(*records.by_second))]
    for name, pairs in ways:
        if len(pairs):
            rows.append((name, "with", *cells(proportion(pairs[:, 0] > 0))))
            rows.append((name, "without", *cells(proportion(pairs[:, 1] > 0))))
            rows.append((name, "difference", *cells(_drop(pairs))))
    note = (
        f"{len(records.prompts)} harmful prompts ({', '.join(_sources(records.prompts))}). "
        f"{_COUNTED[records.by_second is not None]} "
        "Differences are paired (95 % bootstrap). The paper: Llama2 1.000 and 0.853, Llama3 0.960 "
        "and 0.589, Qwen2-7B 0.980 and 0.813."
    )
    columns = ("counted", "post-instruction tokens", "refusal rate", "low", "high", "n")
    table = Table("Refusal without post-instruction tokens", columns, tuple(rows), note)
    if len(refusal_pairs) < settings.enough:
        few = (
            f"Without post-instruction tokens only {len(refusal_pairs)} of {len(records.prompts)} "
            "replies answer at all (the others go on with the user's sentence, or are cut): Table "
            "1 says nothing of refusal here."
        )
        return Finding(_section((table,)), {}, (few,))
    effects = {"drop without post-instruction tokens": _drop(refusal_pairs)}
    return Finding(_section((table,)), effects)


_COUNTED = {
    False: "Any reply: all that is no refusal is none. Replies that answer: without "
    "post-instruction tokens a model may only go on writing the user's sentence, which is no "
    "reply; those prompts are left out.",
    True: "As the paper counts: a refusal holds one of the authors' phrases, or is empty; a reply "
    "that only goes on with the user's sentence is none. Built-in judge: prompts of which it can "
    "say in both ways what the reply is.",
}
"""What the rows count; of the paper's protocol if True."""


def _sources(prompts: Sequence[Prompt]) -> list[str]:
    return sorted({str(p.source) for p in prompts})


def _pairs(first: Sequence[bool | None], second: Sequence[bool | None]) -> NDArray[np.float64]:
    """The prompts that both ways judge, [n 2]."""
    judged = [(a, b) for a, b in zip(first, second, strict=True) if None not in (a, b)]
    return np.array(judged, dtype=float).reshape(-1, 2)


def _drop(pairs: NDArray[np.float64]) -> Estimate:
    return rate_difference(pairs[:, 0], pairs[:, 1])


def _section(parts: Sequence[Table]) -> Section:
    text = (
        "If refusal is decided at the post-instruction tokens, a model that is made to reply right "
        "after the instruction should refuse less."
    )
    return Section("Table 1: without post-instruction tokens", text, tuple(parts))
