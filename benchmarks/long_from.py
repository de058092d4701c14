"""From how many characters on pieces are read: what that finds in wrappers, and what it costs.

    python benchmarks/long_from.py --model M --data-dir DIR --work W [--dtype D] [--out F.json]

The default guard (fitted and calibrated into W/plain if it is not there) without windows, with the
default ones, and with windows that read prompts of more than 150 characters by pieces. Each meets
the suite's wrappers, double requests and imitated turns, and prompts over 150 characters as they
are: built-in traffic's test split and the moderation set of DIR (neither was seen before).
Scores are kept in W, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from default_guard import default_guard

from latentguard.audit import ngram_model
from latentguard.contrast import load_contrast, load_traffic
from latentguard.guard import LatentGuard
from latentguard.metrics import auroc, estimate, proportion
from latentguard.model.hf import ChatModel
from latentguard.prompts import Prompt, read_prompts
from latentguard.report import write_text
from latentguard.stress.run import room_of
from latentguard.stress.suite import BUDGETS, cases
from latentguard.verdicts import score_to_file
from latentguard.window_fitting import fit_windows

FAMILIES = ("wrappers", "two requests", "template imitation")
PUBLIC = ("openai_moderation",)
FROM = (500, 150)
SHORTEST, LONGEST, ROWS = 150, 1500, 200
"""Characters of the prompts that are asked as they are, and how many of a set."""
ROUNDS, TIMED = 5, 96


def main() -> None:
    """Fit, score, time, tell."""
    options = arguments()
    torch.set_num_threads(1)
    model = ChatModel.load(options.model, dtype=options.dtype)
    guards, sets = fitted(model, options.work), asked(model, options.data_dir)
    words = n_grams(sets)
    record = dict(model=Path(options.model).name, dtype=guards["none"].fingerprint.dtype)
    record["sets"] = {
        name: {"n-grams": area(prompts, words[name]), "length": area(prompts, lengths(prompts))}
        | {
            kind: figures(guard, model, prompts, options.work / f"{kind}-{name}.jsonl")
            for kind, guard in guards.items()
        }
        for name, prompts in sets.items()
    }
    record["seconds over those without windows"] = ratios(guards, model)
    print(text := json.dumps(record, indent=1))
    if options.out:
        write_text(options.out, text)


def fitted(model: ChatModel, work: Path) -> dict[str, LatentGuard]:
    """The guards, by the length from which on they read pieces."""
    plain = default_guard(model, work / "plain")
    guards = {"none": plain}
    for over in FROM:
        folder = work / f"over-{over}"
        if not (folder / "guard.json").exists():
            fit_windows(model, plain, over=over).save(folder)
        guards[f"over {over}"] = LatentGuard.load(folder, model)
    return guards


def asked(model: ChatModel, folder: Path) -> dict[str, list[Prompt]]:
    """Attacked prompts, and prompts as they are."""
    found = cases(
        tuple(load_contrast("test")), BUDGETS["small"], room_of(model), only=list(FAMILIES)
    )
    sets = {case.name: list(case.variants[0]) for case in found}
    plain = {"built-in traffic, test": load_traffic("test")}
    plain |= {n: read_prompts(folder / f"{n}.jsonl") for n in PUBLIC}
    return sets | {name: drawn(prompts) for name, prompts in plain.items()}


def drawn(prompts: list[Prompt]) -> list[Prompt]:
    """Some of those that are neither short nor very long."""
    kept = [p for p in prompts if SHORTEST < len(p.text) <= LONGEST]
    return random.Random(0).sample(kept, min(ROWS, len(kept)))


def n_grams(sets: Mapping[str, list[Prompt]]) -> dict[str, list[float]]:
    """The n-gram baseline, fitted on what the guard is fitted on."""
    train = load_traffic("train")
    words = ngram_model().fit([p.text for p in train], [bool(p.harmful) for p in train])
    return {n: words.decision_function([p.text for p in rows]).tolist() for n, rows in sets.items()}


def lengths(prompts: list[Prompt]) -> list[float]:
    """Characters."""
    return [float(len(p.text)) for p in prompts]


def figures(
    guard: LatentGuard, model: ChatModel, prompts: list[Prompt], path: Path
) -> dict[str, Any]:
    """AUROC, and the share of each class that is flagged."""
    if not path.exists():
        score_to_file(guard, model, prompts, path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {"AUROC": area(prompts, [row["score"] for row in rows])}
    for name, side in {"TPR": True, "FPR": False}.items():
        flags = [row["flagged"] for row, p in zip(rows, prompts, strict=True) if p.harmful is side]
        found[name] = as_json(proportion(flags)) if flags else None
    return found


def area(prompts: list[Prompt], scores: list[float]) -> dict[str, Any] | None:
    """AUROC, if there are both classes."""
    labels = [bool(p.harmful) for p in prompts]
    return as_json(estimate(auroc, labels, scores)) if 0 < sum(labels) < len(labels) else None


def as_json(found: Any) -> dict[str, Any]:
    """A figure as JSON."""
    return dict(value=found.value, low=found.low, high=found.high, n=found.n)


def ratios(guards: dict[str, LatentGuard], model: ChatModel) -> dict[str, Any]:
    """Processor time of ``scan`` on ordinary prompts over that of the guard without windows."""
    draw, found = random.Random(0), {name: list[float]() for name in guards if name != "none"}
    prompts = draw.sample(load_traffic("test"), TIMED)
    for _ in range(ROUNDS):
        spent = {}
        for name in draw.sample(list(guards), len(guards)):
            began = time.process_time()
            list(guards[name].scan(model, prompts))
            spent[name] = time.process_time() - began
        for name, times in found.items():
            times.append(spent[name] / spent["none"])
    share = {over: float(np.mean([len(p.text) > over for p in prompts])) for over in FROM}
    told = {name: dict(median=median(times), all=sorted(times)) for name, times in found.items()}
    return dict(n=len(prompts), share_longer=share, **told)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
