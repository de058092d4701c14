"""The default guard against other detectors, on form-matched sets, prompt by prompt.

    python benchmarks/peers_detection.py --model M --data-dir DIR --states FOLDER --out F.json

The peers: length, TF-IDF n-grams fitted on the same training data, the paper's rule, and
alt-profanity-check, a classifier of toxic comments whose weights come with the package. DIR is that
of ``detection.py``. States are kept in FOLDER, so that a killed run goes on; ``--only SET``
captures one set and stops.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection import capture, training_sets
from numpy.typing import NDArray

from latentguard.audit import ngram_scores
from latentguard.experiments.detection import guard_scores, length_scores
from latentguard.guard import LatentGuard
from latentguard.metrics import auroc, estimate, resampled, tpr_at
from latentguard.model.hf import ChatModel
from latentguard.prompts import Prompt, read_prompts
from latentguard.readings import Reading
from latentguard.states import States

TESTS = ("jbb", "xstest")
DEFAULT = "default guard"


def states_of(
    model: ChatModel, sets: dict[str, list[Prompt]], options: argparse.Namespace
) -> dict[str, States]:
    """The states of each set, read from the folder or captured into it."""
    found = {}
    for name, prompts in sets.items():
        path = options.states / f"{name}.safetensors"
        if not path.exists():
            if options.only not in (None, name):
                continue
            capture(model, prompts, sealed=False).save(path)
        found[name] = States.load(path)
    return found


def scores_on(
    name: str, sets: dict[str, list[Prompt]], guards: dict[str, LatentGuard], states: States
) -> dict[str, NDArray[np.float64]]:
    """Scores of every detector on one test set."""
    from profanity_check import predict_prob

    prompts = sets[name]
    return {
        **{rule: guard_scores(guard, states) for rule, guard in guards.items()},
        "TF-IDF, contrast set": ngram_scores(sets["contrast"], prompts),
        "TF-IDF, AdvBench + Alpaca": ngram_scores(sets["paper"], prompts),
        "alt-profanity-check": np.asarray(predict_prob([p.text for p in prompts]), dtype=float),
        "length": length_scores(prompts),
    }


def rows_on(
    prompts: list[Prompt], scores: dict[str, NDArray[np.float64]]
) -> dict[str, dict[str, Any]]:
    """AUROC, TPR at 5 % FPR, and how much AUROC the default leads by, paired by prompt."""
    labels = np.array([bool(p.harmful) for p in prompts])
    rows = {}
    for rule, theirs in scores.items():
        lead = resampled(
            lambda y, a, b: auroc(y, a) - auroc(y, b), labels, scores[DEFAULT], theirs, paired=True
        )
        found = dict(auroc=estimate(auroc, labels, theirs), lead=lead)
        found["tpr at 5 % fpr"] = estimate(tpr_at(0.05), labels, theirs)
        rows[rule] = {k: [round(v, 4) for v in (e.value, e.low, e.high)] for k, e in found.items()}
        print(rule, *(f"{key} {e}" for key, e in found.items()), sep=" | ")
    return rows


def main() -> None:
    """Capture, fit, compare."""
    options = arguments()
    torch.set_num_threads(1)
    model = ChatModel.load(options.model, dtype=options.dtype, device="cpu")
    sets = training_sets(options.data_dir)
    sets |= {name: read_prompts(options.data_dir / f"{name}.jsonl") for name in TESTS}
    states = states_of(model, sets, options)
    if options.only:
        return
    span, t_inst = (Reading.of(name, model.post) for name in ("span", "t_inst"))
    guards = {
        DEFAULT: LatentGuard.from_states(model, states["contrast"], span, "linear"),
        "the paper's rule": LatentGuard.from_states(model, states["paper"], t_inst, "centroid"),
    }
    result = {}
    for name in TESTS:
        print(f"\n{name}: {len(sets[name])} prompts")
        result[name] = rows_on(sets[name], scores_on(name, sets, guards, states[name]))
    options.out.write_text(json.dumps(result, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    for name in ("--data-dir", "--states", "--out"):
        parser.add_argument(name, required=True, type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=("paper", "contrast", *TESTS), help="capture one set")
    return parser.parse_args()


if __name__ == "__main__":
    main()
