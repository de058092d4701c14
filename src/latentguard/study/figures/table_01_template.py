"""Table 1: refusal rate with and without the post-instruction tokens (section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentguard.prompts import Prompt
from latentguard.report.document import Cell, Section, Table
from latentguard.stats.bootstrap import mean_difference
from latentguard.stats.bounds import proportion
from latentguard.stats.estimate import Estimate
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
    """Whether each is refused when the prompt ends at t_inst, as the paper counts: all that is
    no refusal is none."""

    answered: tuple[bool | None, ...]
    """The same, None where the reply only goes on with the user's own sentence."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Ask plain harmful prompts in both ways."""
    prompts = tuple(sample_prompts(prompt_groups.pools.harmful, settings.test, seed=settings.seed))
    most = settings.reply_tokens
    (whole,) = model.replies(prompts, what="Table 1: whole template", max_new_tokens=most)
    (cut,) = model.replies(prompts, what="Table 1: ends at t_inst", max_new_tokens=most, post=False)
    answered = model.refused(cut)
    return Records(prompts, model.refused(whole), tuple(one is True for one in answered), answered)


def analyse(records: Records, settings: Settings) -> Finding:
    """The rates, and their differences over the prompts whose replies are both judged."""
    as_paper = _pairs(records.whole, records.cut)
    answered = _pairs(records.whole, records.answered)
    rows: list[tuple[Cell, ...]] = []
    for name, pairs in (("any reply", as_paper), ("replies that answer", answered)):
        if len(pairs):
            rows.append((name, "with", *cells(proportion(pairs[:, 0] > 0))))
            rows.append((name, "without", *cells(proportion(pairs[:, 1] > 0))))
            rows.append((name, "difference", *cells(_drop(pairs))))
    note = (
        f"{len(records.prompts)} harmful prompts. Any reply: as the paper counts. Replies that "
        "answer: without post-instruction tokens a model may only go on writing the user's "
        "sentence, which is no reply; those prompts are left out. "
        "Differences are paired (95 % bootstrap). The paper: Llama2 1.000 and 0.853, Llama3 0.960 "
        "and 0.589, Qwen2-7B 0.980 and 0.813."
    )
    columns = ("counted", "post-instruction tokens", "refusal rate", "low", "high", "n")
    table = Table("Refusal without post-instruction tokens", columns, tuple(rows), note)
    if len(answered) < settings.enough:
        few = (
            f"Without post-instruction tokens only {len(answered)} of {len(records.prompts)} "
            "replies answer at all (the others go on with the user's sentence, or are cut): Table "
            "1 says nothing of refusal here."
        )
        return Finding(_section((table,)), {}, (few,))
    effects = {"drop without post-instruction tokens": _drop(answered)}
    return Finding(_section((table,)), effects)


def _pairs(first: Sequence[bool | None], second: Sequence[bool | None]) -> NDArray[np.float64]:
    """The prompts that both ways judge, [n 2]."""
    known = [(a, b) for a, b in zip(first, second, strict=True) if None not in (a, b)]
    return np.array(known, dtype=float).reshape(-1, 2)


def _drop(pairs: NDArray[np.float64]) -> Estimate:
    return mean_difference(pairs[:, 0], pairs[:, 1])


def _section(parts: Sequence[Table]) -> Section:
    text = (
        "If refusal is decided at the post-instruction tokens, a model that is made to reply right "
        "after the instruction should refuse less."
    )
    return Section("Table 1: without post-instruction tokens", text, tuple(parts))
