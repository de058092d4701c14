"""Tables 3, 8 and 9: Latent Guard beside baseline guards (section 5.1, appendix H).

The paper gives accuracy on groups of one label each, where a guard that flags everything looks
perfect. Here the false-positive rate of the same rule at the same threshold stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

from latentguard.report.charts import heat_map
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.detection import separation
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import mean_rate_difference, share
from latentguard.study.detectors import NGRAMS, RANDOM
from latentguard.study.figures.table_03_guards.collect import COLUMNS, Records
from latentguard.study.figures.table_03_guards.compared_guards import PAPER, Scored
from latentguard.study.figures.table_03_guards.user_traffic import label_table, traffic_parts
from latentguard.study.finding import Finding, cells
from latentguard.study.settings import Settings

MINUS = "Latent Guard minus baseline guard accuracy"
OVER_WORDS = "Latent Guard minus n-grams accuracy"
ACCURACY = "Latent Guard accuracy on accepted harmful"
FALSE = "false-positive rate of Latent Guard"


def analyse(records: Records, settings: Settings) -> Finding:
    """Accuracy on each group, what it costs in false positives, and user traffic."""
    parts: list[Figure | Table] = []
    if records.groups:
        parts = [*_figure(records), _table3(records)]
    if records.toxicchat is not None:
        parts.append(label_table(records.toxicchat, "Table 8: ToxicChat"))
    if records.traffic is not None:
        parts += traffic_parts(records.traffic)
    text = (
        "A guard is right on a harmful group if it flags, and on a harmless one if it does not. "
        "Accuracy on a group of one label says little alone, so the false-positive rate of the "
        "same rule, at the same threshold, on accepted harmless and over-refusal prompts stands "
        "beside it. Jailbreaks are those that this model does not refuse. "
        f"{_against(records)} {records.note}."
    )
    section = Section("Tables 3, 8 and 9: guards", text, tuple(parts))
    caveats = (*records.missing, *_caveats(records, settings.enough))
    return Finding(section, _effects(records, settings.enough), caveats)


def _against(records: Records) -> str:
    other = baseline(records)
    kind = "a guard model" if records.models else "no guard model was given"
    return f"Latent Guard's accuracy is compared with that of {other} ({kind})."


def baseline(records: Records) -> str:
    """What Latent Guard is compared with: the first guard model, or n-grams if there is none."""
    return records.models[0] if records.models else NGRAMS


def _table3(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    wrong = records.harmless
    for group in records.groups:
        for rule in group.scores:
            cost: tuple[Cell, ...] = (None,) * 4
            area: tuple[Cell, ...] = (None,) * 3
            if wrong is not None:
                cost = cells(share(wrong.flags(rule)))
                if group.prompts[0].harmful:
                    area = cells(separation(group.scores[rule], wrong.scores[rule]))[:3]
            rows.append((group.name, rule, *cells(share(group.right(rule))), *cost, *area))
    note = (
        "Accuracy: flagged, of harmful groups; not flagged, of harmless ones. False positives and "
        "AUROC: against accepted harmless and over-refusal prompts. Intervals: 95 %, Wilson "
        f"(bootstrap over prompts for AUROC and for the {RANDOM}, mean over its draws). The "
        "paper, Latent Guard and Llama Guard 3 on suffix, persuasion, template, refused harmless, "
        "accepted harmful: Llama2 1.000 0.416 1.000 1.000 0.939 and 1.000 0.000 0.760 0.844 0.455; "
        "Llama3 0.910 0.650 1.000 0.785 0.593 and 0.992 0.068 0.500 0.500 0.373; "
        "Qwen2-7B 1.000 0.750 0.535 0.916 0.546 and 0.978 0.178 0.914 0.500 0.594. It has no "
        "false-positive rate."
    )
    ends = ("low", "high")
    columns = (
        *("group", "guard", "accuracy", *ends, "n"),
        *("false positives", *(f"false positives, {end}" for end in ends), "n harmless"),
        *("AUROC", *(f"AUROC, {end}" for end in ends)),
    )
    return Table("Table 3: guards on each group", columns, tuple(rows), note)


def _figure(records: Records) -> Iterator[Figure]:
    """Accuracy of each guard on each group, and its false positives."""
    if not records.groups or records.harmless is None:
        return
    rules = list(records.groups[0].scores)
    values = [[float(group.right(rule).mean()) for rule in rules] for group in records.groups]
    values.append([float(records.harmless.flags(rule).mean()) for rule in rules])
    groups = [*(group.name for group in records.groups), "FALSE POSITIVES"]
    counts = [f"{g.name} {len(g.prompts)}" for g in (*records.groups, records.harmless)]
    caption = (
        "Accuracy of each guard (columns) on each group (rows); in the last row, the share of "
        f"accepted harmless and over-refusal prompts that it flags. n: {', '.join(counts)}."
    )
    yield heat_map(values, groups, rules, title="What each guard gets right", caption=caption)


def _effects(records: Records, enough: int) -> dict[str, Estimate]:
    effects: dict[str, Estimate] = {}
    for group in records.groups:
        if group.name == "accepted harmful" and len(group.prompts) >= enough:
            effects[ACCURACY] = share(group.right(PAPER))
    if records.harmless is not None and len(records.harmless.prompts) >= enough:
        effects[FALSE] = share(records.harmless.flags(PAPER))
    columns = _columns(records, enough)
    if columns:
        other = baseline(records)
        pairs = [(g.right(PAPER).mean(0), g.right(other).mean(0)) for g in columns]
        name = MINUS if records.models else OVER_WORDS  # the claim is about a dedicated guard
        effects[name] = mean_rate_difference(pairs)
    return effects


def _columns(records: Records, enough: int) -> list[Scored]:
    """The groups that are columns of the paper's Table 3, where they are large enough."""
    names = ("jailbreak: ", *(name.replace("_", " ") for name in COLUMNS))
    large = (group for group in records.groups if len(group.prompts) >= enough)
    return [group for group in large if group.name.startswith(names)]


def _caveats(records: Records, enough: int) -> Iterator[str]:
    for group in records.groups:
        if len(group.prompts) < enough:
            yield f"Only {len(group.prompts)} prompts in {group.name}: nothing is concluded of it."
    if records.harmless is None:
        yield "No harmless prompt is tested, so no false-positive rate is known."
    if not _columns(records, enough):
        yield "No group of Table 3 is large enough to compare guards."
