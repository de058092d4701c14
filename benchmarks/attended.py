"""The reading ``attended`` beside ``pooled``: both are fitted on the same rows, and judged on sets.

    python benchmarks/attended.py --model default --data-dir DIR --cache build/attended --out FILE

Sets, and how gains are judged, are those of ``reading_levers.py``. Captured states and scores are
kept in the cache, so that a killed run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lever_arms import DEFAULT
from reading_levers import ArmScores, compare, read_sets

from latentguard.data.builtin import load_training_rows
from latentguard.data.surface_audit import ngram_scores
from latentguard.files import write_atomic
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.query_fitting import fit_reading_queries
from latentguard.models.chat_model import ChatModel
from latentguard.probes.capture_cache import CaptureCache
from latentguard.probes.fitting import capture
from latentguard.probes.probe import layers_of
from latentguard.prompts import Prompt
from latentguard.states import Reading, digest_prompts, no_progress
from latentguard.stats.bootstrap import bootstrap

ROUNDS, COST_PROMPTS = 10, 64
"""Paired rounds, and prompts in each, in which the cost is measured."""


def fit_guards(
    model: ChatModel, prompts: Sequence[Prompt], cache: CaptureCache
) -> dict[str, LatentGuard]:
    """Both guards, by the name of their arm, from one capture."""
    layers = layers_of("linear", model.depth)
    attended = Reading.of("attended", model.post)
    reading, attended_fit = fit_reading_queries(model, attended, prompts, layers)
    states = capture(model, reading, prompts, layers=layers, cache=cache)
    pooled = Reading.of("pooled", model.post)
    return {
        DEFAULT: LatentGuard.from_states(model, states, pooled),
        "attended": LatentGuard.from_states(model, states, reading, attended=attended_fit),
    }


def score_sets(
    model: ChatModel,
    guards: Mapping[str, LatentGuard],
    sets: Mapping[str, Sequence[Prompt]],
    folder: Path,
) -> dict[str, dict[str, list[float]]]:
    """Set -> arm -> scores; those in the folder are not computed again."""
    attended = guards["attended"]
    scores = {}
    for name, prompts in sets.items():
        path = folder / f"{digest_prompts(prompts)[:24]}.json"
        if not path.exists():
            states = capture(model, attended.reading, prompts, layers=attended.probe.layers)
            own = {arm: [v.score for v in guard.measure(states)] for arm, guard in guards.items()}
            write_atomic(path, json.dumps(own))
        scores[name] = json.loads(path.read_text())
        print(f"{name}: {len(prompts)} prompts", flush=True)
    return scores


def measure_cost(
    model: ChatModel, guards: Mapping[str, LatentGuard], prompts: Sequence[Prompt]
) -> list[float]:
    """Processor time of ``attended`` over that of ``pooled``: median of paired rounds, interval."""
    ratios = list[float]()
    for number in range(ROUNDS + 1):
        spent = {}
        for name in list(guards)[:: 1 if number % 2 == 0 else -1]:
            start = time.process_time()
            list(guards[name].scan(model, prompts, progress=no_progress))
            spent[name] = time.process_time() - start
        ratios.append(spent["attended"] / spent[DEFAULT])
    one = bootstrap(np.median, ratios[1:], method="percentile")  # the first round warms up
    return [round(value, 4) for value in (one.value, one.low, one.high)]


def open_guards(
    model: ChatModel, prompts: Sequence[Prompt], folder: Path
) -> dict[str, LatentGuard]:
    """Both guards, from the folder if they are there."""
    names = (DEFAULT, "attended")
    if not (folder / "attended" / "guard.json").exists():
        with CaptureCache(folder / "captures") as cache:
            guards = fit_guards(model, prompts, cache)
            for name in names:
                guards[name].save(folder / name)
    return {name: LatentGuard.load(folder / name, model) for name in names}


def main() -> None:
    """Fit, score, compare, and write the record."""
    options = arguments()
    torch.set_num_threads(options.threads)
    model = ChatModel.load(options.model, dtype=options.dtype, device="cpu")
    rows = load_training_rows(options.rows)
    key = json.dumps([model.fingerprint.digest, digest_prompts(rows)])
    folder = options.cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    guards = open_guards(model, rows, folder)
    sets = read_sets(options.data_dir)
    scores = score_sets(model, guards, sets, folder)
    arms = [
        ArmScores(name, {one: scores[one][name] for one in sets}, guard.spread, {}, 1)
        for name, guard in guards.items()
    ]
    words = {one: ngram_scores(rows, prompts).tolist() for one, prompts in sets.items()}
    arms.append(ArmScores("n-grams", words, None, {}, 1))
    labels = {one: torch.tensor([bool(p.harmful) for p in sets[one]]).numpy() for one in sets}
    record = {
        "model": options.name or Path(options.model).name,
        "dtype": model.fingerprint.dtype,
        "training_rows": len(rows),
        "n": {one: [int(y.sum()), int((~y).sum())] for one, y in labels.items()},
        "arms": compare(arms, labels),
        "cost": measure_cost(model, guards, sets["xstest"][:COST_PROMPTS]),
        "cost_rounds": ROUNDS,
    }
    write_atomic(options.out, json.dumps(record, indent=1) + "\n")
    for name, figures in record["arms"].items():
        print(name, figures["mean"])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--name", help="of the model in the record")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data-dir", type=Path, required=True, help="of the public sets")
    parser.add_argument("--cache", type=Path, required=True, help="folder for guards and scores")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000, help="training rows")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
