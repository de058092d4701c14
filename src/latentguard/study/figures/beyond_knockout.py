"""Beyond the paper: does refusal need attention to t_inst? Attention knock-out behind it.

The tokens behind t_inst, t_post among them, no longer see some tokens of the instruction: in every
block, or in a window of blocks. What refusal read there is lost.

Axis names in shapes: c cuts, w windows, n prompts, m judged prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentguard.interventions import Keys, Knockout
from latentguard.prompts import Prompt
from latentguard.report.charts import SHARE_OF_GAP, dot_plot, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import weighted_bootstrap
from latentguard.stats.estimate import Estimate
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import Finding, cells
from latentguard.study.prompt_groups import BEHAVING, PromptGroups, sample_prompts
from latentguard.study.refusal_odds import (
    JUDGED,
    TELLS,
    Openings,
    few_or_vague,
    find_openings,
    rate_text,
    refusal_odds,
)
from latentguard.study.settings import Settings

Array = NDArray[np.float64]

DRAWS = 3
"""Random tokens of each prompt."""

WINDOWS = 4
"""A window is a quarter of the blocks."""


@dataclass(frozen=True)
class Cut:
    """What is not seen, in every block."""

    name: str
    """What is not seen, for people."""

    keys: Keys
    """Which tokens."""

    readers: str = "after"
    """Who does not see them: ``after`` or ``t_post``."""

    draws: int = 1
    """Random tokens that take turns."""


CUTS: tuple[Cut, ...] = (
    Cut("t_inst", "t_inst"),
    Cut("random token", "random", draws=DRAWS),
    Cut("t_inst, for t_post alone", "t_inst", "t_post"),
    Cut("all but t_inst", "all but t_inst"),
    Cut("all but a random token", "all but random", draws=DRAWS),
    Cut("instruction", "instruction"),
    Cut("instruction, t_post alone", "instruction", "t_post"),
)
"""Cuts in every block; each control cuts as many tokens as the cut before it."""

WINDOWED: tuple[Cut, ...] = (CUTS[0], CUTS[1], CUTS[5])
"""Cuts in a window of blocks."""


@dataclass(frozen=True, eq=False)
class CutGroup:
    """One group of prompts under every cut."""

    ids: tuple[str, ...]
    """The n prompts."""

    uncut: Array
    """Log-odds of refusal, [n]."""

    cut: Mapping[str, Array]
    """The same by cut, mean over random tokens, [n]."""

    windows: Mapping[str, Array]
    """The same for cuts in windows, [w n]."""

    refused_uncut: Array
    """Whether replies are refusals, [m]; nan if unclear."""

    refused: Mapping[str, Array]
    """The same by cut, of those that reach the reply, [draws m]."""


@dataclass(frozen=True, eq=False)
class Records:
    """What cut attention does to refusal."""

    first_blocks: tuple[int, ...]
    """First block of each window."""

    width: int
    """Blocks of a window."""

    refused: CutGroup
    """Refused harmful prompts."""

    accepted: CutGroup
    """Accepted harmless prompts."""

    openings: Openings
    """What refusal is read from."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Cut attention in all blocks and in windows of them."""
    openings = find_openings(model, prompt_groups, settings)
    width = max(1, model.depth // WINDOWS)
    first = tuple(range(1, model.depth - width + 2, settings.layer_step))
    groups = []
    for name in BEHAVING:
        long = [p for p in prompt_groups.test_prompts(name) if len(p.text.split()) > 2]
        prompts = sample_prompts(long, settings.interventions, seed=settings.seed)
        groups.append(_cut_group(model, prompts, openings.words, (first, width), settings))
    refused, accepted = groups
    return Records(first, width, refused, accepted, openings)


def _cut_group(
    model: CachedModel,
    prompts: Sequence[Prompt],
    words: Sequence[str],
    windows: tuple[Sequence[int], int],
    settings: Settings,
) -> CutGroup:
    first, width = windows
    every = tuple(range(1, model.depth + 1))
    spans = [tuple(range(start, start + width)) for start in first]
    edits = [edit for one in CUTS for edit in _knockouts(one, every)]
    edits += [edit for one in WINDOWED for span in spans for edit in _knockouts(one, span)]
    uncut, *odds = refusal_odds(model, prompts, [None, *edits], words, what="knock-out")
    rows = iter(odds)
    cut = {one.name: _mean_of(rows, one.draws) for one in CUTS}
    windowed = {one.name: np.array([_mean_of(rows, one.draws) for _ in spans]) for one in WINDOWED}
    judged = prompts[:JUDGED]
    reached = [one for one in CUTS if one.readers == "after"]
    edits = [edit for one in reached for edit in _knockouts(one, every)]
    plain, *odds = model.replies(
        judged, [None, *edits], what="knock-out: replies", max_new_tokens=settings.reply_tokens
    )
    flags = iter([model.refused(of) for of in odds])
    refused = {
        one.name: np.array([next(flags) for _ in range(one.draws)], dtype=float) for one in reached
    }
    ids = tuple(p.id for p in prompts)
    return CutGroup(ids, uncut, cut, windowed, np.array(model.refused(plain), dtype=float), refused)


def _mean_of(rows: Iterator[Array], count: int) -> Array:
    """The mean of the next rows."""
    mean: Array = np.mean([next(rows) for _ in range(count)], axis=0)
    return mean


def _knockouts(one: Cut, blocks: tuple[int, ...]) -> list[Knockout]:
    """One for each random token."""
    return [
        Knockout(blocks, one.keys, one.readers, draw, label=one.name)  # type: ignore[arg-type]
        for draw in range(one.draws)
    ]


def analyse(records: Records, settings: Settings) -> Finding:
    """What share of the gap in refusal each cut takes away."""
    fewest = min(len(records.refused.ids), len(records.accepted.ids))
    parts: list[Table | Figure] = []
    effects: dict[str, Estimate] = {}
    text = ""
    if fewest:
        parts = [_table(records), _figure(records), _windows(records), _windows_table(records)]
    if fewest >= settings.enough and records.openings.tells > TELLS:
        effects = dict(_effects(records))
        text = _sentence(records)
    return Finding(_section(records, text, parts), effects, _caveats(records, settings, fewest))


def lost(before: Array, after: Array, others: Array) -> Estimate:
    """Share of the gap in refusal that is lost: 1 if refused prompts fall to accepted ones.

    Args:
        before: Log-odds of refused harmful prompts, [n].
        after: The same under a cut, [n].
        others: Log-odds of accepted harmless prompts, [k].
    """

    def statistic(w: Array, v: Array) -> Array:
        mean = w / w.sum(1, keepdims=True)
        gap = mean @ before - (v / v.sum(1, keepdims=True)) @ others
        share: Array = (mean @ (before - after)) / gap
        return share

    return weighted_bootstrap(statistic, len(before), len(others))


def _lost(records: Records, after: Array) -> Estimate:
    return lost(records.refused.uncut, after, records.accepted.uncut)


def _beyond(records: Records, cut: str, control: str) -> Estimate:
    """Share of the gap that a cut takes beyond its control."""
    group = records.refused
    shift = group.cut[control] - group.cut[cut]
    return lost(group.uncut, group.uncut - shift, records.accepted.uncut)


def _effects(records: Records) -> Iterator[tuple[str, Estimate]]:
    yield "lost without t_inst", _lost(records, records.refused.cut[CUTS[0].name])
    for cut, control in ((CUTS[0], CUTS[1]), (CUTS[3], CUTS[4])):
        yield f"lost without {cut.name}, beyond random", _beyond(records, cut.name, control.name)
    yield "lost without the instruction", _lost(records, records.refused.cut[CUTS[5].name])


def _sentence(records: Records) -> str:
    shares = {name: _lost(records, odds) for name, odds in records.refused.cut.items()}
    beyond = _beyond(records, CUTS[0].name, CUTS[1].name)
    return (
        f"Where no token behind t_inst sees it, {shares[CUTS[0].name]} of the gap in refusal is "
        f"lost (a random token of the instruction: {shares[CUTS[1].name]}; the difference: "
        f"{beyond}); where t_inst is all that they see of the instruction, "
        f"{shares[CUTS[3].name]} is lost (a random token instead: {shares[CUTS[4].name]}); "
        f"without the whole instruction {shares[CUTS[5].name]}."
    )


def _table(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    groups = (records.refused, records.accepted)
    uncut = [rate_text(group.refused_uncut[None]) for group in groups]
    means = [float(group.uncut.mean()) for group in groups]
    rows.append(("nothing", *means, None, None, None, len(records.refused.ids), *uncut))
    for one in CUTS:
        means = [float(group.cut[one.name].mean()) for group in groups]
        share_lost = _lost(records, records.refused.cut[one.name])
        rates: tuple[Cell, ...] = (None, None)
        if one.name in records.refused.refused:
            rates = tuple(rate_text(group.refused[one.name]) for group in groups)
        ends = (share_lost.value, share_lost.low, share_lost.high, len(records.refused.ids))
        rows.append((one.name, *means, *ends, *rates))
    note = (
        "Cut in every block. Log-odds: mean over prompts. Share lost: of the gap between refused "
        "harmful and accepted harmless prompts; 95 %, bootstrap over the prompts of both groups. "
        f"Random tokens: mean of {DRAWS}. A cut from all tokens goes on while the reply is made; "
        "replies under it are judged, with Wilson or bootstrap intervals."
    )
    columns = (
        *("not seen", "log-odds, refused harmful", "log-odds, accepted harmless"),
        *("share of the gap lost", "low", "high", "n"),
        *("refused: refused harmful", "refused: accepted harmless"),
    )
    return Table("Attention knock-out", columns, tuple(rows), note)


def _figure(records: Records) -> Figure:
    names = [one.name for one in CUTS]
    shares = [_lost(records, records.refused.cut[name]) for name in names]
    caption = (
        f"Share of the gap in refusal that is lost when tokens are not seen from behind t_inst, in "
        f"every block; {len(records.refused.ids)} refused harmful and {len(records.accepted.ids)} "
        f"accepted harmless prompts, 95 % intervals. {records.openings.note}."
    )
    title = "What refusal loses without attention"
    return dot_plot(
        names,
        {"share lost": shares},
        title=title,
        x="share of the gap lost",
        caption=caption,
        limits=SHARE_OF_GAP,
    )


def _windows(records: Records) -> Figure:
    curves = {
        name: to_curve([_lost(records, row) for row in odds])
        for name, odds in records.refused.windows.items()
    }
    caption = (
        f"The same with attention cut in {records.width} blocks alone, from the block named on; "
        f"{len(records.refused.ids)} refused harmful prompts, 95 % intervals."
    )
    title = "Attention knock-out in a window of blocks"
    return lines_by_layer(
        curves,
        records.first_blocks,
        title=title,
        y="share of the gap lost",
        limits=SHARE_OF_GAP,
        caption=caption,
        x="first block of the window",
        zero=True,
    )


def _windows_table(records: Records) -> Table:
    rows = tuple(
        (name, start, start + records.width - 1, *cells(_lost(records, row))[:3], row.shape[0])
        for name, odds in records.refused.windows.items()
        for start, row in zip(records.first_blocks, odds, strict=True)
    )
    columns = ("not seen", "first block", "last block", "share lost", "low", "high", "n")
    note = "Refused harmful prompts. Intervals: 95 %, bootstrap over the prompts of both groups."
    return Table("Attention knock-out by window", columns, rows, note)


def _section(records: Records, sentence: str, parts: list[Table | Figure]) -> Section:
    text = (
        "If refusal reads harm at t_inst, it should be lost where the tokens behind t_inst do not "
        f"see it. {sentence} {records.openings.note}."
    )
    return Section("Beyond the paper: attention knock-out", text, tuple(parts))


def _caveats(records: Records, settings: Settings, fewest: int) -> tuple[str, ...]:
    noun = "prompts of a group"
    return tuple(few_or_vague("Knock-out", records.openings, fewest, noun, settings.enough))
