"""Surface audit: how well form alone, without any model, separates a labelled set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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

WARN_AT = 0.6
"""Balanced accuracy or AUROC of a surface feature above which a set is called confounded."""

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
class Audit:
    """What surface form gives away; 0.5 is nothing, 1 is the whole label."""

    n: tuple[int, int]
    """Harmful and harmless prompts."""

    ending: float
    """Balanced accuracy of the class of the last character alone."""

    form: float
    """Balanced accuracy of the form alone (question, imperative, statement, multi-sentence)."""

    length: float
    """AUROC of the number of characters, in its better direction."""

    ngrams: float
    """AUROC of TF-IDF word 1-2-grams + logistic regression over pair-disjoint folds."""

    endings: dict[str, tuple[int, int]]
    """Harmful and harmless prompts by ending."""

    forms: dict[str, tuple[int, int]]
    """Harmful and harmless prompts by form."""

    @property
    def warnings(self) -> list[str]:
        """One sentence for each feature of form that separates the classes."""
        return _warnings({"ending": self.ending, "form": self.form, "length": self.length})


def audit(prompts: Sequence[Prompt], *, folds: int = 5) -> Audit:
    """Audit the labelled prompts of a set.

    Raises:
        GuardError: if there are fewer than ``folds`` labelled prompts of a class, or pairs.
    """
    known = [p for p in prompts if p.harmful is not None]
    labels = np.array([p.harmful for p in known], dtype=bool)
    count = int(labels.sum()), int((~labels).sum())
    if min(count, default=0) < folds:
        raise GuardError(
            f"An audit needs at least {folds} harmful and {folds} harmless prompts; found "
            f"{count[0]} and {count[1]}. Give both sides, with --label for files without labels."
        )
    if (groups := len(set(_groups(known)))) < folds:
        raise GuardError(f"An audit needs prompts of at least {folds} pairs; found {groups}.")
    endings = [ending(p.text) for p in known]
    forms = [form(p.text) for p in known]
    return Audit(
        n=count,
        ending=_balanced_accuracy(endings, labels),
        form=_balanced_accuracy(forms, labels),
        length=_length(known, labels),
        ngrams=auroc(labels, ngram_held_out(known, folds=folds)),
        endings=_counts(endings, labels),
        forms=_counts(forms, labels),
    )


def surface_warnings(prompts: Sequence[Prompt]) -> list[str]:
    """The warnings of an audit, without its n-gram baseline: quick enough for every fit."""
    labels = np.array([bool(p.harmful) for p in prompts])
    if labels.all() or not labels.any():
        return []
    values = {
        "ending": _balanced_accuracy([ending(p.text) for p in prompts], labels),
        "form": _balanced_accuracy([form(p.text) for p in prompts], labels),
        "length": _length(prompts, labels),
    }
    return _warnings(values)


def ending(text: str) -> str:
    """Class of the last character: ``.``, ``?``, ``!``, ``word`` or ``other``."""
    last = text.rstrip()[-1:]
    if last in (".", "?", "!"):
        return last
    return "word" if last.isalnum() else "other"


def form(text: str) -> str:
    """Rough form of a prompt: ``multi``, ``question``, ``statement`` or ``imperative``."""
    text = text.strip()
    if len(re.split(r"[.?!]+\s+|\n+", text)) > 1:
        return "multi"
    first = re.split(r"[\s,]", text.lower(), maxsplit=1)[0]
    if text.endswith("?") or first in QUESTION_WORDS:
        return "question"
    return "statement" if first in STATEMENT_WORDS else "imperative"


def ngram_model() -> Pipeline:
    """The n-gram baseline: TF-IDF of word 1-2-grams + logistic regression."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1)
    return make_pipeline(words, LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000))


def ngram_scores(train: Sequence[Prompt], test: Sequence[Prompt]) -> NDArray[np.float64]:
    """Scores of the n-gram baseline, [n]: what the words alone give."""
    with threadpool_limits(1):  # small matrices: threads cost more than they give
        model = ngram_model().fit([p.text for p in train], [bool(p.harmful) for p in train])
    return np.asarray(model.decision_function([p.text for p in test]), dtype=np.float64)


def ngram_held_out(prompts: Sequence[Prompt], *, folds: int = 5) -> NDArray[np.float64]:
    """Scores of the n-gram baseline on folds that it did not see; pairs stay together, [n]."""
    texts, labels = [p.text for p in prompts], [bool(p.harmful) for p in prompts]
    split = GroupKFold(folds, shuffle=True, random_state=0)
    how = dict(groups=_groups(prompts), cv=split, method="decision_function")
    with threadpool_limits(1):
        scores = cross_val_predict(ngram_model(), texts, labels, **how)
    return np.asarray(scores, dtype=np.float64)


def _groups(prompts: Sequence[Prompt]) -> list[str]:
    """What stays together in a fold: a pair, or a lone prompt."""
    return [p.pair or f"row {i}" for i, p in enumerate(prompts)]


def _warnings(figures: dict[str, float]) -> list[str]:
    return [
        f"The {name} of a prompt alone tells the label apart ({value:.2f}, where 0.5 is nothing): "
        "a probe fitted on this set may learn form instead of harm."
        for name, value in figures.items()
        if value > WARN_AT
    ]


def _length(prompts: Sequence[Prompt], labels: NDArray[np.bool_]) -> float:
    found = auroc(labels, np.array([len(p.text) for p in prompts], dtype=float))
    return max(found, 1 - found)


def _balanced_accuracy(values: Sequence[str], labels: NDArray[np.bool_]) -> float:
    """Of guessing, for each value, the class in which it is more frequent."""
    shares = [np.array([_share(values, labels == side, v) for v in set(values)]) for side in (1, 0)]
    return float(np.maximum(*shares).sum() / 2)


def _share(values: Sequence[str], rows: NDArray[np.bool_], value: str) -> float:
    return float(np.mean([v == value for v, keep in zip(values, rows, strict=True) if keep]))


def _counts(values: Sequence[str], labels: NDArray[np.bool_]) -> dict[str, tuple[int, int]]:
    counts = Counter(zip(values, labels.tolist(), strict=True))
    return {value: (counts[value, True], counts[value, False]) for value in sorted(set(values))}
