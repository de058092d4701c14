"""Probabilities: planted maps are found, figures agree with scikit-learn and with brute force."""

import json
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sk_log_loss

from latentguard.errors import GuardError
from latentguard.guard import probabilities
from latentguard.guard.probabilities import fit_isotonic, fit_probabilities
from latentguard.guard.reliability import (
    Reliability,
    brier,
    error_of,
    errors_by_chance,
    expected_error,
    log_loss,
)


def drawn(chance, n=600, seed=0, low=-4.0, high=4.0):
    """Scores, with labels drawn by a map from score to chance."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(low, high, n)
    return scores, rng.random(n) < chance(scores)


def found(scores, labels, before=(1.0, 0.0), groups=None):
    groups = groups or [str(n) for n in range(len(scores))]
    return fit_probabilities(scores, labels, groups, before)


def logistic(scores):
    return expit(2 * scores)


def stairs(scores):
    """A map that no logistic curve is like: even odds over a wide middle."""
    return np.where(scores < -2, 0.02, np.where(scores < 2, 0.5, 0.98))


class TestChoice:
    def test_a_logistic_truth_is_found(self):
        result = found(*drawn(logistic, 2000))
        slope, intercept = result.platt
        assert slope == pytest.approx(2, rel=0.2)
        assert intercept == pytest.approx(0, abs=0.3)

    def test_a_truth_of_steps_is_isotonic(self):
        result = found(*drawn(stairs, 3000))
        assert result.reliability.method == "isotonic"
        assert result.isotonic(np.array([-3.0, 0.0, 3.0])) == pytest.approx(
            [0.02, 0.5, 0.98], abs=0.1
        )
        losses = result.reliability.log_loss
        assert losses["isotonic"] < losses["platt"]
        assert result.reliability.brier["isotonic"] < result.reliability.brier["platt"]

    def test_few_prompts_of_a_logistic_truth_are_platt(self):
        """Isotonic regression overfits them; cross-validation sees it."""
        result = found(*drawn(logistic, 100, seed=3))
        assert (result.reliability.method, result.isotonic) == ("platt", None)

    def test_classes_weigh_the_same(self):
        """Ten times as many harmless prompts do not move the middle."""
        scores, labels = drawn(logistic, 4000)
        keep = ~labels | (np.arange(4000) % 10 == 0)
        slope, intercept = found(scores[keep], labels[keep]).platt
        assert -intercept / slope == pytest.approx(0, abs=0.3)

    @pytest.mark.parametrize("count", [0, 29])
    def test_too_few(self, count):
        labels = np.arange(100) < count
        with pytest.raises(GuardError, match=f"at least 30 .* found {count} harmful and"):
            found(np.arange(100.0), labels)

    def test_pairs_share_a_fold(self, monkeypatch):
        seen = []
        real = probabilities.fit_platt

        def watched(scores, labels):
            seen.append(set(scores.tolist()))
            return real(scores, labels)

        monkeypatch.setattr(probabilities, "fit_platt", watched)
        scores, labels = drawn(logistic, 200)
        found(scores, labels, groups=[str(n // 2) for n in range(200)])
        for part in seen:
            assert all((scores[n] in part) == (scores[n + 1] in part) for n in range(0, 200, 2))


class TestFigures:
    @pytest.fixture
    def sample(self):
        scores, labels = drawn(logistic, 700, low=-2, high=4)
        return labels, expit(1.3 * scores - 0.4)

    def test_as_in_scikit_learn(self, sample):
        labels, chances = sample
        weights = np.where(labels, 1 / labels.sum(), 1 / (~labels).sum())
        assert log_loss(labels, chances) == pytest.approx(
            sk_log_loss(labels, chances, sample_weight=weights)
        )
        assert brier(labels, chances) == pytest.approx(
            brier_score_loss(labels, chances, sample_weight=weights)
        )

    def test_the_error_by_brute_force(self, sample):
        labels, chances = sample
        weights = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
        edges = np.quantile(chances, np.linspace(0, 1, 11))
        edges[-1] += 1
        total = 0.0
        for low, high in pairwise(edges):
            rows = (chances >= low) & (chances < high)
            share = (weights[rows] * labels[rows]).sum() / weights[rows].sum()
            mean = (weights[rows] * chances[rows]).sum() / weights[rows].sum()
            total += weights[rows].sum() * abs(share - mean)
        assert expected_error(labels, chances) == pytest.approx(total)

    def test_equal_probabilities_share_a_bin_whatever_their_order(self):
        labels = np.array([False] * 200 + [True] * 200)
        assert expected_error(labels, np.full(400, 0.5)) == pytest.approx(0)

    def test_a_perfect_map_is_at_its_floor(self):
        errors, floors = [], []
        for seed in range(30):
            scores, labels = drawn(logistic, 400, seed)
            errors.append(expected_error(labels, logistic(scores)))
            floors.append(errors_by_chance(labels, logistic(scores)).mean())
        assert np.mean(errors) == pytest.approx(np.mean(floors), rel=0.15)

    def test_a_wrong_map_is_seen_and_mended(self):
        scores, labels = drawn(logistic, 1500)
        result = found(scores, labels, before=(0.3, 1.0)).reliability
        assert result.before.low > 0.1
        assert result.after.value < 0.05
        assert result.log_loss["fitted"] > result.log_loss["platt"]
        assert result.after.n == (labels.sum(), (~labels).sum())

    @pytest.mark.parametrize("slope", [1, 2])
    def test_the_interval_holds_the_true_error(self, slope):
        """Of a wrong and of the true map, over fresh samples."""
        scores, labels = drawn(logistic, 400_000, seed=99)
        truth = expected_error(labels, expit(slope * scores)) if slope == 1 else 0.0
        hits = 0
        for seed in range(40):
            s, y = drawn(logistic, 300, seed)
            error = error_of(y, expit(slope * s))
            hits += error.low <= truth <= error.high
        assert hits >= 35

    def test_bins(self):
        scores, labels = drawn(logistic, 1000)
        bins = found(scores, labels).reliability.bins
        assert sum(b.n for b in bins) == 1000
        assert [b.predicted for b in bins] == sorted(b.predicted for b in bins)
        assert all(b.low <= b.observed <= b.high for b in bins)
        gaps = [abs(b.predicted - b.observed) for b in bins]
        assert max(gaps) < 0.2
        assert sum(b.low <= b.predicted <= b.high for b in bins) >= len(bins) - 2

    def test_an_isotonic_map_rises_and_is_never_certain(self):
        scores, labels = drawn(logistic, 300)
        knots = fit_isotonic(scores, labels)
        assert list(knots.probabilities) == sorted(knots.probabilities)
        assert 0 < min(knots.probabilities) < max(knots.probabilities) < 1
        assert knots(np.array([-99.0, 99.0])).tolist() == [
            knots.probabilities[0],
            knots.probabilities[-1],
        ]

    def test_through_json(self):
        result = found(*drawn(logistic, 300)).reliability
        assert Reliability.from_dict(json.loads(json.dumps(asdict(result)))) == result
