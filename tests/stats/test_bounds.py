"""Exact bounds of rates, and what a threshold promises."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from latentguard.errors import GuardError
from latentguard.stats.bounds import (
    clopper_pearson_upper,
    require_enough_harmless,
    smallest_n,
    threshold_for_fpr,
)

FEW_VALUES = st.integers(-3, 3).map(float)
"""So few that ties are everywhere."""


class TestBounds:
    @pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
    @pytest.mark.parametrize("n", [1, 7, 300])
    def test_clopper_pearson_is_that_of_scipy(self, n, confidence):
        for count in range(0, n + 1, max(1, n // 7)):
            test = binomtest(count, n, alternative="less")
            upper = test.proportion_ci(confidence, method="exact").high
            assert clopper_pearson_upper(count, n, confidence) == pytest.approx(upper, abs=1e-9)

    def test_of_nothing_seen(self):
        assert clopper_pearson_upper(0, 0) == 1.0

    @given(
        st.sampled_from([0.001, 0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.95]),
        st.sampled_from([0.5, 0.75, 0.9, 0.95, 0.99]),
    )
    def test_the_smallest_n_is_enough_and_one_less_is_not(self, rate, confidence):
        n = smallest_n(rate, confidence)
        bound = threshold_for_fpr(np.arange(float(n)), rate, confidence)
        assert (bound.observed, bound.n) == (0, n) and n - 1 <= bound.threshold
        with pytest.raises(GuardError, match=f"Give at least {n},"):
            threshold_for_fpr(np.arange(n - 1.0), rate, confidence)

    def test_299_for_one_percent(self):
        with pytest.raises(GuardError, match=r"298 .* too few .* 1.00% with 95% .* at least 299"):
            threshold_for_fpr(np.arange(298.0), 0.01)
        assert smallest_n(0.01) == 299

    def test_too_few_prompts_are_refused_before_they_are_scored(self):
        require_enough_harmless(299, 0.01)
        with pytest.raises(GuardError, match=r"298 .* too few .* at least 299"):
            require_enough_harmless(298, 0.01)
        with pytest.raises(GuardError, match="between 0 and 1"):
            require_enough_harmless(298, 1.5)

    @pytest.mark.parametrize("n", [1, 30, 100, 297])
    def test_the_rate_that_the_message_offers_is_granted(self, n):
        with pytest.raises(GuardError) as error:
            threshold_for_fpr(np.arange(float(n)), 0.01)
        offered = re.search(r"ask for ([\d.]+)% or more", str(error.value))
        assert threshold_for_fpr(np.arange(float(n)), float(offered[1]) / 100).observed == 0

    @given(st.lists(FEW_VALUES, min_size=60, max_size=120))
    def test_it_is_the_lowest_threshold_that_keeps_the_rate(self, scores):
        bound = threshold_for_fpr(scores, 0.1)
        ranked = sorted(scores, reverse=True)
        k = sum(s > bound.threshold for s in scores)
        assert bound.threshold not in scores or len(set(scores)) == 1
        assert bound.observed == sum(s > bound.threshold for s in scores) == k
        assert bound.observed / bound.n <= bound.upper <= bound.max_fpr
        assert (bound.n, bound.max_fpr, bound.confidence) == (len(scores), 0.1, 0.95)
        kept = ranked[k]  # the threshold lies a hair above
        lower = max((s for s in scores if s < kept), default=None)
        if lower is not None:  # the next threshold could flag as many as there are above it
            at_least = sum(s > lower for s in scores)
            assert clopper_pearson_upper(at_least, len(scores)) > 0.1

    @pytest.mark.parametrize("rounding", [0.0, 1e-7, 2e-3])
    def test_copies_of_a_prompt_lie_on_one_side(self, rounding):
        """A prompt that is 4 % of the traffic, and scores a little otherwise in every batch."""
        rng = np.random.default_rng(0)
        copies = 5 + rounding * rng.random(60)
        bound = threshold_for_fpr([*rng.normal(size=1340), *copies], 0.01)
        assert bound.threshold > 5 + rounding + 0.009
        assert bound.observed == 0

    def test_nothing_scored(self):
        with pytest.raises(GuardError, match="0 harmless prompts are too few"):
            threshold_for_fpr([], 0.05)

    @pytest.mark.parametrize("rate", [0, 1, -0.1, 5, float("nan")])
    def test_a_rate_outside_0_and_1(self, rate):
        with pytest.raises(GuardError, match="rate between 0 and 1"):
            threshold_for_fpr(np.arange(100.0), rate)

    @pytest.mark.parametrize("confidence", [0, 1, 95, -1, float("nan")])
    def test_a_confidence_outside_0_and_1(self, confidence):
        with pytest.raises(GuardError, match="confidence between 0 and 1"):
            threshold_for_fpr(np.arange(100.0), 0.05, confidence)

    def test_undefined_scores(self):
        with pytest.raises(GuardError, match="finite scores"):
            threshold_for_fpr([1.0, float("nan")], 0.5)

    def test_how_it_reads(self):
        words = str(threshold_for_fpr(np.arange(1000.0) ** 4, 0.01, 0.995))
        assert words.startswith("at most 1.00% of harmless prompts like these are flagged, with ")
        assert "99.5% confidence" in words  # not rounded to a certainty
        assert "2 of n = 1000" in words

    def test_over_many_calibrations_the_rate_is_kept_as_often_as_promised(self):
        rng = np.random.default_rng(1)
        rates = []
        for _ in range(300):
            threshold = threshold_for_fpr(rng.uniform(size=200), 0.05).threshold
            rates.append(1 - threshold)  # the true rate: fresh scores are uniform, too
        exceeded = np.mean(np.array(rates) > 0.05)
        assert exceeded <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5
        assert np.mean(rates) > 0.02  # and it is not kept by flagging nothing
