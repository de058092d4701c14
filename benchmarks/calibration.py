"""Calibration on real traffic: does the promise hold, are probabilities right, does drift tell.

    latentguard label jbb.jsonl --model M --out jbb.labelled.jsonl
    python benchmarks/calibration.py GUARD --model M --traffic alpaca_harmless.jsonl \
        --labelled jbb.labelled.jsonl --other xstest.jsonl --work DIR --json FILE

Every prompt is scored once, resumably, into DIR; the rest is arithmetic with seed 0. Thresholds
come from one half of the traffic and are tried on the other, over ``SPLITS`` random halves;
probabilities come from one half of traffic and labelled prompts and are tried on the other half,
and on a set of another kind.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from latentguard import ChatModel, LatentGuard, Prompt, Verdict, read_prompts
from latentguard.guard.calibration_report import calibration_report
from latentguard.guard.drift import compare
from latentguard.guard.reliability import brier, error_of, log_loss
from latentguard.guard.score_files import score_to_file
from latentguard.guard.thresholds import Rates
from latentguard.stats.detection import auroc, estimate_metric
from latentguard.stats.rates import proportion

SPLITS = 200
RATES = Rates(0.01, 0.05)

Scored = tuple[list[Prompt], list[Verdict]]


def score(guard: LatentGuard, model: str, prompts: list[Prompt], out: Path) -> Scored:
    """The verdicts of some prompts; scored if they were not yet."""
    if not out.exists():
        score_to_file(guard, ChatModel.load(model, dtype=guard.fingerprint.dtype), prompts, out)
    lines = out.read_text(encoding="utf-8").splitlines()
    return prompts, [Verdict(**json.loads(line)) for line in lines]


def pick(scored: Scored, rows: Sequence[int]) -> Scored:
    """Some rows."""
    return [scored[0][i] for i in rows], [scored[1][i] for i in rows]


def kept(guard: LatentGuard, traffic: Scored, rng: np.random.Generator) -> dict[str, Any]:
    """How often the true rate, measured on the other half, is over what was promised."""
    n, over, rates, false = len(traffic[0]), 0, [], 0
    for _ in range(SPLITS):
        order = rng.permutation(n)
        ready = guard.calibrate_from(*pick(traffic, order[: n // 2]), RATES)
        prompts, verdicts = pick(traffic, order[n // 2 :])
        told = [replace(v, flagged=v.score > ready.threshold) for v in verdicts]
        rates.append(float(np.mean([v.flagged for v in told])))
        over += rates[-1] > RATES.block
        false += not compare(ready, prompts, told)[0].holds
    low, high = np.quantile(rates, [0.025, 0.975])
    return dict(
        splits=SPLITS, n=n // 2, mean=float(np.mean(rates)), low=float(low), high=float(high)
    ) | dict(over_the_promise=over, drift_alarms=false)


def reliability(guard: LatentGuard, sets: Scored, other: Scored, seed: int) -> dict[str, Any]:
    """Probabilities from one half, tried on the other and on a set of another kind."""
    order = np.random.default_rng(seed).permutation(len(sets[0]))
    half = len(order) // 2
    ready = guard.calibrate_from(*pick(sets, order[:half]), RATES)
    part = ready.thresholds
    assert part is not None and part.reliability is not None
    found: dict[str, Any] = dict(fitted=asdict(part.reliability))
    for name, (prompts, verdicts) in {
        "other half": pick(sets, order[half:]),
        "other": other,
    }.items():
        labels = np.array([bool(p.harmful) for p in prompts])
        scores = np.array([v.score for v in verdicts])
        slope, intercept = ready.platt
        after = 1 / (1 + np.exp(-(slope * scores + intercept)))
        after = part.isotonic(scores) if part.isotonic else after
        before = np.array([v.probability for v in verdicts])
        for when, chances in (("before", before), ("after", after)):
            figures = dict(log_loss=log_loss(labels, chances), brier=brier(labels, chances))
            error = asdict(error_of(labels, chances))
            found[f"{name}, {when}"] = figures | dict(expected_calibration_error=error)
        found[f"{name}, auroc"] = asdict(estimate_metric(auroc, labels, scores))
    return found


def main() -> None:
    """Read the options, score what was not scored, compute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("guard", type=Path)
    for name in ("--model", "--traffic", "--labelled", "--other"):
        parser.add_argument(name, required=True)
    parser.add_argument("--traffic-limit", type=int, default=1000)
    parser.add_argument("--other-limit", type=int, default=200)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    guard, rng = LatentGuard.load(options.guard), np.random.default_rng(0)
    sets = {}
    for name, most in (("traffic", options.traffic_limit), ("labelled", None), ("other", None)):
        prompts = read_prompts(getattr(options, name))
        limit = options.other_limit if name == "other" else most
        rows = np.random.default_rng(0).permutation(len(prompts))[:limit]
        chosen = [prompts[i] for i in rows]
        sets[name] = score(guard, options.model, chosen, options.work / f"{name}.jsonl")
    traffic, labelled, other = sets.values()
    harmful = pick(labelled, [i for i, p in enumerate(labelled[0]) if p.harmful])
    near = pick(labelled, [i for i, p in enumerate(labelled[0]) if not p.harmful])
    both = (traffic[0] + harmful[0], traffic[1] + harmful[1])
    ready = guard.calibrate_from(*both, RATES)
    flagged = {
        name: [v.score > ready.threshold for v in found]
        for name, (_, found) in dict(harmful=harmful, near=near, other=other).items()
    }
    result: dict[str, Any] = dict(
        bound=asdict(ready.bound) if ready.bound else None,
        promise=kept(guard, traffic, rng),
        flagged={name: asdict(proportion(found)) for name, found in flagged.items()},
        probabilities=reliability(guard, both, other, 0),
        drift={},
    )
    for name, (prompts, found) in dict(near=near, harmful=harmful).items():
        told = [replace(v, flagged=v.score > ready.threshold) for v in found]
        result["drift"][name] = str(compare(ready, prompts, told)[0])
    if labels := ready.quadrants:
        result["quadrants"] = asdict(labels)
        seen = [labels.quadrant(replace(v, flagged=v.score > ready.threshold)) for v in near[1]]
        refusing = np.array([str(q).endswith("refusing") for q in seen])
        refused = np.array([bool(p.refused) for p in near[0]])
        result["near"] = dict(
            refused=int(refused.sum()),
            over_refusal=asdict(proportion([q == "harmless, refusing" for q in seen])),
            refusing_if_refused=asdict(proportion(refusing[refused])) if refused.any() else None,
            refusing_if_accepted=asdict(proportion(refusing[~refused])),
        )
    calibration_report(ready).save(options.work / "report")
    print(ready.card)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
