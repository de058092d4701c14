"""What an early exit gains and loses: prompts that leave, flagged prompts lost, prompts per second.

    python benchmarks/early_exit.py GUARD --data-dir D --json FILE

The estimate is fitted on built-in training prompts. The cut is set on the built-in validation
prompts, for several shares of flagged prompts that may be lost. Then sets of other people's prompts
are read: DIR holds alpaca_harmless, toxicchat_third, openai_moderation and xstest .jsonl. Speed is
processor time of one thread, whole and with the exit in turn over the same prompts. Prompts that
are read by chunks are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from latentguard.cli.early_exit import TRAINING_ROWS
from latentguard.data.builtin import load_guard_prompts, load_training_rows
from latentguard.data.prompt_files import read_prompts
from latentguard.guard.early_exit import EarlyExit, bound_lost
from latentguard.guard.early_reading import fit_estimate, read_first_layer, scan_corpus
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.loading import load_guard
from latentguard.models.chat_model import ChatModel
from latentguard.probes.probe import Probe
from latentguard.prompts import Prompt
from latentguard.states import no_progress
from latentguard.stats.rates import proportion

SETS = ("alpaca_harmless", "toxicchat_third", "openai_moderation", "xstest")
SHARES = (0.02, 0.05, 0.1)
TIMED_SHARES = SHARES[:2]
ROUNDS = 2


def main() -> None:
    """Calibrate, read the sets, time, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("guard")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=250, help="of each set, drawn with a seed")
    parser.add_argument("--timed", type=int, default=60, help="of these, that are timed")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    guard = replace(load_guard(options.guard), early_exit=None)
    model = guard.model
    assert isinstance(model, ChatModel)
    validation = short_ones(guard, load_guard_prompts("validation"))
    training = read_first_layer(
        guard, model, load_training_rows(TRAINING_ROWS), progress=no_progress
    )
    probe = fit_estimate(guard.probe.layers[0], *training)
    prompts = {name: rows_of(guard, options, name) for name in SETS}
    sets = {"validation": validation, **prompts}
    read = {name: estimates_of(guard, model, probe, rows) for name, rows in sets.items()}
    record: dict[str, Any] = {"layer": probe.layers[0], "last_layer": guard.probe.layers[-1]}
    bounds = {
        share: bound_lost(*read["validation"], guard.lowest_threshold, share, 0.95)
        for share in SHARES
    }
    record["shares"] = {
        str(share): {name: what_left(guard, -bound.threshold, *pair) for name, pair in read.items()}
        for share, bound in bounds.items()
    }
    record["speed"] = {str(share): {} for share in TIMED_SHARES}
    for share in TIMED_SHARES:
        part = EarlyExit(probe, bounds[share], left=0, n=len(validation), guard=guard.digest)
        quick = replace(guard, early_exit=part)
        for name, rows in prompts.items():
            some = rows[: options.timed]
            record["speed"][str(share)][name] = speed_of(guard, quick, model, some)
    options.json.write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


def short_ones(guard: LatentGuard, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those of which one text is read."""
    return [prompt for prompt in prompts if len(guard.plan(prompt)) == 1]


def rows_of(guard: LatentGuard, options: argparse.Namespace, name: str) -> list[Prompt]:
    """Some prompts of a set."""
    rows = short_ones(guard, read_prompts(options.data_dir / f"{name}.jsonl"))
    return random.Random(0).sample(rows, min(options.rows, len(rows)))


def estimates_of(
    guard: LatentGuard, model: ChatModel, probe: Probe, prompts: Sequence[Prompt]
) -> tuple[Any, Any]:
    """Estimates at the first layer, and scores of the whole pass."""
    states, scores = read_first_layer(guard, model, prompts, progress=no_progress)
    return probe(states).double().numpy(), scores.numpy()


def what_left(guard: LatentGuard, cut: float, estimates: Any, scores: Any) -> dict[str, Any]:
    """How many prompts leave, and how many of the flagged ones."""
    left = estimates < cut
    flagged = scores > guard.lowest_threshold
    return {
        "left": asdict(proportion(left)),
        "lost": asdict(proportion(left[flagged])) if flagged.any() else None,
    }


def speed_of(
    guard: LatentGuard, quick: LatentGuard, model: ChatModel, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Prompts per second of processor time, whole and with the exit, and their ratio by round."""
    seconds: dict[str, list[float]] = {"whole": [], "early exit": []}
    arms = {"whole": guard, "early exit": quick}
    for turn in range(ROUNDS + 1):  # the first is not counted
        for name, arm in arms.items():
            start = time.process_time()
            for _ in scan_corpus(arm, model, prompts, progress=no_progress):
                pass
            if turn:
                seconds[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds["whole"], seconds["early exit"], strict=True)]
    rates = {name: len(prompts) / median(values) for name, values in seconds.items()}
    return {"n": len(prompts), **rates, "ratio": [median(ratios), min(ratios), max(ratios)]}


if __name__ == "__main__":
    main()
