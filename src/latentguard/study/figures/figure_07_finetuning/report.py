"""What the attack changed: tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.report.charts import SHARE, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import mean_curve
from latentguard.stats.detection import auroc, estimate_metric
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion
from latentguard.study.figures.figure_07_finetuning.collect import Records
from latentguard.study.figures.figure_07_finetuning.effects import (
    Bools,
    at_best,
    by_layer,
    deciding,
    delta,
    effects_of,
    flags_of,
    hits_of,
    labelled,
    last_stage,
    linear,
    mean,
    of_every_source,
    of_form,
    over_chance,
)
from latentguard.study.figures.figure_07_finetuning.snapshot import Stage
from latentguard.study.finding import Finding, cells
from latentguard.study.settings import Settings

Row = tuple[Cell, ...]

TITLE = "Figures 7 and 18: fine-tuning attack"
COLUMNS = ("model", "figure", "value", "low", "high", "n")
GUARDS = ("Latent Guard (paper's rule, threshold 0)", "linear guard (span, threshold 0)")


def analyse(records: Records, settings: Settings) -> Finding:
    """What the attack did to replies, beliefs, guards and the refusal direction."""
    if not records.stages:
        return Finding(_section(records, ()), {}, (records.reason,))
    before, last = records.stages[0], last_stage(records)
    harmful = labelled(records, harmful=True)
    parts: list[Table | Figure] = [_rates_figure(records)]
    parts += [_belief_figure(records, name) for name in ("harmful", "refuse")]
    parts += [_changes(records), _guards(records), _replies(records, settings)]
    if any(stage.seed for stage in records.stages):
        parts.append(_runs(records))
    effects = effects_of(before, last, harmful)
    effects |= of_every_source(before, last, delta(before)[~harmful])
    effects |= of_form(before, last, records)
    if before.steered:
        parts += [_direction_figure(records), _direction_table(records)]
    if before.steered and last.steered:
        along = "refusal along the direction after fine-tuning minus random"
        effects[along] = over_chance(before, last)
    enough = min(int(harmful.sum()), last.pairs) >= settings.enough
    caveats = tuple(_caveats(records, effects, settings))
    strong_effects = {name: e for name, e in effects.items() if name not in _weak(before, harmful)}
    return Finding(_section(records, parts), strong_effects if enough else {}, caveats)


def _weak(before: Stage, harmful: Bools) -> dict[str, str]:
    """Of guards that do not surely catch half before the attack: effect -> which guard.

    Nothing is concluded of what they lose: a guard that catches nothing cannot lose.
    """
    names = {"guard": ("paper's", delta), "linear guard": ("linear", linear)}
    return {
        f"{name} recall after minus before": which
        for name, (which, scores) in names.items()
        if len(scores(before)) and not proportion(scores(before)[harmful] > 0).low > 0.5
    }


def _section(records: Records, parts: Sequence[Table | Figure]) -> Section:
    text = (
        "The model is fine-tuned on refused harmful prompts with openings that accept them, then "
        "asked harmful prompts that it has not seen and refused before. If fine-tuning changes how "
        "it replies and not what it holds, refusal falls while its beliefs, read with the "
        "centroids from before, and so the guard, stay as they were. The control is fine-tuned on "
        "as many harmless prompts with the model's own replies."
    )
    return Section(TITLE, f"{text} {records.how}." if records.how else text, tuple(parts))


def _caveats(
    records: Records, effects: Mapping[str, Estimate], settings: Settings
) -> Iterator[str]:
    count, before, last = (
        int(labelled(records, harmful=True).sum()),
        records.stages[0],
        last_stage(records),
    )
    if count < settings.enough:
        yield f"Only {count} held-out refused harmful prompts: nothing is concluded of them."
    if last.pairs < settings.enough:
        yield f"Only {last.pairs} pairs to train on: nothing is concluded of so few."
    drop = effects.get("refusal rate drop after fine-tuning")
    if drop is None or drop.low <= 0:
        yield "Fine-tuning did not lower refusal for sure, so beliefs that stay say little."
    if "relative change of Delta_harmful" not in effects:
        yield (
            "Delta_harmful of these prompts is not above 0 before the attack for sure: no relative "
            "change can be told, only that over its gap to harmless prompts."
        )
    for which in _weak(before, labelled(records, harmful=True)).values() if count else ():
        yield (
            f"The {which} guard does not surely catch half of these prompts before: it has little "
            "to lose, so nothing is concluded of its recall."
        )
    if not labelled(records, harmful=False).any():
        yield "No accepted harmless prompt was tested: false positives are unknown."
    if not before.linear:
        yield "There are too few prompts for a linear guard."
    if not before.steered or not last.steered:
        yield (
            "Too few harmful prompts are accepted after fine-tuning, or harmless ones left, for a "
            "refusal direction of the fine-tuned model."
        )


def _replies(records: Records, settings: Settings) -> Table:
    rows: list[Row] = []
    for stage in records.stages:
        for word in ("harmful", "harmless"):
            side = labelled(records, harmful=word == "harmful")
            flags = flags_of(stage.refused)[side]
            judged = flags[~np.isnan(flags)]
            rows.append(_row(stage, f"refusal rate, {word}", proportion, judged > 0))
            whole = np.array(stage.broken, dtype=bool)[side]
            rows.append(_row(stage, f"replies that repeat themselves, {word}", proportion, whole))
            for axis in ("harmful", "refuse"):
                deltas = delta(stage, axis)[side]
                rows.append(_row(stage, f"Delta_{axis}, {word}", mean, deltas))
    recipe = (
        f"rank {settings.finetune_rank}" if settings.finetune_rank else "all weights",
        f"learning rate {settings.finetune_rate:g}",
        f"{settings.finetune_epochs} epochs",
        f"batch {settings.finetune_batch}",
    )
    note = (
        f"Training (not stated in the paper): {', '.join(recipe)}, loss on reply tokens only. "
        "Harmful prompts were chosen because the model refused them, so the rate before is 1 by "
        "choice. Beliefs: mean over layers 1 to L, centroids from before. Intervals: 95 %, Wilson "
        "for shares, bootstrap for means. The paper gives no number: 'almost unchanged'."
    )
    return Table("Replies and beliefs after fine-tuning", COLUMNS, tuple(rows), note)


def _runs(records: Records) -> Table:
    """How much the same attack differs between runs: each figure's mean, least and most."""
    harmful = labelled(records, harmful=True)
    kinds: dict[str, list[Stage]] = {}
    for stage in records.stages[1:]:
        kinds.setdefault(stage.name.partition(", run ")[0], []).append(stage)
    rows = []
    for name, stages in kinds.items():
        figures = {
            "refusal rate, harmful": [_rate(stage, harmful).value for stage in stages],
            "Delta_harmful, harmful": [float(delta(s)[harmful].mean()) for s in stages],
            "Delta_refuse, harmful": [float(delta(s, "refuse")[harmful].mean()) for s in stages],
        }
        for figure, values in figures.items():
            ends = (float(np.mean(values)), min(values), max(values))
            rows.append((name, figure, *ends, len(values)))
    note = (
        "The same pairs with other first weights of the adapters and another order. 'pairs': "
        "openings of at most 24 tokens; 'whole completions': what the paper trains on. The paper "
        "gives no number of runs. Claims are decided by the first run."
    )
    columns = ("model", "figure", "mean of the runs", "least", "most", "runs")
    return Table("Fine-tuning, run by run", columns, tuple(rows), note)


def _guards(records: Records) -> Table:
    harmful, rows = labelled(records, harmful=True), list[Row]()
    for stage in records.stages:
        for name, scores in zip(GUARDS, (delta(stage), linear(stage)), strict=True):
            if not len(scores):
                continue
            rows.append(_row(stage, f"recall, {name}", proportion, scores[harmful] > 0))
            rows.append(_row(stage, f"false positives, {name}", proportion, scores[~harmful] > 0))
            if harmful.any() and not harmful.all():
                area = estimate_metric(auroc, harmful, scores)
                rows.append((stage.name, f"AUROC, {name}", *cells(area)))
    note = (
        "Both guards were fitted before the attack and see it for the first time. Recall is on "
        "held-out refused harmful prompts, false positives on accepted harmless ones."
    )
    return Table("Guards after fine-tuning", COLUMNS, tuple(rows), note)


def _changes(records: Records) -> Table:
    harmful, before = labelled(records, harmful=True), records.stages[0]
    rows = tuple(
        (stage.name, name, *cells(change))
        for stage in records.stages[1:]
        for name, change in _both(before, stage, harmful).items()
    )
    note = (
        "Each held-out harmful prompt against itself before the attack (95 %). What the control "
        "changes is fine-tuning as such. Test sets: refused harmful prompts of the centroids' own "
        "sources first, as in the paper, which decide claim 9; and those of every source alike."
    )
    return Table("Changes by fine-tuning", COLUMNS, rows, note)


def _both(before: Stage, stage: Stage, harmful: Bools) -> dict[str, Estimate]:
    """The changes on both test sets."""
    harmless = delta(before)[~harmful]
    return effects_of(before, stage, harmful) | of_every_source(before, stage, harmless)


def _belief_figure(records: Records, axis: str) -> Figure:
    side = labelled(records, harmful=True)
    curves = {s.name: to_curve(mean_curve(by_layer(s, axis)[side])) for s in records.stages}
    groups = (
        f"n = {int(side.sum())} held-out harmful prompts, refused before; bands: 95 %, bootstrap."
    )
    where, what = ("t_inst", "7") if axis == "harmful" else ("t_post", "18, beside it")
    return lines_by_layer(
        curves,
        range(1, len(records.stages[0].harmful[0]) + 1),
        title=f"\u0394 {axis} at {where} before and after fine-tuning (Figure {what})",
        y=f"s at {where}, {axis} centroids",
        caption=f"{groups} The less the curves part, the less the belief was changed.",
        zero=True,
    )


def _rates_figure(records: Records) -> Figure:
    harmful = labelled(records, harmful=True)
    stages = deciding(records)
    rates = {"refusal rate": [_rate(stage, harmful) for stage in stages]}
    rates["recall, paper's rule"] = [proportion(delta(s)[harmful] > 0) for s in stages]
    if stages[0].linear:
        rates["recall, linear guard"] = [proportion(linear(s)[harmful] > 0) for s in stages]
    return lines_by_layer(
        {name: to_curve(values) for name, values in rates.items()},
        [stage.pairs for stage in stages],
        title="Refusal and recall by size of the attack",
        y="share of harmful prompts",
        limits=SHARE,
        x="training pairs",
        caption=f"n = {int(harmful.sum())} held-out harmful prompts; bands: 95 %, Wilson. A guard "
        "holds if its line stays up where that of refusal falls.",
    )


def _direction_figure(records: Records) -> Figure:
    stages = [stage for stage in records.stages if stage.steered]
    curves = {s.name: to_curve([proportion(row) for row in hits_of(s.steered)]) for s in stages}
    chance = np.concatenate([hits_of(stage.random) for stage in stages], axis=1)
    curves["random direction"] = to_curve([proportion(row) for row in chance])
    return lines_by_layer(
        curves,
        records.layers,
        title="Refusal along the refusal direction after fine-tuning (Figure 18)",
        y="refusal rate on harmless prompts",
        limits=SHARE,
        caption=f"n = {len(stages[0].steered[0])} accepted harmless prompts, every token steered "
        "once; each model along its own direction, from harmless prompts to harmful ones that it "
        "accepts (before: refuses). Bands: 95 %, Wilson. Random: equal norm, every prompt one of "
        "several draws, all models together.",
    )


def _direction_table(records: Records) -> Table:
    rows: list[Row] = []
    for stage in records.stages:
        if not stage.steered:
            continue
        hits, chance = at_best(records.stages[0], stage)
        rows.append(_row(stage, "refusal along its direction", proportion, hits))
        rows.append(_row(stage, "refusal along random", proportion, chance))
        over = over_chance(records.stages[0], stage)
        rows.append((stage.name, "difference", *cells(over)))
        cosine = float(np.mean(stage.cosine))
        rows.append((stage.name, "cosine with the direction from before", cosine, None, None, None))
    note = (
        "Layers are those that were best before the attack, for each half of the prompts the best "
        "of the other half. Cosine: mean over layers 1 to L, with the direction of the centroids; "
        "its value before shows what other prompts alone do. The paper: after fine-tuning it is "
        "still a refusal direction, slightly weaker with more pairs."
    )
    return Table("Refusal direction after fine-tuning", COLUMNS, tuple(rows), note)


def _row(stage: Stage, figure: str, of: Callable[..., Estimate], values: NDArray[Any]) -> Row:
    numbers = cells(of(values)) if len(values) else (None, None, None, 0)
    return (stage.name, figure, *numbers)


def _rate(stage: Stage, side: Bools) -> Estimate:
    flags = flags_of(stage.refused)[side]
    refusals = flags[~np.isnan(flags)] > 0
    return proportion(refusals) if len(refusals) else Estimate(np.nan, np.nan, np.nan, (0, 0))
