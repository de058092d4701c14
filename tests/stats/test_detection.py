"""Figures of quality against scikit-learn and scipy, and what a threshold promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
    roc_curve,
)

from latentguard.errors import GuardError
from latentguard.stats.detection import (
    auroc,
    auroc_interval,
    average_precision,
    balanced_accuracy_at,
    combine_areas,
    estimate_metric,
    f1_at,
    f1_at_fpr,
    separation,
    tpr_at,
    win_matrix,
)

FEW_VALUES = st.integers(-3, 3).map(float)
"""So few that ties are everywhere."""


@st.composite
def scored(draw):
    """Labels and scores, both classes present."""
    sides = [draw(st.lists(FEW_VALUES, min_size=1, max_size=30)) for _ in range(2)]
    labels = np.array([True] * len(sides[0]) + [False] * len(sides[1]))
    return labels, np.array(sides[0] + sides[1])


class TestSameAsScikitLearn:
    @given(scored())
    def test_auroc(self, data):
        assert auroc(*data) == pytest.approx(roc_auc_score(*data), abs=1e-12)

    @given(scored())
    def test_average_precision(self, data):
        expected = average_precision_score(*data)
        assert average_precision(*data) == pytest.approx(expected, abs=1e-12)

    @given(scored(), st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    def test_f1_at_a_false_positive_rate(self, data, max_fpr):
        labels, scores = data
        cuts = [-np.inf, *np.unique(scores)]
        allowed = [cut for cut in cuts if (scores[~labels] > cut).mean() <= max_fpr + 1e-12]
        assert f1_at_fpr(max_fpr)(*data) == f1_score(labels, scores > min(allowed))

    @given(scored(), st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0]))
    def test_tpr_at(self, data, max_fpr):
        false, true, _ = roc_curve(*data, drop_intermediate=False)
        assert tpr_at(max_fpr)(*data) == true[false <= max_fpr + 1e-12].max()

    def test_tpr_at_a_rate_that_is_a_whole_number_of_prompts(self):
        labels = np.array([True] * 100 + [False] * 100)
        scores = np.array([*range(100), *range(100)], dtype=float)
        for flagged in range(100):  # 0.29 * 100 is 28.999... in floating point
            assert tpr_at(flagged / 100)(labels, scores) == flagged / 100

    @given(scored(), st.sampled_from([-3.5, -1.0, 0.0, 2.0]))
    def test_decisions(self, data, threshold):
        labels, scores = data
        flagged = scores > threshold
        balanced = balanced_accuracy_score(labels, flagged)
        assert balanced_accuracy_at(threshold)(*data) == pytest.approx(balanced)
        assert f1_at(threshold)(*data) == pytest.approx(f1_score(labels, flagged))


class TestEstimate:
    @pytest.fixture
    def data(self):
        rng = np.random.default_rng(5)
        labels = np.arange(150) < 60
        return labels, rng.normal(size=150).round(1) + labels

    @pytest.mark.parametrize(
        "metric", [auroc, tpr_at(0.05), tpr_at(0.2), balanced_accuracy_at(0.5), f1_at(0.5)]
    )
    def test_the_interval_contains_the_value(self, data, metric):
        found = estimate_metric(metric, *data)
        assert found.low <= found.value <= found.high
        assert found.low < found.high
        assert found.value == metric(*data)
        assert found.n == (60, 90)

    def test_the_seed_fixes_it(self, data):
        assert estimate_metric(auroc, *data) == estimate_metric(auroc, *data)
        assert estimate_metric(auroc, *data) != estimate_metric(auroc, *data, seed=1)

    def test_the_interval_is_as_wide_as_it_should_be(self):
        """Over fresh draws of the data the interval misses the truth about one time in twenty."""
        rng = np.random.default_rng(0)
        labels, truth = np.arange(80) < 40, 0.7602  # Phi(1 / sqrt 2)
        found = [
            estimate_metric(auroc, labels, rng.normal(size=80) + labels, draws=200, seed=n)
            for n in range(200)
        ]
        missed = sum(not e.low <= truth <= e.high for e in found)
        assert 2 <= missed <= 22

    def test_it_spans_95_percent_of_the_draws(self):
        """Of a mean the interval is known: 1.96 standard errors to either side."""
        rng = np.random.default_rng(2)
        labels, scores = np.arange(1000) < 500, rng.normal(size=1000)
        found = estimate_metric(lambda y, s: float(s[y].mean()), labels, scores, draws=4000)
        wanted = 2 * 1.96 * scores[labels].std() / 500**0.5
        assert found.high - found.low == pytest.approx(wanted, rel=0.06)

    def test_how_it_reads(self):
        found = estimate_metric(auroc, [True, True, False], [2.0, 3.0, 1.0])
        assert str(found) == "1.000 [1.000, 1.000]"

    @pytest.mark.parametrize(
        ("labels", "scores", "reason"),
        [
            ([True, True], [1.0, 2.0], "2 harmful, 0 harmless"),
            ([False], [1.0], "0 harmful, 1 harmless"),
            ([], [], "0 harmful, 0 harmless"),
            ([True, False], [1.0, float("nan")], "1 undefined"),
        ],
    )
    def test_what_cannot_be_measured(self, labels, scores, reason):
        with pytest.raises(GuardError, match=reason):
            estimate_metric(auroc, labels, scores)


class TestAurocInterval:
    @pytest.mark.parametrize("area", [0.6, 0.8, 0.95, 0.99])
    @pytest.mark.parametrize("n", [10, 30])
    def test_coverage(self, n, area):
        """Normal scores; without the undecided prompts 0.99 is covered in 0.4 and 0.8."""
        rng = np.random.default_rng(0)
        shift = 2**0.5 * norm.ppf(area)
        held = 0
        for trial in range(200):
            wins = win_matrix(rng.normal(size=n) + shift, rng.normal(size=n))
            found = auroc_interval(wins, seed=trial)
            held += found.low <= area <= found.high
        assert held / 200 >= 0.89

    def test_faultless_scores_of_few_prompts_are_no_point(self):
        found = separation([3.0, 4.0, 5.0], [0.0, 1.0])
        assert (found.value, found.high, found.n) == (1, 1, (3, 2))
        assert found.low < 0.8

    def test_a_sum_of_areas(self):
        rng = np.random.default_rng(2)
        one, other = (win_matrix(rng.normal(size=40) + s, rng.normal(size=40)) for s in (1, 2))
        found = combine_areas([one, other], [-1, 1], constant=0.5)
        assert found.value == pytest.approx(other.mean() - one.mean() + 0.5)
        assert found.low < found.value < found.high
        assert found.n == (80, 80)
