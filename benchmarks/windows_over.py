"""From how many characters on pieces are read: what that finds in wrappers, and what it costs.

    python benchmarks/windows_over.py --model M --data-dir DIR --work W [--dtype D] [--out F.json]

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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from default_guard import default_guard
from long_input import told
from numpy.typing import ArrayLike

from latentguard.cli.demo.detection import length_scores
from latentguard.data.builtin import load_contrast, load_traffic
from latentguard.data.surface_audit import ngram_scores
from latentguard.guard.chunk_calibration import fit_windows
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.score_files import score_to_file
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt, read_prompts
from latentguard.report.document import write_text
from latentguard.robustness.run import room_of
from latentguard.robustness.suite import BUDGETS, cases
from latentguard.stats.metrics import auroc, estimate, proportion

FAMILIES = ("wrappers", "two requests", "template imitation")
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
    train = load_traffic("train")
    record = dict(model=Path(options.model).name, dtype=guards["none"].fingerprint.dtype)
    record["sets"] = {
        name: {
            "n-grams": area(prompts, ngram_scores(train, prompts)),
            "length": area(prompts, length_scores(prompts)),
        }
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
    sets["built-in traffic, test"] = drawn(load_traffic("test"))
    return sets | {"openai_moderation": drawn(read_prompts(folder / "openai_moderation.jsonl"))}


def drawn(prompts: list[Prompt]) -> list[Prompt]:
    """Some of those that are neither short nor very long."""
    kept = [p for p in prompts if SHORTEST < len(p.text) <= LONGEST]
    return random.Random(0).sample(kept, min(ROWS, len(kept)))


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
        found[name] = told(proportion(flags))
    return found


def area(prompts: list[Prompt], scores: ArrayLike) -> dict[str, Any]:
    """AUROC with its interval."""
    return told(estimate(auroc, [bool(p.harmful) for p in prompts], scores))


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
    medians = {name: dict(median=median(times), all=sorted(times)) for name, times in found.items()}
    return dict(n=len(prompts), share_longer=share, **medians)


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
