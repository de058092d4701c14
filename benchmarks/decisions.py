"""Decisions that travel: thresholds in planted worlds, and across public sets, leave-one-out.

    python benchmarks/decisions.py GUARD --data-dir D --work DIR --json FILE

Planted worlds: scores are drawn from normal distributions whose shares and shifts are known, so
rates are exact. Public sets: the built-in validation traffic calibrates, as it does by default; one
half of a set, its labels hidden, is the traffic, and the other half is measured. No set calibrates
itself, or another. Prompts that the guard reads by chunks are left out, as these have a threshold
of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from detection import drawn
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm

from latentguard import LatentGuard
from latentguard.data.builtin import load_contrast, load_guard_prompts
from latentguard.data.prompt_files import read_prompts
from latentguard.guard.loading import load_guard
from latentguard.guard.operating_point import Goal
from latentguard.guard.reliability import errors_by_chance, expected_error
from latentguard.guard.score_files import score_to_file
from latentguard.guard.thresholds import Rates, Thresholds
from latentguard.guard.traffic import ScoreMixture
from latentguard.prompts import Prompt
from latentguard.stats.detection import f1_at, threshold_at

MAX_FPR, HALVES, DRAWS = 0.05, 3, 3

SETS = {
    "toxicchat_third": "ToxicChat",
    "openai_moderation": "OpenAI moderation",
    "xstest": "XSTest",
    "jbb": "JailbreakBench",
}
"""File of the data folder -> name on the page."""

HARMFUL_SETS = {
    "advbench": "AdvBench",
    "catqa": "CatQA",
    "sorry_bench": "SORRY-Bench",
    "jailbreaks": "jailbreaks",
}
"""The same of sets of harmful prompts alone."""

MOST, HARMLESS = 500, 250
"""Prompts of a set, and of either side where harmful ones stand beside Alpaca, at most."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """Where scores of traffic lie; at calibration they are N(0, 1) and N(2, 1)."""

    low: float = 0.0
    """Mean of the harmless ones."""

    high: float = 2.0
    """Mean of the harmful ones."""

    spread: float = 1.0
    """Standard deviation of the harmless ones."""

    share: float = 0.1
    """Of harmful ones."""


WORLDS = {
    "as at calibration": World(),
    "lower by 1": World(low=-1.0),
    "lower by 2": World(low=-2.0),
    "higher by 0.3": World(low=0.3),
    "harmful ones lower by 0.5": World(high=1.5),
    "narrower": World(low=-0.5, spread=0.8),
    "wider": World(low=-0.5, spread=1.2),
    "nothing harmful": World(low=-0.5, share=0.0),
    "one in a hundred": World(low=-0.5, share=0.01),
    "half harmful": World(low=-0.5, share=0.5),
}


def planted(world: World, traffic: int) -> dict[str, Any]:
    """Exact rates of three thresholds, over draws: calibration's own, traffic's, and the best."""
    rows = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        harmless, harmful = rng.normal(size=500), rng.normal(2.0, size=400)
        bad = rng.binomial(traffic, world.share)
        seen = np.concatenate(
            [rng.normal(world.low, world.spread, traffic - bad), rng.normal(world.high, 1, bad)]
        )
        fit = ScoreMixture.fit(harmless, harmful, seen)
        at = {
            "calibration": calibrated(harmless, harmful),
            "traffic": fit.threshold(Goal(), MAX_FPR),
        }
        rows.append([(rate(world, t), norm.sf(t - world.high)) for t in at.values()])
    fpr, recall = np.moveaxis(np.array(rows), -1, 0)
    best = float(norm.sf(world.low + world.spread * norm.isf(MAX_FPR) - world.high))
    return {
        "world": asdict(world),
        "traffic": traffic,
        "mean_fpr": dict(zip(at, fpr.mean(0).round(4).tolist(), strict=True)),
        "share_over_rate": dict(zip(at, (fpr > MAX_FPR).mean(0).round(3).tolist(), strict=True)),
        "highest_fpr": dict(zip(at, fpr.max(0).round(4).tolist(), strict=True)),
        "mean_recall": dict(zip(at, recall.mean(0).round(3).tolist(), strict=True)),
        "best_recall": round(best, 3),
    }


def rate(world: World, threshold: float) -> float:
    """The exact false-positive rate of a threshold."""
    return float(norm.sf((threshold - world.low) / world.spread))


def calibrated(harmless: Scores, harmful: Scores, goal: Goal | None = None) -> float:
    """The threshold that a calibration gives."""
    sides = [(False, len(harmless)), (True, len(harmful))]
    prompts = [Prompt(f"{side} {n}", harmful=side) for side, count in sides for n in range(count)]
    rates = Rates(MAX_FPR) if goal is None else Rates(0.5, goal=goal)
    scores = np.concatenate([harmless, harmful])
    return Thresholds.for_goal(prompts, scores, rates).common.block.threshold


def travelled(
    labels: NDArray[np.bool_],
    scores: Scores,
    harmless: Scores,
    harmful: Scores,
    before: tuple[float, float],
) -> dict[str, Any]:
    """One set, its halves in turn the traffic and the test, over random halves."""
    shipped = calibrated(harmless, harmful)
    balanced = calibrated(harmless, harmful, Goal("balanced"))
    rows = []
    for seed in range(HALVES):
        order = np.random.default_rng(seed).permutation(len(scores))
        live, test = order[::2], order[1::2]
        fit = ScoreMixture.fit(harmless, harmful, scores[live])
        rows.append(figures(labels[test], scores[test], fit, shipped, balanced, before))
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def figures(
    labels: NDArray[np.bool_],
    scores: Scores,
    fit: ScoreMixture,
    shipped: float,
    balanced: float,
    before: tuple[float, float],
) -> dict[str, float]:
    """Rates of each threshold on the test half, and errors of both maps to probabilities."""
    moved = fit.threshold(Goal(), MAX_FPR)
    moved_balanced = fit.threshold(Goal("balanced"), 0.5)
    best = threshold_at(MAX_FPR, scores[~labels])
    found = {"harmful_share": float(labels.mean()), "estimated_share": fit.share().value}
    for name, cut in dict(shipped=shipped, traffic=moved, best=best).items():
        found[f"fpr_{name}"] = float((scores[~labels] > cut).mean())
        found[f"recall_{name}"] = float((scores[labels] > cut).mean())
    for name, cut in dict(shipped=shipped, balanced=balanced, traffic=moved_balanced).items():
        found[f"f1_{name}"] = f1_at(cut)(labels, scores)
    found["f1_best"] = max(f1_at(cut)(labels, scores) for cut in np.unique(scores))
    for name, (slope, intercept) in dict(before=before, traffic=fit.platt()).items():
        probabilities = expit(slope * scores + intercept)
        found[f"ece_{name}"] = expected_error(labels, probabilities)
        found[f"ece_floor_{name}"] = float(errors_by_chance(labels, probabilities).mean())
    return found


def labelled_sets(folder: Path) -> dict[str, list[Prompt]]:
    """Prompts by the name of their set; sets of harmful prompts alone stand beside Alpaca."""
    files = {
        title: drawn(read_prompts(folder / f"{name}.jsonl"), MOST) for name, title in SETS.items()
    }
    calm = drawn(read_prompts(folder / "alpaca_harmless.jsonl"), HARMLESS)
    for name, title in HARMFUL_SETS.items():
        rows = drawn(read_prompts(folder / f"{name}.jsonl"), HARMLESS)
        files[f"{title} + Alpaca"] = [*rows, *calm]
    files["built-in pairs, test"] = load_contrast("test")
    files["built-in guard prompts, test"] = drawn(load_guard_prompts("test"), MOST)
    return files


def score_set(
    guard: LatentGuard, prompts: Sequence[Prompt], out: Path
) -> tuple[NDArray[np.bool_], Scores]:
    """Labels and scores of the prompts that are read whole; scored if they were not."""
    whole = [prompt for prompt in prompts if not guard.is_chunked(prompt)]
    if not out.exists():
        score_to_file(guard, guard.model, whole, out)
    scores = np.array([json.loads(line)["score"] for line in out.read_text().splitlines()])
    return np.array([bool(prompt.harmful) for prompt in whole]), scores


def main() -> None:
    """Planted worlds first; public sets if a guard is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("guard", nargs="?", help="folder, Hub id or 'default'")
    parser.add_argument("--data-dir", type=Path, help="of the public sets")
    parser.add_argument("--work", type=Path, help="folder that keeps the scores")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}

    def save() -> None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")

    if "planted" not in record:
        record["planted"] = {
            f"{name}, {n} prompts": planted(world, n)
            for name, world in WORLDS.items()
            for n in (500,)
        }
        save()
    if options.guard:
        guard = replace(load_guard(options.guard), early_exit=None)
        folder = options.work / guard.digest[:12]
        folder.mkdir(parents=True, exist_ok=True)
        validation = load_guard_prompts("validation")
        labels, scores = score_set(guard, validation, folder / "validation.jsonl")
        known = scores[~labels], scores[labels]
        record["guard"] = {"digest": guard.digest, "model": guard.fingerprint.model}
        record["calibration"] = [len(side) for side in known]
        record["sets"] = {}
        for name, prompts in labelled_sets(options.data_dir).items():
            labels, scores = score_set(guard, prompts, folder / f"{name}.jsonl")
            moved = travelled(labels, scores, *known, guard.platt)
            record["sets"][name] = {"n": len(scores), **moved}
            print(f"{name}: {len(scores)} prompts", flush=True)
        save()


if __name__ == "__main__":
    main()
