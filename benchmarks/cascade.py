"""A cascade in planted worlds, and on labelled sets.

    python benchmarks/cascade.py SECOND --data-dir D --work DIR --json FILE

Planted worlds: both scores are drawn from normal distributions, so the rates of each calibration
are known. Without SECOND, these are all.

Labelled sets: a small guard first, another guard where the first is not sure. Both guards read some
prompts of each set once; all else is computed from their verdicts. In each of several splits, half
of the harmless prompts of all sets calibrate: the first alone, the second alone, and the cascade,
at one rate. The other half and all harmful prompts are measured. So the promise is one for this
mixture, and sets differ around it. Prompts that a guard reads by chunks have no review band and are
left out. Latency is processor time of prompts read one at a time, so that other work on the machine
does not count.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentguard import LatentGuard, Prompt, Verdict, read_prompts
from latentguard.guard.cascade import calibrate_cascade
from latentguard.guard.hub import find_guard
from latentguard.guard.score_files import score_to_file
from latentguard.guard.thresholds import Rates
from latentguard.stats.bounds import JointBounds, joint_thresholds, threshold_for_fpr
from latentguard.stats.detection import auroc

Flags = NDArray[np.bool_]
Scores = NDArray[np.float64]

PLANTED_RATE, PLANTED_REVIEW, PLANTED_ROWS, PLANTED_SEEDS = 0.05, 0.3, 300, 600
FIRST = 1.5
"""Mean of the first guard's scores of harmful prompts in planted worlds; 0 of harmless ones."""


@dataclass(frozen=True)
class World:
    """A second opinion."""

    distance: float
    """Mean of its scores of harmful prompts; 0 of harmless ones, each with variance 1."""

    threshold: float
    """Above which it blocks."""

    agreement: float = 0.5
    """Correlation with the first guard's scores within a class."""

    is_graded: bool = True
    """Whether it gives a score, as a guard does, or a word, as an endpoint does."""


WORLDS = {
    "a better guard": World(3.0, 1.64),
    "a guard as good": World(FIRST, 1.64),
    "a guard as good and much alike": World(FIRST, 1.64, 0.9),
    "a guard that decides by chance": World(0.0, 0.0, 0.0),
    "a better endpoint that blocks 1 % of harmless prompts": World(3.0, 2.33, 0.5, False),
    "the same, blocks 5 %": World(3.0, 1.64, 0.5, False),
    "an endpoint that blocks half by chance": World(0.0, 0.0, 0.0, False),
    "an endpoint that blocks nothing": World(0.0, np.inf, 0.5, False),
}

SETS = ("xstest", "openai_moderation", "jbb", "toxicchat_third")
TIMED = 30


def planted(world: World) -> dict[str, float]:
    """Rates over calibrations: how often the joint rate is over the promise, and what is caught."""
    rng = np.random.default_rng(0)
    harmless, harmful = draw(world, rng, 200_000, False), draw(world, rng, 200_000, True)
    rows = []
    for _ in range(PLANTED_SEEDS):
        scores, opinions = draw(world, rng, PLANTED_ROWS, False)
        review = threshold_for_fpr(scores, PLANTED_REVIEW)
        joint = joint_thresholds(scores, opinions, review, PLANTED_RATE, is_graded=world.is_graded)
        alone = threshold_for_fpr(scores, PLANTED_RATE).threshold
        fpr, recall = (flags_of(side, joint).mean() for side in (harmless, harmful))
        asked = (harmless[0] > joint.review.threshold) & (harmless[0] <= joint.block.threshold)
        first = (harmless[0] > alone).mean(), (harmful[0] > alone).mean()
        rows.append((fpr, recall, *first, asked.mean(), fpr > PLANTED_RATE))
    names = ("fpr", "recall", "fpr_first", "recall_first", "asked", "share_over_rate")
    return dict(zip(names, np.mean(rows, axis=0).round(4).tolist(), strict=True))


def draw(
    world: World, rng: np.random.Generator, count: int, is_harmful: bool
) -> tuple[Scores, Scores]:
    """Scores of the first guard, and of the second opinion, which blocks over 0."""
    noise = rng.normal(size=(2, count))
    second = world.agreement * noise[0] + (1 - world.agreement**2) ** 0.5 * noise[1]
    second += is_harmful * world.distance - world.threshold
    return noise[0] + is_harmful * FIRST, second if world.is_graded else np.sign(second)


def flags_of(side: tuple[Scores, Scores], joint: JointBounds) -> Flags:
    """What both together flag."""
    scores, opinions = side
    by_second: Flags = (opinions > joint.cut) & (scores > joint.review.threshold)
    return (scores > joint.block.threshold) | by_second


class StoredVerdicts:
    """A second opinion whose verdicts are stored already."""

    name = "stored verdicts"
    at_once = 1
    is_graded = True

    def __init__(self, guard: LatentGuard, verdicts: dict[str, Verdict]) -> None:
        """Decide by the thresholds of a guard."""
        self._guard = guard
        self._verdicts = verdicts

    def load(self) -> None:
        """Do nothing."""

    def score(self, prompts: Sequence[Prompt]) -> list[float | None]:
        """How far each prompt lies above the threshold of the guard."""
        return [self._verdicts[prompt.id].score - self._guard.threshold for prompt in prompts]


@dataclass(frozen=True)
class Figures:
    """What one guard, or both together, does on one set in one split."""

    fpr: float
    recall: float
    f1: float

    @staticmethod
    def of(flags: Flags, harmful: Flags, weight: float) -> Figures:
        """From flags; harmless prompts weigh so much more, as half of them calibrated."""
        caught = float(flags[harmful].sum())
        wrong = float(flags[~harmful].sum()) * weight
        missed = float((~flags[harmful]).sum())
        f1 = 2 * caught / (2 * caught + wrong + missed) if caught else 0.0
        return Figures(float(flags[~harmful].mean()), float(flags[harmful].mean()), f1)


def read_sets(folder: Path, names: Sequence[str], most: int) -> dict[str, list[Prompt]]:
    """So many prompts of each set, evenly spaced, with ids that no other set has."""
    sets = {}
    for name in names:
        rows = read_prompts(folder / f"{name}.jsonl")
        sample = [rows[n * len(rows) // most] for n in range(most)] if most < len(rows) else rows
        sets[name] = [replace(p, id=f"{name}-{n}") for n, p in enumerate(sample)]
    return sets


def read_verdicts(guard: LatentGuard, prompts: Sequence[Prompt], out: Path) -> dict[str, Verdict]:
    """The verdicts of a guard by prompt; a killed run goes on."""
    if not out.exists():
        score_to_file(guard, guard.model, prompts, out)
    verdicts = [Verdict.from_dict(json.loads(line)) for line in out.read_text().splitlines()]
    return {verdict.id: verdict for verdict in verdicts}


def milliseconds(guard: LatentGuard, prompts: Sequence[Prompt]) -> float:
    """Median processor time of a verdict, read one at a time."""
    times = []
    for prompt in prompts:
        start = time.process_time()
        guard(prompt)
        times.append(time.process_time() - start)
    return round(1000 * float(np.median(times)), 1)


def measure_split(
    first: LatentGuard,
    second: LatentGuard,
    stored: tuple[dict[str, Verdict], dict[str, Verdict]],
    prompts: Sequence[Prompt],
    rates: Rates,
    seed: int,
) -> tuple[dict[str, Flags], Flags, Flags]:
    """Flags of each guard and of the cascade, who asked the second, and which are measured."""
    rng = np.random.default_rng(seed)
    calibrates = np.array([not p.harmful for p in prompts]) & (rng.random(len(prompts)) < 0.5)
    chosen = [p for p, used in zip(prompts, calibrates, strict=True) if used]
    alone = Rates(rates.block)
    own = first.calibrate_from(chosen, [stored[0][p.id] for p in chosen], alone)
    other = second.calibrate_from(chosen, [stored[1][p.id] for p in chosen], alone)
    banded = first.calibrate_from(chosen, [stored[0][p.id] for p in chosen], rates)
    opinions = StoredVerdicts(other, stored[1])
    joint = calibrate_cascade(banded, opinions, chosen, [stored[0][p.id] for p in chosen])
    scores = [np.array([of[p.id].score for p in prompts]) for of in stored]
    thresholds = joint.guard.thresholds
    assert thresholds is not None
    assert thresholds.common.review is not None
    above = scores[0] > thresholds.common.block.threshold
    asked = (scores[0] > thresholds.common.review.threshold) & ~above
    assert thresholds.second_opinion is not None
    by_second = scores[1] - other.threshold > thresholds.second_opinion.cut
    flags = {
        "first alone": scores[0] > own.threshold,
        "second alone": scores[1] > other.threshold,
        "cascade": above | (asked & by_second),
    }
    return flags, asked, ~calibrates


def mean_figures(rows: Sequence[Figures]) -> dict[str, float]:
    """Means over splits, and the highest false-positive rate."""
    means = {name: float(np.mean([getattr(r, name) for r in rows])) for name in vars(rows[0])}
    means["highest_fpr"] = max(row.fpr for row in rows)
    return {name: round(value, 4) for name, value in means.items()}


def table(
    prompts: Sequence[Prompt],
    splits: Sequence[tuple[dict[str, Flags], Flags, Flags]],
    is_of_set: Callable[[Prompt], bool],
) -> dict[str, Any]:
    """The figures of one set, or of all."""
    own = np.array([is_of_set(p) for p in prompts])
    harmful = np.array([bool(p.harmful) for p in prompts])
    rows: dict[str, list[Figures]] = {}
    shares = []
    for flags, asked, is_measured in splits:
        tested = own & is_measured
        weight = (own & ~harmful).sum() / (tested & ~harmful).sum()
        for name, one in flags.items():
            figures = Figures.of(one[tested], harmful[tested], weight)
            rows.setdefault(name, []).append(figures)
        shares.append([asked[tested & ~harmful].mean(), asked[tested & harmful].mean()])
    share = np.mean(shares, axis=0).round(4).tolist()
    return {
        "harmless": int((own & ~harmful).sum()),
        "harmful": int((own & harmful).sum()),
        "asked": dict(harmless=share[0], harmful=share[1]),
        **{name: mean_figures(one) for name, one in rows.items()},
    }


def main() -> None:
    """Read, split, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("second", nargs="?")
    parser.add_argument("--first", default="default")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--rows", type=int, default=150, help="prompts of each set, at most")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--max-fpr", type=float, default=0.05)
    parser.add_argument("--review-fpr", type=float, default=0.2)
    parser.add_argument("--work", type=Path, help="folder that keeps verdicts")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "planted": {
            "max_fpr": PLANTED_RATE,
            "review_fpr": PLANTED_REVIEW,
            "rows": PLANTED_ROWS,
            "calibrations": PLANTED_SEEDS,
            "worlds": {name: planted(world) for name, world in WORLDS.items()},
        }
    }
    if options.second:
        torch.set_num_threads(1)
        record["labelled"] = measure_sets(options)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


def measure_sets(options: argparse.Namespace) -> dict[str, Any]:
    """The figures on labelled sets."""
    first, second = (LatentGuard.load(find_guard(one)) for one in (options.first, options.second))
    sets = read_sets(options.data_dir, options.sets, options.rows)
    every = [p for rows in sets.values() for p in rows]
    prompts = [p for p in every if not (first.is_chunked(p) or second.is_chunked(p))]
    options.work.mkdir(parents=True, exist_ok=True)
    stored = (
        read_verdicts(first, prompts, options.work / f"{first.digest[:12]}.jsonl"),
        read_verdicts(second, prompts, options.work / f"{second.digest[:12]}.jsonl"),
    )
    rates = Rates(options.max_fpr, options.review_fpr)
    splits = [
        measure_split(first, second, stored, prompts, rates, seed) for seed in range(options.splits)
    ]
    labels = np.array([bool(p.harmful) for p in prompts])
    costs = [milliseconds(guard, prompts[:: len(prompts) // TIMED]) for guard in (first, second)]
    everything = table(prompts, splits, lambda p: True)
    return {
        "first": {"model": Path(first.fingerprint.model).name, "digest": first.digest},
        "second": {"model": Path(second.fingerprint.model).name, "digest": second.digest},
        "max_fpr": options.max_fpr,
        "review_fpr": options.review_fpr,
        "splits": options.splits,
        "left_out_as_chunked": len(every) - len(prompts),
        "auroc": {
            name: round(float(auroc(labels, np.array([of[p.id].score for p in prompts]))), 4)
            for name, of in zip(("first", "second"), stored, strict=True)
        },
        "milliseconds": {
            "first": costs[0],
            "second": costs[1],
            "cascade": round(costs[0] + everything["asked"]["harmless"] * costs[1], 1),
        },
        "all": everything,
        "sets": {name: table(prompts, splits, _of_set(name)) for name in sets},
    }


def _of_set(name: str) -> Callable[[Prompt], bool]:
    return lambda prompt: prompt.id.rpartition("-")[0] == name


if __name__ == "__main__":
    main()
