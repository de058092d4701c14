"""What labels teach a guard: AUROC and F1 on other prompts of the same traffic.

    python benchmarks/adaptation.py --traffic FILE [--others FILE ...] --cache DIR --out FILE

Labels are drawn from four fifths of the file, the rest is for testing, again and again. Beside the
adapted guard stand the guard as it is, a new probe of the labels alone (the same features), and
n-grams. Thresholds come from the labels, but for the guard as it is. ``--others`` are sets that
are not learned: what happens to them when all of the traffic is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from tqdm import tqdm

from latentguard.data.prompt_files import read_prompts
from latentguard.data.surface_audit import held_out_ngram_scores, ngram_scores
from latentguard.guard.adaptation import Labels
from latentguard.guard.features import ReadTexts, read_texts
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.refit import Refit, base_of, refit
from latentguard.guard.suggestion import choose_rows
from latentguard.prompts import Prompt
from latentguard.stats.detection import auroc, estimate_metric, f1_at
from latentguard.stats.rates import proportion

COUNTS = (50, 100, 200, 400, 760)
TEST_SHARE = 0.2


def main() -> None:
    """Read, teach, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--guard", default="default")
    parser.add_argument("--traffic", type=Path, required=True)
    parser.add_argument("--others", type=Path, nargs="*", default=[])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=12)
    options = parser.parse_args()
    guard = LatentGuard.from_pretrained(options.guard)
    prompts = read_prompts(options.traffic)
    every = _labels(guard, prompts, options.traffic, options.cache)
    curve = [
        {"labels": count, "arm": arm, **_measure(guard, every, prompts, count, arm, options.draws)}
        for count in tqdm(COUNTS)
        for arm in ARMS
    ]
    before, after = (_fitted(guard, labels) for labels in (None, every))
    others = [
        _other(before, after, _labels(guard, read_prompts(path), path, options.cache), path.stem)
        for path in options.others
    ]
    record = {
        "guard": options.guard,
        "traffic": options.traffic.stem,
        "n": [int(every.harmful.sum()), int((~every.harmful).sum())],
        "draws": options.draws,
        "curve": curve,
        "others": others,
    }
    options.out.write_text(json.dumps(record, indent=1))


def _labels(guard: LatentGuard, prompts: list[Prompt], path: Path, cache: Path) -> Labels:
    """The prompts of a set as the guard reads them, in the order of the file; read once."""
    file = cache / f"{path.stem}.safetensors"
    reference = guard.reference
    assert reference is not None
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(prompts), desc=path.stem) as bar:
            texts = read_texts(
                base_of(guard), guard.model, prompts, reference.feature_map, progress=bar.update
            )
        save_file(texts.to_tensors(), file)
    return Labels.of(ReadTexts.from_tensors(load_file(file)), prompts, "labels")


def _fitted(guard: LatentGuard, labels: Labels | None) -> Refit:
    assert guard.reference is not None
    return refit(base_of(guard), guard.reference, labels)


Rows = NDArray[np.int64]
Side = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Scores and flags of the test prompts."""


def _measure(
    guard: LatentGuard, every: Labels, prompts: list[Prompt], count: int, arm: str, draws: int
) -> dict[str, Any]:
    """Means over draws, with the interval of the mean."""
    draw = np.random.default_rng(0)
    figures, seconds, harmful = [], [], []
    before = _fitted(guard, None)
    for _ in range(draws):
        order = draw.permutation(len(prompts))
        size = int(TEST_SHARE * len(order))
        test, pool = np.sort(order[:size]), order[size:]
        rows = _pick(before, every, pool, count, ARMS[arm].suggested, draw)
        started = time.perf_counter()
        scores, flags = ARMS[arm].teach(guard, every, prompts, rows, test)
        seconds.append(time.perf_counter() - started)
        labels = every.harmful[test]
        f1 = 2 * (flags & labels).sum() / (flags.sum() + labels.sum())
        figures.append((auroc(labels, scores), f1, flags[~labels].mean(), flags[labels].mean()))
        harmful.append(int(every.harmful[rows].sum()))
    names = ("auroc", "f1", "falsely flagged", "caught")
    columns = np.array(figures).T
    means = {name: _mean(values) for name, values in zip(names, columns, strict=True)}
    return means | {"harmful": float(np.mean(harmful)), "seconds": float(np.median(seconds))}


@dataclass(frozen=True)
class Arm:
    """Which rows are labelled, and what is made of them."""

    suggested: bool
    """Whether the guard chooses them, rather than chance."""

    teach: Callable[[LatentGuard, Labels, list[Prompt], Rows, Rows], Side]
    """Scores and flags of the test rows, from the labelled rows."""


def _pick(
    guard: Refit, every: Labels, pool: Rows, count: int, suggested: bool, draw: np.random.Generator
) -> Rows:
    if not suggested:
        return np.sort(pool[:count])
    own = every.take(pool)
    features = own.texts.features[own.texts.whole].astype(np.float32)
    chosen = choose_rows(guard.score(own.texts), features, min(count, len(pool)), draw)
    return np.sort(pool[[row for row, _ in chosen]])


def _adapt(
    guard: LatentGuard, every: Labels, prompts: list[Prompt], rows: Rows, test: Rows
) -> Side:
    fitted = _fitted(guard, every.take(rows) if len(rows) else None)
    own = every.take(test)
    scores = fitted.score(own.texts)
    return scores, fitted.flags(scores, own.segments, own.texts.is_chunked)


def _as_it_is(
    guard: LatentGuard, every: Labels, prompts: list[Prompt], rows: Rows, test: Rows
) -> Side:
    return _adapt(guard, every, prompts, rows[:0], test)


def _new_probe(
    guard: LatentGuard, every: Labels, prompts: list[Prompt], rows: Rows, test: Rows
) -> Side:
    """A logistic regression on the features alone."""
    features = every.texts.features[every.texts.whole].astype(np.float64)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    how = dict(cv=StratifiedKFold(5, shuffle=True, random_state=0), method="decision_function")
    labels = every.harmful[rows]
    held_out = cross_val_predict(model, features[rows], labels, **how)
    scores = model.fit(features[rows], labels).decision_function(features[test])
    return scores, scores > _best_cut(held_out, labels)


def _n_grams(
    guard: LatentGuard, every: Labels, prompts: list[Prompt], rows: Rows, test: Rows
) -> Side:
    train = [prompts[row] for row in rows]
    held_out = held_out_ngram_scores(train)
    scores = ngram_scores(train, [prompts[row] for row in test])
    return scores, scores > _best_cut(held_out, every.harmful[rows])


def _best_cut(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    """The threshold with the best F1 on held-out labels."""
    return float(max(scores, key=lambda cut: f1_at(cut)(labels, scores)))


ARMS = {
    "as it is": Arm(False, _as_it_is),
    "adapt": Arm(False, _adapt),
    "adapt, suggested labels": Arm(True, _adapt),
    "new probe": Arm(False, _new_probe),
    "n-grams": Arm(False, _n_grams),
}


def _other(before: Refit, after: Refit, labels: Labels, name: str) -> dict[str, Any]:
    """A set that was not learned, before and after all of the traffic was."""
    record: dict[str, Any] = {"set": name, "n": np.bincount(labels.harmful, minlength=2).tolist()}
    for key, one in {"before": before, "after": after}.items():
        scores = one.score(labels.texts)
        flags = one.flags(scores, labels.segments, labels.texts.is_chunked)
        record[key] = {
            "auroc": asdict(estimate_metric(auroc, labels.harmful, scores)),
            "caught": asdict(proportion(flags[labels.harmful])),
            "falsely flagged": asdict(proportion(flags[~labels.harmful])),
        }
    return record


def _mean(values: NDArray[np.float64]) -> list[float]:
    """The mean and its 95 % interval over draws."""
    error = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    mean = float(values.mean())
    return [round(value, 4) for value in (mean, mean - error, mean + error)]


if __name__ == "__main__":
    main()
