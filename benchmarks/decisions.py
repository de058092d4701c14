"""Decisions that travel: thresholds in planted worlds, and across public sets, leave-one-out.

    latentguard benchmark GUARD --data-dir D --out REPORT
    python benchmarks/decisions.py GUARD --data-dir D --report REPORT --work DIR --json FILE

Planted worlds: scores are drawn from normal distributions whose shares and shifts are known, so
rates are exact. Public sets: the built-in validation traffic calibrates, as it does by default; one
half of a set, its labels hidden, is the traffic, and the other half is measured. No set calibrates
itself, or another. ``--scores`` adds sets that were scored elsewhere: a JSON object of names, each
with ``scores`` and ``labels``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm

from latentguard import ChatModel, LatentGuard, Verdict
from latentguard.benchmark.run import VERDICTS, load_suite
from latentguard.data.builtin import load_guard_prompts
from latentguard.guard.operating_point import Goal
from latentguard.guard.reliability import errors_by_chance, expected_error
from latentguard.guard.score_files import score_to_file
from latentguard.guard.thresholds import Rates, Thresholds
from latentguard.guard.traffic import ScoreMixture
from latentguard.prompts import Prompt
from latentguard.stats.detection import f1_at, threshold_at

MAX_FPR, HALVES, DRAWS = 0.05, 3, 3

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


def read_sets(data: Path, report: Path) -> Iterator[tuple[str, NDArray[np.bool_], Scores]]:
    """The sets that the benchmark scored: labels and scores of the prompts that are read whole."""
    for one in load_suite(data)[0]:
        path = report / VERDICTS / f"{one.suite_set.name}.jsonl"
        if not path.exists():
            continue
        verdicts = [Verdict.from_dict(json.loads(line)) for line in path.read_text().splitlines()]
        labels = {prompt.id: bool(prompt.harmful) for prompt in one.prompts}
        whole = [verdict for verdict in verdicts if not verdict.evidence]
        harmful = np.array([labels[verdict.id] for verdict in whole])
        if harmful.any() and not harmful.all():
            yield one.suite_set.title, harmful, np.array([verdict.score for verdict in whole])


def read_scores(path: Path | None) -> Iterator[tuple[str, NDArray[np.bool_], Scores]]:
    """Sets that were scored elsewhere; none without a file."""
    for name, one in json.loads(path.read_text()).items() if path else ():
        yield name, np.array(one["labels"], dtype=bool), np.array(one["scores"])


def read_calibration(guard: LatentGuard, model: str, work: Path) -> tuple[Scores, Scores]:
    """Harmless and harmful scores of the built-in validation traffic; scored if they were not."""
    prompts = [p for p in load_guard_prompts("validation") if not guard.is_chunked(p)]
    out = work / "validation.jsonl"
    if not out.exists():
        score_to_file(guard, ChatModel.load(model, dtype=guard.fingerprint.dtype), prompts, out)
    scores = np.array([json.loads(line)["score"] for line in out.read_text().splitlines()])
    harmful = np.array([bool(p.harmful) for p in prompts])
    return scores[~harmful], scores[harmful]


def main() -> None:
    """Planted worlds first; public sets if a guard is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("guard", nargs="?", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--scores", type=Path)
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
        guard = LatentGuard.load(options.guard)
        known = read_calibration(guard, options.model, options.work)
        record["guard"] = {"digest": guard.digest, "model": guard.fingerprint.model}
        record["calibration"] = [len(side) for side in known]
        record["sets"] = {
            name: {"n": len(scores), **travelled(labels, scores, *known, guard.platt)}
            for name, labels, scores in (
                *read_sets(options.data_dir, options.report),
                *read_scores(options.scores),
            )
        }
        save()


if __name__ == "__main__":
    main()
