"""A cascade on labelled sets: a small guard first, another guard where the first is not sure.

    python benchmarks/cascade.py SECOND --data-dir D --json FILE

Both guards read some prompts of each set once; all else is computed from their verdicts. In each of
several splits, half of the harmless prompts of all sets calibrate (the first alone, the second
alone, and the cascade, at the same rate); the other half and all harmful prompts are measured. So
the promise is one for this mixture, and sets differ around it. Prompts that a guard reads by chunks
have no review band and are left out. Latency is processor time of prompts read one at a time, so
that other work on the machine does not count.
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
from latentguard.guard.verdict import Opinion
from latentguard.stats.detection import auroc

SETS = ("xstest", "openai_moderation", "jbb", "toxicchat_third")
TIMED = 30

Flags = NDArray[np.bool_]


class StoredVerdicts:
    """A second opinion whose verdicts are stored already."""

    name = "stored verdicts"
    at_once = 1

    def __init__(self, guard: LatentGuard, verdicts: dict[str, Verdict]) -> None:
        """Decide by the thresholds of a guard."""
        self._guard = guard
        self._verdicts = verdicts

    def load(self) -> None:
        """Do nothing."""

    def ask(self, prompts: Sequence[Prompt]) -> list[Opinion]:
        """The decisions of the guard."""
        return [self._decide(self._verdicts[prompt.id]) for prompt in prompts]

    def _decide(self, verdict: Verdict) -> Opinion:
        return "block" if verdict.score > self._guard.threshold else "allow"


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
    alone = Rates(rates.block, confidence=rates.confidence)
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
    by_second = scores[1] > other.threshold
    flags = {
        "first alone": scores[0] > own.threshold,
        "second alone": by_second,
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
    parser.add_argument("second")
    parser.add_argument("--first", default="default")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--rows", type=int, default=150, help="prompts of each set, at most")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--max-fpr", type=float, default=0.05)
    parser.add_argument("--review-fpr", type=float, default=0.3)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps verdicts")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, second = (LatentGuard.load(find_guard(one)) for one in (options.first, options.second))
    sets = read_sets(options.data_dir, options.sets, options.rows)
    prompts = [p for rows in sets.values() for p in rows if not first.is_chunked(p)]
    prompts = [p for p in prompts if not second.is_chunked(p)]
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
    traffic_share = everything["asked"]["harmless"]
    record = {
        "first": {"model": first.fingerprint.model, "digest": first.digest},
        "second": {"model": Path(second.fingerprint.model).name, "digest": second.digest},
        "max_fpr": options.max_fpr,
        "review_fpr": options.review_fpr,
        "splits": options.splits,
        "left_out_as_chunked": sum(map(len, sets.values())) - len(prompts),
        "auroc": {
            name: round(float(auroc(labels, np.array([of[p.id].score for p in prompts]))), 4)
            for name, of in zip(("first", "second"), stored, strict=True)
        },
        "milliseconds": {
            "first": costs[0],
            "second": costs[1],
            "cascade, harmless traffic": round(costs[0] + traffic_share * costs[1], 1),
        },
        "all": everything,
        "sets": {name: table(prompts, splits, _of_set(name)) for name in sets},
    }
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def _of_set(name: str) -> Callable[[Prompt], bool]:
    return lambda prompt: prompt.id.rpartition("-")[0] == name


if __name__ == "__main__":
    main()
