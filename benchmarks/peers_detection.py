"""Detectors that need no chat model, on the sets of ``detection.py``, for a look beside its guards.

    python benchmarks/peers_detection.py --data-dir DIR --out F.json

The peers: length; TF-IDF n-grams fitted on the guards' own training sets; alt-profanity-check, a
linear classifier of toxic comments whose weights come with the package (``make peers-env``). DIR is
that of ``detection.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from detection import test_sets, training_sets
from profanity_check import predict_prob

from latentguard.cli.demo.detection import length_scores
from latentguard.data.surface_audit import ngram_scores
from latentguard.stats.detection import auroc, estimate_metric, tpr_at

FIGURES = {"auroc": auroc, "tpr at 5 % fpr": tpr_at(0.05)}


def main() -> None:
    """Score, print and write."""
    options = arguments()
    train = training_sets(options.data_dir)
    result: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, prompts in test_sets(options.data_dir).items():
        labels = [bool(p.harmful) for p in prompts]
        scores = {
            f"TF-IDF, {source}": ngram_scores(rows, prompts) for source, rows in train.items()
        }
        scores["length"] = length_scores(prompts)
        scores["alt-profanity-check"] = np.asarray(predict_prob([p.text for p in prompts]))
        result[name] = {}
        for rule, values in scores.items():
            found = {
                key: estimate_metric(metric, labels, values) for key, metric in FIGURES.items()
            }
            result[name][rule] = {key: [e.value, e.low, e.high] for key, e in found.items()}
            print(name, rule, *(f"{key} {e}" for key, e in found.items()), sep=" | ")
    options.out.write_text(json.dumps(result, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
