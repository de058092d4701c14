"""Surface audit: how well the form of prompts alone separates a labelled set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from threadpoolctl import threadpool_limits

from latentguard.errors import GuardError
from latentguard.prompts import Prompt
from latentguard.stats.detection import auroc

WARNING_LEVEL = 0.6
"""A set is called confounded if a surface feature has a higher balanced accuracy or AUROC."""

QUESTION_WORDS = set(
    """
    who what when where why which whose how is are am was were do does did can could will would
    should shall may might has have had
    """.split()
)
STATEMENT_WORDS = set(
    """
    i i'm i'd i've my we we're our you he she they it it's this that these those there the a an as
    if here looking because since
    """.split()
)


@dataclass(frozen=True)
class SurfaceAudit:
    """How well surface form tells the label; 0.5 is chance, 1 is always."""

    n: tuple[int, int]
    """Number of harmful and of harmless prompts."""

    ending: float
    """Balanced accuracy of the class of the last character alone."""

    form: float
    """Balanced accuracy of the form alone (question, imperative, statement, multi-sentence)."""

    length: float
    """AUROC of the number of characters, in its better direction."""

    ngrams: float
    """AUROC of TF-IDF word 1-2-grams + logistic regression over pair-disjoint folds."""

    endings: dict[str, tuple[int, int]]
    """Ending -> number of harmful and of harmless prompts."""

    forms: dict[str, tuple[int, int]]
    """Form -> number of harmful and of harmless prompts."""

    @property
    def warnings(self) -> list[str]:
        """One sentence for each surface feature that separates the classes."""
        return _warnings({"ending": self.ending, "form": self.form, "length": self.length})


def audit_surface(prompts: Sequence[Prompt], *, folds: int = 5) -> SurfaceAudit:
    """SurfaceAudit the labelled prompts of a set.

    Raises:
        GuardError: if there are fewer than ``folds`` labelled prompts of a class, or pairs.
    """
    labelled = [p for p in prompts if p.harmful is not None]
    labels = np.array([p.harmful for p in labelled], dtype=bool)
    count = int(labels.sum()), int((~labels).sum())
    if min(count, default=0) < folds:
        raise GuardError(
            f"An audit needs at least {folds} harmful and {folds} harmless prompts; found "
            f"{count[0]} and {count[1]}. Give both sides, with --label for files without labels."
        )
    if (groups := len(set(_groups(labelled)))) < folds:
        raise GuardError(f"An audit needs prompts of at least {folds} pairs; found {groups}.")
    endings = [ending_class(p.text) for p in labelled]
    forms = [form_class(p.text) for p in labelled]
    return SurfaceAudit(
        n=count,
        ending=_balanced_accuracy(endings, labels),
        form=_balanced_accuracy(forms, labels),
        length=_length(labelled, labels),
        ngrams=auroc(labels, held_out_ngram_scores(labelled, folds=folds)),
        endings=_counts(endings, labels),
        forms=_counts(forms, labels),
    )


def surface_warnings(prompts: Sequence[Prompt]) -> list[str]:
    """Return the warnings of an audit without its n-gram baseline; fast enough for every fit."""
    labels = np.array([bool(p.harmful) for p in prompts])
    if labels.all() or not labels.any():
        return []
    values = {
        "ending": _balanced_accuracy([ending_class(p.text) for p in prompts], labels),
        "form": _balanced_accuracy([form_class(p.text) for p in prompts], labels),
        "length": _length(prompts, labels),
    }
    return _warnings(values)


def ending_class(text: str) -> str:
    """Return the class of the last character: ``.``, ``?``, ``!``, ``word`` or ``other``."""
    last = text.rstrip()[-1:]
    if last in (".", "?", "!"):
        return last
    return "word" if last.isalnum() else "other"


def form_class(text: str) -> str:
    """Return the rough form: ``multi``, ``question``, ``statement`` or ``imperative``."""
    text = text.strip()
    if len(re.split(r"[.?!]+\s+|\n+", text)) > 1:
        return "multi"
    first = re.split(r"[\s,]", text.lower(), maxsplit=1)[0]
    if text.endswith("?") or first in QUESTION_WORDS:
        return "question"
    return "statement" if first in STATEMENT_WORDS else "imperative"


def ngram_model() -> Pipeline:
    """Return the n-gram baseline: TF-IDF of word 1-2-grams + logistic regression."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1)
    return make_pipeline(words, LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000))


def ngram_scores(train: Sequence[Prompt], test: Sequence[Prompt]) -> NDArray[np.float64]:
    """Return the scores of the n-gram baseline, [n]; it is fitted once per training set."""
    model = _fit_ngrams(tuple((p.text, bool(p.harmful)) for p in train))
    return np.asarray(model.decision_function([p.text for p in test]), dtype=np.float64)


@lru_cache(maxsize=2)
def _fit_ngrams(rows: tuple[tuple[str, bool], ...]) -> Pipeline:
    """Return the baseline, fitted on texts with labels."""
    texts, labels = zip(*rows, strict=True)
    with threadpool_limits(1):  # small matrices: threads cost more than they give
        return ngram_model().fit(texts, labels)


def held_out_ngram_scores(prompts: Sequence[Prompt], *, folds: int = 5) -> NDArray[np.float64]:
    """Return n-gram scores on held-out folds, [n]; pairs stay together."""
    texts, labels = [p.text for p in prompts], [bool(p.harmful) for p in prompts]
    split = GroupKFold(folds, shuffle=True, random_state=0)
    how = dict(groups=_groups(prompts), cv=split, method="decision_function")
    with threadpool_limits(1):
        scores = cross_val_predict(ngram_model(), texts, labels, **how)
    return np.asarray(scores, dtype=np.float64)


def _groups(prompts: Sequence[Prompt]) -> list[str]:
    """Return what stays together in a fold: a pair, or a single prompt."""
    return [p.pair or f"row {i}" for i, p in enumerate(prompts)]


def _warnings(figures: dict[str, float]) -> list[str]:
    return [
        f"The {name} of a prompt alone tells the label apart ({value:.2f}, where 0.5 is nothing): "
        "a probe fitted on this set may learn form instead of harm."
        for name, value in figures.items()
        if value > WARNING_LEVEL
    ]


def _length(prompts: Sequence[Prompt], labels: NDArray[np.bool_]) -> float:
    area = auroc(labels, np.array([len(p.text) for p in prompts], dtype=float))
    return max(area, 1 - area)


def _balanced_accuracy(values: Sequence[str], labels: NDArray[np.bool_]) -> float:
    """Return the accuracy of guessing, for each value, its more frequent class."""
    shares = [np.array([_share(values, labels == side, v) for v in set(values)]) for side in (1, 0)]
    return float(np.maximum(*shares).sum() / 2)


def _share(values: Sequence[str], rows: NDArray[np.bool_], value: str) -> float:
    return float(np.mean([v == value for v, keep in zip(values, rows, strict=True) if keep]))


def _counts(values: Sequence[str], labels: NDArray[np.bool_]) -> dict[str, tuple[int, int]]:
    counts = Counter(zip(values, labels.tolist(), strict=True))
    return {value: (counts[value, True], counts[value, False]) for value in sorted(set(values))}
