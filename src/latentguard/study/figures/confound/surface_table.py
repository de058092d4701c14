"""The surface audit of many sets as one table, with intervals (see ``audit``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from latentguard.data.surface_audit import WARNING_LEVEL, audit_surface, held_out_ngram_scores
from latentguard.errors import GuardError
from latentguard.prompts import Prompt
from latentguard.report.document import Cell, Table
from latentguard.stats.bootstrap import bootstrap
from latentguard.stats.detection import separation
from latentguard.stats.estimate import Estimate
from latentguard.study.detectors import Scores


def audit_table(sets: Mapping[str, Sequence[Prompt]]) -> Table:
    """What form alone gives away in each set; sets with too few of a class are left out."""
    rows: list[tuple[Cell, ...]] = []
    left_out = []
    for name, prompts in sets.items():
        try:
            shares = features(prompts)
        except GuardError:
            left_out.append(name)
            continue
        for feature, one in shares.items():
            figures = (one.value, one.low, one.high, *one.n)
            rows.append((name, feature, *figures, one.value > WARNING_LEVEL))
    note = (
        "No model is asked. Ending (class of the last character) and form (question, imperative, "
        "...): balanced accuracy of the better guess. Length and n-grams (held-out folds): AUROC. "
        f"0.5 is nothing; above {WARNING_LEVEL} a set is called confounded. Intervals: 95 % "
        f"bootstrap. Too small to audit: {', '.join(left_out) or 'none'}."
    )
    columns = ("set", "feature", "value", "low", "high", "n harmful", "n harmless", "confounded")
    return Table("Surface audit", columns, tuple(rows), note)


def features(prompts: Sequence[Prompt]) -> dict[str, Estimate]:
    """How well each feature of form tells the labels of a set of labelled prompts apart.

    Raises:
        GuardError: if there are too few prompts of a class, or pairs.
    """
    audit = audit_surface(prompts)
    harmful = np.array([bool(p.harmful) for p in prompts])
    length = np.array([[len(p.text) for p in prompts]], dtype=np.float64)
    lengths = {sign: separation(*_sides(sign * length, harmful)) for sign in (1, -1)}
    return {
        "ending": guessed(audit.endings),
        "form": guessed(audit.forms),
        "length": max(lengths.values(), key=lambda one: one.value),
        "n-grams": separation(*_sides(held_out_ngram_scores(prompts)[None], harmful)),
    }


def _sides(scores: Scores, harmful: NDArray[np.bool_]) -> tuple[Scores, Scores]:
    return scores[:, harmful], scores[:, ~harmful]


def guessed(counts: Mapping[str, tuple[int, int]]) -> Estimate:
    """Balanced accuracy of the better guess for each value, from its counts in both classes.

    The interval keeps the guesses: one that guesses anew in each draw would lie too high.
    """
    table = np.array(list(counts.values()), dtype=np.float64).T  # [2 values]
    guess = (table / table.sum(1, keepdims=True)).argmax(0)
    hits = [np.repeat(guess == side, row.astype(int)) for side, row in enumerate(table)]
    return bootstrap(lambda a, b: float(a.mean() + b.mean()) / 2, *hits)
