"""How well a guard tells harmful from harmless, beside its baselines: scores and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from latentguard.guard.latent_guard import LatentGuard
from latentguard.probes.axis import Axis
from latentguard.probes.fitting import slots
from latentguard.probes.probe import random_probes
from latentguard.prompts import Prompt
from latentguard.report.charts import Curve, to_curve
from latentguard.report.document import Cell, Table
from latentguard.states import States
from latentguard.stats.detection import auroc, balanced_accuracy_at, estimate_metric, f1_at, tpr_at

FIGURES = {"AUROC": auroc, "TPR at 5% FPR": tpr_at(0.05), "TPR at 1% FPR": tpr_at(0.01)}

RANDOM_DRAWS = 5


def detection_table(
    scores: Mapping[str, NDArray[np.float64]], prompts: Sequence[Prompt], name: str
) -> Table:
    """AUROC and TPR at 5 % and 1 % FPR, with 95 % bootstrap intervals, of each rule on one set.

    Args:
        scores: Rule -> scores [n]; higher is more harmful.
        prompts: The n labelled prompts.
        name: Of the set.
    """
    labels = [bool(p.harmful) for p in prompts]
    rows: list[tuple[Cell, ...]] = []
    for rule, values in scores.items():
        estimates = [estimate_metric(metric, labels, values) for metric in FIGURES.values()]
        cells = [cell for e in estimates for cell in (e.value, e.low, e.high)]
        rows.append((name, rule, *cells, *estimates[0].n))
    heads = [head for f in FIGURES for head in (f, f"{f}, low", f"{f}, high")]
    columns = ("set", "rule", *heads, "n harmful", "n harmless")
    note = "Intervals: 95 %, 1,000 bootstrap draws within each class."
    return Table(f"Detection on {name}", columns, tuple(rows), note)


def decision_table(
    scores: Mapping[str, tuple[NDArray[np.float64], float]], prompts: Sequence[Prompt], name: str
) -> Table:
    """Rates at the threshold of each guard: what an engineer gets.

    Args:
        scores: Rule -> (scores [n], threshold).
        prompts: The n labelled prompts.
        name: Of the set.
    """
    labels = np.array([bool(p.harmful) for p in prompts])
    rows = []
    for rule, (values, threshold) in scores.items():
        flagged = values > threshold
        accuracy = estimate_metric(balanced_accuracy_at(threshold), labels, values)
        f1 = estimate_metric(f1_at(threshold), labels, values)
        rates = float(flagged[labels].mean()), float(flagged[~labels].mean())
        rows.append((name, rule, *rates, str(accuracy), str(f1), *accuracy.n))
    rates_of = ("true-positive rate", "false-positive rate", "balanced accuracy", "F1")
    columns = ("set", "rule", *rates_of, "n harmful", "n harmless")
    return Table(f"Decisions on {name}", columns, tuple(rows), "At each guard's own threshold.")


def length_scores(prompts: Sequence[Prompt]) -> NDArray[np.float64]:
    """The length baseline: number of characters, [n]."""
    return np.array([len(p.text) for p in prompts], dtype=np.float64)


def guard_scores(guard: LatentGuard, states: States) -> NDArray[np.float64]:
    """The guard's scores of states captured at its positions and layers, [n]."""
    return np.array([verdict.score for verdict in guard.judge(states)])


def random_direction_scores(
    guard: LatentGuard, states: States, *, seed: int = 0
) -> list[NDArray[np.float64]]:
    """Scores by random weights of equal norm in every layer, one array [n] a draw."""
    values = slots(states.select(guard.probe.layers), guard.reading.positions)
    probes = random_probes(guard.probe, RANDOM_DRAWS, seed=seed)
    return [probe(values).double().numpy() for probe in probes]


def layer_curves(axis: Axis, states: States, labels: NDArray[np.bool_]) -> Curve:
    """AUROC of s^l (equation 2) by layer, with the ends of its 95 % bootstrap interval."""
    beliefs = axis.layer_beliefs(states.at(axis.position)).double().numpy()
    return to_curve([estimate_metric(auroc, labels, column, draws=200) for column in beliefs.T])
