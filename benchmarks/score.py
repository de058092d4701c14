"""What the optional parts of a guard cost when it scores: paired processor time.

Each round scores the same prompts with every arm in turn, in an order that turns with the round.
The figure of an arm is the median over rounds of its time against that of the bare guard (one axis,
no part), with the range; beside it stands what judging alone takes. One thread's processor time, so
that a busy machine adds noise, not bias.
Another part needs one more arm in ``arms``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from latentguard import ChatModel, LatentGuard, load_contrast
from latentguard.guard.probabilities import IsotonicMap
from latentguard.prompts import Prompt
from latentguard.states import Backend, States

JUDGED = 20
"""How often states are judged in one measurement."""


def arms(backend: Backend) -> dict[str, LatentGuard]:
    """Guards that read the same states; the first is the bare one."""
    training = [replace(p, refused=p.harmful) for p in load_contrast("train")[:200]]
    calm = [p for p in load_contrast("validation") if not p.harmful]
    fitted = LatentGuard.fit(backend, training)  # a label of refusal, for the second axis
    ready = fitted.calibrate(backend, calm, max_fpr=0.05, review_fpr=0.2)
    thresholds = ready.thresholds
    assert thresholds is not None
    ladder = np.linspace(-3, 3, 200)
    knots = IsotonicMap(tuple(ladder.tolist()), tuple((ladder / 6.1 + 0.5).tolist()))
    isotonic = replace(thresholds, isotonic=knots)
    none = dict(quadrants=None, categories=None, thresholds=None)
    bare = replace(ready, axes=ready.axes[:1], deobfuscate=False, **none)
    return {
        "bare": bare,
        "bare, again": bare,
        "calibration": replace(bare, thresholds=isotonic),
        "calibration, quadrants": replace(ready, thresholds=isotonic),
    }


def measure(
    backend: Backend, guards: dict[str, LatentGuard], prompts: Sequence[Prompt], rounds: int
) -> dict[str, list[float]]:
    """Seconds of processor time of each arm in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in guards}
    names = list(guards)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            verdicts = list(guards[name].scan(backend, prompts))
            took = time.process_time() - start
            assert len(verdicts) == len(prompts)
            if turn:
                seconds[name].append(took)
    return seconds


def judging(
    backend: Backend, guards: dict[str, LatentGuard], prompts: Sequence[Prompt], rounds: int
) -> dict[str, float]:
    """Microseconds a prompt that each arm takes to judge states that are there already.

    The difference of two arms is what a part costs, free of the noise of the pass.
    """
    states, found = {}, {name: list[float]() for name in guards}
    for name, guard in guards.items():
        where = dict(layers=guard.probe.layers, queries=guard.reading.queries)
        read = backend.capture(prompts, positions=guard.positions, **where)
        states[name] = States.collect(read)
    for _ in range(rounds):
        for name, guard in guards.items():
            start = time.process_time()
            for _ in range(JUDGED):
                list(guard.judge(states[name]))
            found[name].append(1e6 * (time.process_time() - start) / JUDGED / len(prompts))
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Read the options, measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backend = ChatModel.load(options.model)
    prompts = load_contrast("test")[: options.prompts]
    guards = arms(backend)
    seconds = measure(backend, guards, prompts, options.rounds)
    judged = judging(backend, guards, prompts, options.rounds)
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["bare"], strict=True)]
        row = dict(arm=name, ratio=statistics.median(ratios), low=min(ratios), high=max(ratios))
        row |= dict(median_seconds=statistics.median(times), judging_microseconds=judged[name])
        rows.append(row)
        span = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        print(f"{name:<28} {span}; judging {judged[name]:.1f} microseconds a prompt")
    if options.json:
        how = dict(prompts=len(prompts), rounds=options.rounds, threads=1, clock="processor time")
        how |= dict(dtype=str(backend.model.dtype), torch=torch.__version__)
        how |= dict(transformers=transformers.__version__)
        options.json.write_text(json.dumps(how | dict(arms=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
