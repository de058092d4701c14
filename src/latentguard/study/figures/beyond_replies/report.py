"""Beliefs along the reply as curves, and their change beside the controls; it decides no claim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from latentguard.report.charts import Curve, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.report.page_table import format_interval
from latentguard.stats.estimate import Estimate
from latentguard.study.figures.beyond_replies.changes import (
    ACCEPTED,
    HARMLESS,
    JAILBROKEN,
    OWN,
    REFUSED,
    Change,
    Records,
    ReplyGroup,
    answer,
    change_of,
    last_third,
    spread,
)
from latentguard.study.figures.beyond_replies.collect import DRAWS
from latentguard.study.finding import CELLS, Finding, cells, too_few
from latentguard.study.settings import Settings

COMPLYING = (ACCEPTED, JAILBROKEN)
"""Groups of harmful requests that the model answers."""

BELIEFS = ("\u0394 harmful", "\u0394 refuse")
BEYOND = "own less accepted harmless replies"


def analyse(records: Records, settings: Settings) -> Finding:
    """Both beliefs by token, and their change beside the controls; it decides no claim."""
    groups = {name: group for name, group in records.groups.items() if _has_replies(group)}
    enough = {name: group for name, group in groups.items() if len(group) >= settings.enough}
    changes = {
        (name, belief): change_of(group, b, enough.get(HARMLESS) if name != HARMLESS else None)
        for name, group in groups.items()
        for b, belief in enumerate(_beliefs(group))
    }
    parts: list[Table | Figure] = []
    if groups:
        answers = _answers(groups, changes, settings.enough)
        parts = [*_figures(groups, answers), _levels(groups, changes), _controls(changes)]
    effects = {
        f"change of {belief} along the reply: {name}": change.own
        for (name, belief), change in changes.items()
        if name in enough
    }
    return Finding(_section(records, parts), effects, _caveats(records, settings))


def _has_replies(group: ReplyGroup) -> bool:
    return bool(np.isfinite(group.beliefs[OWN][:, 1:, 0, 0]).any())


def _beliefs(group: ReplyGroup) -> tuple[str, ...]:
    """Names of the beliefs that were read; that of refusal needs its axis."""
    return BELIEFS[: group.beliefs[OWN].shape[-1]]


def _answers(
    groups: Mapping[str, ReplyGroup], changes: Mapping[tuple[str, str], Change], enough: int
) -> str:
    """The finding: does the belief of harm rise while the model complies?"""
    clauses = []
    for name in COMPLYING:
        count = len(groups.get(name, ()))
        if count < enough:
            clauses.append(f"{name}: {count} are too few to say")
            continue
        change = changes[name, BELIEFS[0]]
        beyond = f"; beyond harmless replies {_interval(change.excess)}" if change.excess else ""
        numbers = f"{_interval(change.own)} from t_post to the last third{beyond}"
        clauses.append(f"{name}: {answer(change)} ({numbers})")
    return f"Does \u0394 harmful rise while the model complies? {_capitalized('; '.join(clauses))}."


def _interval(estimate: Estimate) -> str:
    return format_interval(estimate.value, estimate.low, estimate.high)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _figures(groups: Mapping[str, ReplyGroup], answers: str) -> Iterator[Figure]:
    """A figure for each belief, on a scale of its own."""
    control = next(name for name in (*COMPLYING, REFUSED, HARMLESS) if name in groups)
    counts = ", ".join(f"{len(group)} {name}" for name, group in groups.items())
    about = (
        "Mean at t_post (0) and at each token of the model's own reply, as read and less the mean "
        f"of accepted harmless replies at the same token; 95 % intervals; n: {counts}. A curve "
        f"ends where fewer than half of its replies go on. Grey: {DRAWS} random directions of "
        f"equal norm along {control} replies, mean and 95 % of them."
    )
    for b, belief in enumerate(_beliefs(groups[control])):
        caption = f"{answers} {about}" if b == 0 else f"The same of {belief}; n: {counts}."
        yield _lines(groups, control, b, caption=caption)


def _lines(groups: Mapping[str, ReplyGroup], control: str, b: int, *, caption: str) -> Figure:
    """One belief as it is read, and less that of harmless replies if there are any."""
    curves: dict[str, Curve] = {}
    panels: dict[str, tuple[str, ...]] = {}
    for head, harmless in (("as read", None), (f"less {HARMLESS} replies", groups.get(HARMLESS))):
        shown = [name for name in groups if name != HARMLESS or harmless is None]
        if panels and (harmless is None or control not in shown):
            continue
        own = {f"{name}, {head}": _curve(groups[name], b, harmless) for name in shown}
        own[f"random directions, {head}"] = _random_curve(groups[control], b, harmless)
        panels[head] = tuple(own)
        curves |= own
    return lines_by_layer(
        curves,
        tuple(range(max(len(values) for values, _, _ in curves.values()))),
        title=f"Belief of {('harmfulness', 'refusal')[b]} along the reply",
        y=BELIEFS[b],
        caption=caption,
        x="token of the reply (0: t_post)",
        zero=True,
        panels=panels,
    )


def _curve(group: ReplyGroup, b: int, harmless: ReplyGroup | None) -> Curve:
    estimates = []
    for at in range(_shown(group, harmless)):
        minus = None if harmless is None else harmless.beliefs[OWN][:, at, 0, b]
        estimate = group.mean(group.beliefs[OWN][:, at, 0, b], minus)
        assert estimate is not None
        estimates.append(estimate)
    return to_curve(estimates)


def _random_curve(group: ReplyGroup, b: int, harmless: ReplyGroup | None) -> Curve:
    shown = slice(_shown(group, harmless))
    draws = np.nanmean(group.beliefs[OWN][:, shown, 1:, b], axis=0)
    if harmless is not None:
        draws = draws - np.nanmean(harmless.beliefs[OWN][:, shown, 1:, b], axis=0)
    return to_curve([*map(spread, draws)])


def _shown(group: ReplyGroup, harmless: ReplyGroup | None) -> int:
    """How many tokens, t_post included, at least half of the replies have."""
    shown = []
    for one in (group, harmless or group):
        there = np.isfinite(one.beliefs[OWN][:, :, 0, 0]).mean(0)
        shown.append(int((there >= 0.5).sum()))
    return min(shown)


def _levels(groups: Mapping[str, ReplyGroup], changes: Mapping[tuple[str, str], Change]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for (name, belief), change in changes.items():
        group = groups[name]
        values = group.beliefs[OWN][:, :, 0, BELIEFS.index(belief)]
        tokens = float(np.isfinite(values[:, 1:]).sum(1).mean())
        t_inst = group.at_t_inst[:, 0, BELIEFS.index(belief)]
        means = [group.mean(of) for of in (t_inst, values[:, 0], last_third(values))]
        levels = (cell for e in means if e is not None for cell in cells(e)[:3])
        rows.append((name, belief, *levels, *cells(change.own), tokens))
    columns = (
        *("prompts", "belief", "at t_inst", "t_inst: low", "t_inst: high"),
        *("at t_post", "t_post: low", "t_post: high"),
        *("last third", "last third: low", "last third: high"),
        *("change", "change: low", "change: high", "n", "tokens"),
    )
    note = (
        "Last third: mean over the last third of each reply's tokens. Tokens: mean length of the "
        "replies, cut at the longest that is judged. Intervals: 95 % bootstrap over requests and "
        "wrappers."
    )
    return Table("Beliefs along the reply by group", columns, tuple(rows), note)


def _controls(changes: Mapping[tuple[str, str], Change]) -> Table:
    rows = [
        (name, belief, *row)
        for (name, belief), change in changes.items()
        for row in _control_rows(change)
    ]
    note = (
        "Each row is a change from t_post to the last third of the reply. Differences of replies "
        "are paired by prompt. Another prompt of the group: the next one with another request and "
        "another reply. Random directions: mean and the middle 95 % of them; n counts directions. "
        "Other intervals: 95 % bootstrap over requests and wrappers; where accepted harmless "
        "replies are taken off, n counts both sides."
    )
    return Table(
        "Change along the reply beside controls",
        ("prompts", "belief", "figure", *CELLS),
        tuple(rows),
        note,
    )


def _control_rows(change: Change) -> Iterator[tuple[Cell, ...]]:
    yield (OWN, *cells(change.own))
    yield ("random directions", *cells(change.chance))
    if change.excess is not None and change.chance_excess is not None:
        yield (BEYOND, *cells(change.excess))
        yield (f"{BEYOND}, random directions", *cells(change.chance_excess))
    for whose, (theirs, difference) in change.others.items():
        yield (whose, *cells(theirs))
        yield (f"own less {whose}", *cells(difference))


def _section(records: Records, parts: list[Table | Figure]) -> Section:
    text = (
        "Both beliefs of Figure 3 are read at each token of the model's own reply. The axes were "
        "fitted at t_inst and t_post, so a change that all groups share is one of place; what "
        "counts is the change beyond accepted harmless replies and beyond random directions. A "
        "belief at one token also depends on which token it is, such as a comma. "
        "Jailbroken: accepted attacks of Figure 6, given ones and templates of our own. Where a "
        "harmless prompt's reply raises a belief less, the words of the reply count, by their harm "
        "or by their form. "
        f"{records.note}."
    )
    return Section("Beyond the paper: beliefs along the reply", text, tuple(parts))


def _caveats(records: Records, settings: Settings) -> tuple[str, ...]:
    lines = []
    for name, group in records.groups.items():
        count = len(group) if _has_replies(group) else 0
        lines += too_few("Beliefs along the reply", count, f"{name} prompts", settings.enough)
    if any(len(_beliefs(group)) < len(BELIEFS) for group in records.groups.values()):
        lines.append(
            "Too few prompts are refused for a refusal axis: it is not read along replies."
        )
    return tuple(lines)
