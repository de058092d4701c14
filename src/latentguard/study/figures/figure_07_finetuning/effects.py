"""What the attack changed, in numbers: each held-out prompt against itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentguard.stats.bootstrap import bootstrap, bootstrap_mean, mean_curve
from latentguard.stats.detection import win_matrix
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import rate_difference, rate_difference_by_direction
from latentguard.study.figures.figure_07_finetuning.collect import Records
from latentguard.study.figures.figure_07_finetuning.snapshot import DIRECTIONS, Stage
from latentguard.study.form_controls import beyond_form, kept_beyond_half
from latentguard.study.steering import at_layers, best_layers

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

OVER_GAP = "change of Delta_harmful over its gap to harmless"


def last_stage(records: Records) -> Stage:
    """The model after most harmful pairs, of those that decide."""
    return deciding(records)[-1]


def deciding(records: Records) -> list[Stage]:
    """Before, and after each size of the attack, of the first run.

    Of whole completions, where there are any, as in the paper; else of openings.
    """
    first = [one for one in records.stages if not (one.control or one.seed)]
    is_whole = any(one.whole for one in first)
    return [one for one in first if not one.pairs or one.whole is is_whole]


def labelled(records: Records, *, harmful: bool) -> Bools:
    """Which prompts have this label, [n]."""
    return np.array([p.harmful is harmful for p in records.prompts])


def effects_of(before: Stage, after: Stage, harmful: Bools) -> dict[str, Estimate]:
    """Changes on the held-out harmful prompts, those that can be told.

    Args:
        before: The model before the attack.
        after: After one.
        harmful: Which of the tested prompts are harmful, [n].
    """
    effects = _of_beliefs(delta(before), delta(after), harmful)
    refused = [flags_of(stage.refused)[harmful] for stage in (before, after)]
    is_judged = ~np.isnan(refused).any(0)
    if is_judged.any():
        drop = rate_difference(refused[0][is_judged], refused[1][is_judged])
        effects["refusal rate drop after fine-tuning"] = drop
    for name, scores in (("guard", delta), ("linear guard", linear)):
        if after.linear or scores is delta:
            caught = [scores(stage)[harmful] > 0 for stage in (after, before)]
            effects[f"{name} recall after minus before"] = rate_difference(*caught)
    return effects


def _of_beliefs(
    before: NDArray[np.float64], after: NDArray[np.float64], harmful: Bools
) -> dict[str, Estimate]:
    """Change of Delta_harmful over its value, and over its distance from harmless prompts."""
    effects, pairs = {}, np.stack([before, after], axis=1)[harmful]
    if mean(pairs[:, 0]).low > 0:
        effects["relative change of Delta_harmful"] = bootstrap(_relative, pairs)
    harmless = before[~harmful]
    if len(harmless) and bootstrap(_gap, pairs, harmless).low > 0:
        effects[OVER_GAP] = bootstrap(_over_gap, pairs, harmless)
    return effects


def of_every_source(before: Stage, after: Stage, harmless: Floats) -> dict[str, Estimate]:
    """The same changes on the other test set: refused harmful prompts of every source.

    Args:
        before: The model before the attack.
        after: After one.
        harmless: Delta_harmful of accepted harmless prompts before, [m].
    """
    pairs = np.array([before.every_source, after.every_source]).T
    if not len(pairs):
        return {}
    effects = {"guard recall after minus before": rate_difference(*(pairs.T[::-1] > 0))}
    flags = [flags_of(stage.every_source_refused) for stage in (before, after)]
    is_judged = ~np.isnan(flags).any(0)
    if is_judged.any():
        drop = rate_difference(flags[0][is_judged], flags[1][is_judged])
        effects["refusal rate drop after fine-tuning"] = drop
    if len(harmless) and bootstrap(_gap, pairs, harmless).low > 0:
        effects[OVER_GAP] = bootstrap(_over_gap, pairs, harmless)
    return {f"{name}, every source": one for name, one in effects.items()}


def of_form(before: Stage, after: Stage, records: Records) -> dict[str, Estimate]:
    """Whether what is left after the attack is more than form."""
    harmful = labelled(records, harmful=True)
    effects: dict[str, Estimate] = {}
    if harmful.all() or not harmful.any():
        return {}
    if len(after.sealed):
        change = np.array(after.sealed) - np.array(before.sealed) / 2
        gap = bootstrap_mean(change[harmful], minus=change[~harmful])
        effects["sealed gap of Delta_harmful kept after it, beyond half"] = gap
    sides = np.array([bool(p.harmful) for p in records.matched], dtype=bool)
    if not sides.any() or sides.all():
        return effects
    matched, form = np.array(after.matched), np.array(records.form)
    wins, by_form = (win_matrix(one[sides], one[~sides]) for one in (matched, form))
    own = win_matrix(delta(after)[harmful], delta(after)[~harmful])
    remainder = kept_beyond_half([wins], [own])
    effects["separation that form-matched prompts keep after it, beyond half"] = remainder
    name = "AUROC on form-matched prompts after it minus that of form"
    return effects | {name: beyond_form([wins], [by_form])}


def over_chance(before: Stage, stage: Stage) -> Estimate:
    """Refusal along the direction minus along chance, where the direction was best before."""
    return rate_difference_by_direction(*at_best(before, stage), DIRECTIONS)


def at_best(before: Stage, stage: Stage) -> tuple[Bools, Bools]:
    """Whether each harmless prompt is refused along the direction, and along chance, [prompts].

    Each half of the prompts is judged at the layer that was best before for the other half.
    """
    picks = best_layers(hits_of(before.steered))
    hits, chance = (at_layers(hits_of(f)[None], picks)[0] for f in (stage.steered, stage.random))
    return hits, chance


def mean(values: NDArray[np.float64]) -> Estimate:
    """Of values [n], with its bootstrap interval."""
    return mean_curve(values[:, None])[0]


def flags_of(flags: Sequence[bool | None]) -> NDArray[np.float64]:
    """1, 0, or nan where nothing could be told, [n]."""
    return np.array(flags, dtype=float)


def hits_of(flags: Sequence[Sequence[bool | None]]) -> Bools:
    """Which replies are known to refuse, [layers prompts]."""
    hits: Bools = np.array(flags, dtype=float) == 1
    return hits


def by_layer(stage: Stage, axis: str) -> NDArray[np.float64]:
    """Beliefs of ``harmful`` or ``refuse``, [n l]."""
    return np.array(getattr(stage, axis), dtype=float)


def delta(stage: Stage, axis: str = "harmful") -> NDArray[np.float64]:
    """Delta of each prompt, [n]; that of harmfulness is the score by the paper's rule."""
    means: NDArray[np.float64] = by_layer(stage, axis).mean(1)
    return means


def linear(stage: Stage) -> NDArray[np.float64]:
    """Scores of the linear guard, [n]."""
    return np.array(stage.linear, dtype=float)


def _relative(pairs: NDArray[np.float64]) -> float:
    before, after = pairs.mean(0)
    return float(after / before - 1)


def _gap(pairs: NDArray[np.float64], harmless: NDArray[np.float64]) -> float:
    return float(pairs[:, 0].mean() - harmless.mean())


def _over_gap(pairs: NDArray[np.float64], harmless: NDArray[np.float64]) -> float:
    return float((pairs[:, 1] - pairs[:, 0]).mean() / _gap(pairs, harmless))
