"""Tables 5, 10 and 11 and Figure 19: example prompts and replies, in reports that show texts.

The texts are the user's own data and what the model said of them; a report without
``--show-prompts`` has none of these tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from latentguard.prompts import Prompt, Reply
from latentguard.report.document import Section, Table
from latentguard.study.attacks import goal_in
from latentguard.study.axes import belief, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.prompt_groups import PromptGroups, sample_prompts
from latentguard.study.settings import Settings

EXAMPLES = 3
"""Examples in a table."""

LONGEST = 600
"""Characters of a text that are shown."""

HATE = "H"
"""Code of the category of Table 10."""


def examples_section(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings
) -> Section:
    """The four tables; one that has no example is left out."""
    tables = (
        _table_5(model, prompt_groups, settings),
        _table_10(model, prompt_groups, settings),
        _table_11(model, prompt_groups, settings),
        _figure_19(model, prompt_groups, settings),
    )
    text = (
        f"At most {EXAMPLES} examples of each, drawn by the seed, shortened to {LONGEST} "
        "characters. They are in this report because --show-prompts was given."
    )
    return Section("Tables 5, 10, 11 and Figure 19: examples", text, tuple(filter(None, tables)))


def _table_5(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Table | None:
    prompts = prompt_groups.test_prompts("refused_harmless")[:EXAMPLES]
    (replies,) = model.replies(
        prompts, what="Table 5: examples", max_new_tokens=settings.reply_tokens
    )
    rows = tuple((_short(p.text), _short(r.text)) for p, r in zip(prompts, replies, strict=True))
    return _table("Table 5: refused harmless prompts", ("prompt", "reply"), rows)


def _table_10(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Table | None:
    texts = [
        p
        for p in prompt_groups.pools.moderation
        if p.harmful and HATE in (p.category or "").split(",")
    ]
    texts = sample_prompts(texts, settings.test, seed=settings.seed)
    if not texts:
        return None
    axis = fit_axes(model, prompt_groups, enough=settings.enough).harmful
    states = model.states(texts, what="Table 10: examples")
    scores = belief(axis, states.at("t_inst"))
    order = scores.argsort()
    rows = tuple(
        (side, float(scores[i]), _short(texts[i].text))
        for side, order_rows in (("least", order[:EXAMPLES]), ("most", order[::-1][:EXAMPLES]))
        for i in order_rows
    )
    columns = ("harmful (predicted)", "Delta_harmful", "text")
    return _table("Table 10: hateful texts, least and most harmful", columns, rows)


def _table_11(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Table | None:
    attacks = sample_prompts(
        prompt_groups.pools.jailbreaks, len(prompt_groups.pools.jailbreaks), seed=settings.seed
    )
    goals, rows = prompt_groups.pools.harmful, list[tuple[str, str, str]]()
    for kind in dict.fromkeys(p.category or "other" for p in attacks):
        attack = next(p for p in attacks if (p.category or "other") == kind)
        goal = goal_in(attack, goals) or "(not in the harmful pool)"
        rows.append((kind, _short(goal), _short(attack.text)))
    columns = ("kind", "naive harmful instruction", "jailbreak prompt")
    return _table("Table 11: jailbreak prompts", columns, tuple(rows))


def _figure_19(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Table | None:
    """Prompts that are refused with the whole template, and answered without its end."""
    prompts: Sequence[Prompt] = prompt_groups.test_prompts("refused_harmful")
    cut: list[Reply]
    (cut,) = model.replies(
        prompts, what="Figure 19: examples", max_new_tokens=settings.reply_tokens, post=False
    )
    flags = model.refused(cut)
    rows = tuple(
        (_short(p.text), _short(r.text))
        for p, r, refused in zip(prompts, cut, flags, strict=True)
        if refused is False
    )
    title = "Figure 19: replies without post-instruction tokens"
    return _table(title, ("prompt", "reply"), rows[:EXAMPLES])


def _table(
    title: str, columns: tuple[str, ...], rows: tuple[tuple[str | float, ...], ...]
) -> Table | None:
    return Table(title, columns, rows) if rows else None


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
