"""The confound page: what surface form gives away, and each headline number again without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from latentguard.report.charts import heat_map
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import bootstrap_mean
from latentguard.stats.detection import combine_areas, separation, win_matrix
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion
from latentguard.study.detectors import FORM, LENGTH, NGRAMS, Scores
from latentguard.study.figures.confound.collect import OWN, PLAIN, SIDES, ReadSet, Records
from latentguard.study.figures.confound.readings import PAPER, SEALED
from latentguard.study.figures.confound.surface_table import audit_table
from latentguard.study.finding import Finding, cells
from latentguard.study.form_controls import beyond_form, kept_beyond_half
from latentguard.study.settings import Settings

Pair = tuple[Scores, Scores]
"""Scores of the harmful and of the harmless prompts of a set."""


AGAIN = "AUROC of Delta_harmful on form-matched sets"
LOSS = "loss of AUROC from the paper's sets to form-matched sets"
KEPT = "separation that form-matched sets keep, beyond half"
OVER_FORM = "AUROC on form-matched sets minus that of form"
SEALED_BELIEF = "sealed Delta_harmful"

TEXT = (
    "Harmful and harmless sets of different origin differ in form: one asks, the other commands; "
    "one ends in a full stop. Whatever reads the last token of an instruction reads form too. So "
    "each set is audited without any model, and each headline number is measured again on "
    "form-matched sets, with an axis fitted on form-matched prompts, and with the ending of every "
    "instruction made uniform (sealed); beside it stand what length, n-grams, all of form "
    "(n-grams, ending, form, length) and random directions of equal norm reach, turned by the same "
    "prompts as the paper's axis."
)


def analyse(records: Records, settings: Settings) -> Finding:
    """Audits, the three headline numbers on every set by every reading, and what is lost."""
    complete_sets = [s for s in records.sets if all(len(one) for one in _sides(s).values())]
    tables = (
        audit_table(records.audited),
        _telling(complete_sets),
        _accepted(records),
        _refusing(records),
    )
    figures: list[Figure | Table] = [_figure(complete_sets)] if complete_sets else []
    parts = (*figures, *(table for table in tables if table.rows))
    section = Section("The confound of surface form", f"{TEXT} {records.note}.", parts)
    caveats = (*records.missing, *_caveats(records, settings.enough))
    return Finding(section, _effects(records, settings.enough), caveats)


def _area_cells(area: Estimate) -> tuple[Cell, ...]:
    return (area.value, area.low, area.high, *area.n)


def _sides(one: ReadSet) -> dict[str, list[int]]:
    """Rows of the harmful and of the harmless prompts."""
    return {
        name: [i for i, p in enumerate(one.prompts) if p.harmful is side]
        for name, side in SIDES.items()
    }


def _pair(one: ReadSet, scores: Scores) -> Pair:
    """Scores of the harmful and of the harmless prompts."""
    sides = _sides(one)
    return scores[:, sides["harmful"]], scores[:, sides["harmless"]]


def _telling(sets: Sequence[ReadSet]) -> Table:
    rows = tuple(
        (one.name, reading, *_area_cells(separation(*_pair(one, scores))))
        for one in sets
        for reading, scores in one.harmful.items()
    )
    note = (
        "AUROC of Delta_harmful at t_inst between harmful and harmless prompts; 0.5 is nothing. "
        "Random directions: mean over the draws. Intervals: 95 % bootstrap. The paper has no "
        "form-matched set."
    )
    columns = ("set", "reading", "AUROC", "low", "high", "n harmful", "n harmless")
    return Table("Harmful or harmless, again", columns, rows, note)


def _accepted(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in records.sets:
        members = [i for i, p in enumerate(one.prompts) if p.group == "accepted_harmful"]
        for reading, scores in one.harmful.items():
            if members and reading not in (LENGTH, NGRAMS, FORM):  # in their own units
                values = scores[:, members].mean(0)
                side = proportion(values > 0)
                mean = bootstrap_mean(values)
                rows.append((one.name, reading, *cells(mean), side.value, side.low, side.high))
    note = (
        "Mean over the layers of s at t_inst (equation 2): above 0 is the harmful side (section "
        "3.2, Figure 2, where the paper finds accepted harmful prompts). Random directions: from "
        "midway between the classes they were turned by."
    )
    share = ("share above 0", "share, low", "share, high")
    columns = ("set", "reading", "mean s", "low", "high", "n", *share)
    return Table("Accepted harmful prompts at t_inst, again", columns, tuple(rows), note)


def _refusing(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one, label, refused, accepted in _decided(records):
        if refused and accepted:
            for reading, scores in one.refuse.items():
                area = separation(scores[:, refused], scores[:, accepted])
                rows.append((one.name, label, reading, *_area_cells(area)))
    note = (
        "AUROC of Delta_refuse at t_post between refused and accepted prompts of one label, so "
        "that harmfulness itself cannot help. 0.5 is nothing. Intervals: 95 % bootstrap."
    )
    columns = ("set", "among", "reading", "AUROC", "low", "high", "n refused", "n accepted")
    return Table("Refused or accepted within one label, again", columns, tuple(rows), note)


def _decided(records: Records) -> Iterator[tuple[ReadSet, str, list[int], list[int]]]:
    """Each set and label, with the rows that were refused and those that were accepted."""
    for one in (one for one in records.sets if one.name != PLAIN):
        for label, rows in _sides(one).items():
            refused, accepted = (
                [i for i in rows if one.prompts[i].refused is was] for was in (True, False)
            )
            yield one, label, refused, accepted


def _figure(sets: Sequence[ReadSet]) -> Figure:
    readings = list(sets[0].harmful)
    values = [
        [separation(*_pair(one, one.harmful[name])).value for one in sets] for name in readings
    ]
    count = "; ".join(
        f"{one.name}: {len(_sides(one)['harmful'])} and {len(_sides(one)['harmless'])}"
        for one in sets
    )
    caption = (
        f"AUROC of each reading (rows) on each set (columns); 0.5 is chance. n (harmful and "
        f"harmless): {count}. A reading that falls from the paper's own sets to the others "
        "reads form."
    )
    names, title = [one.name for one in sets], "Harmful or harmless by reading and set"
    return heat_map(values, readings, names, title=title, caption=caption)


def _effects(records: Records, enough: int) -> dict[str, Estimate]:
    """The paper's axis on form-matched sets: mean over the sets, each side resampled on its own."""
    sets = {one.name: one for one in records.sets if min(map(len, _sides(one).values())) >= enough}
    own = sets.pop(OWN, None)
    sets.pop(PLAIN, None)
    effects = {} if own is None else _sealed_effects(own, enough)
    if not sets:
        return effects
    wins = [win_matrix(*_pair(one, one.harmful[PAPER])) for one in sets.values()]
    each = [1.0 / len(wins)] * len(wins)
    effects[AGAIN] = combine_areas(wins, each)
    if all(FORM in one.harmful for one in sets.values()):
        by_form = [win_matrix(*_pair(one, one.harmful[FORM])) for one in sets.values()]
        effects[OVER_FORM] = beyond_form(wins, by_form)
    if own is not None:
        whole = win_matrix(*_pair(own, own.harmful[PAPER]))
        effects[LOSS] = combine_areas([whole, *wins], [1.0, *(-factor for factor in each)])
        effects[KEPT] = kept_beyond_half(wins, [whole])
    return effects


def _sealed_effects(own: ReadSet, enough: int) -> dict[str, Estimate]:
    """Where both misbehaving groups lie at t_inst when every ending is the same."""
    if SEALED not in own.harmful:
        return {}
    values = own.harmful[SEALED].mean(0)
    groups = np.array([p.group for p in own.prompts])
    harmful, harmless = (values[groups == g] for g in ("accepted_harmful", "refused_harmless"))
    effects = {}
    if len(harmless) >= enough:
        effects[f"{SEALED_BELIEF} of refused harmless"] = bootstrap_mean(harmless)
        if len(harmful) >= enough:
            gap = f"{SEALED_BELIEF}, accepted harmful minus refused harmless"
            effects[gap] = bootstrap_mean(harmful, minus=harmless)
    return effects


def _caveats(records: Records, enough: int) -> Iterator[str]:
    names = [one.name for one in records.sets]
    if not set(names) - {OWN, PLAIN}:
        yield "There is no form-matched set, so the confound cannot be measured."
    if OWN not in names:
        yield "No prompt was held out, so nothing is known of the paper's own test groups."
    for one in records.sets:
        for label, rows in _sides(one).items():
            if len(rows) < enough:
                yield f"Only {len(rows)} {label} prompts in {one.name}: nothing is concluded of it."
    for one, label, refused, accepted in _decided(records):
        if one.refuse and min(len(refused), len(accepted)) < enough:
            yield (
                f"Among the {label} prompts of {one.name}, {len(refused)} are refused and "
                f"{len(accepted)} accepted: too few to say what Delta_refuse reads there."
            )
