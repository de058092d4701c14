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
    joint_thresholds,
    require_enough_for_two,
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


class TestJointThresholds:
    """Scores are normal; the second opinion blocks by a score of its own, which agrees in part."""

    RATE, REVIEW, N = 0.05, 0.3, 300

    def world(self, rng, count, agreement, leniency):
        first = rng.normal(size=count)
        second = agreement * first + (1 - agreement**2) ** 0.5 * rng.normal(size=count)
        return first, second - leniency

    def calibrate(self, scores, opinions, *, is_graded=False):
        opinions = opinions if is_graded else np.where(np.greater(opinions, 0), 1.0, -1.0)
        review = threshold_for_fpr(scores, self.REVIEW)
        return joint_thresholds(scores, opinions, review, self.RATE, is_graded=is_graded)

    def flags(self, scores, opinions, joint):
        by_second = (opinions > joint.cut) & (scores > joint.review.threshold)
        return (scores > joint.block.threshold) | by_second

    @pytest.mark.parametrize("leniency", [-np.inf, 0.0, 1.0, 2.0, np.inf])
    @pytest.mark.parametrize("agreement", [0.0, 0.8])
    @pytest.mark.parametrize("is_graded", [False, True])
    def test_the_joint_rate_is_kept_with_the_confidence(self, is_graded, agreement, leniency):
        if is_graded and np.isinf(leniency):
            pytest.skip("its scores would not be graded")
        rng = np.random.default_rng(1)
        first, opinions = self.world(rng, 100_000, agreement, leniency)
        over = 0
        for _ in range(300):
            own = self.world(rng, self.N, agreement, leniency)
            joint = self.calibrate(*own, is_graded=is_graded)
            over += self.flags(first, opinions, joint).mean() > self.RATE
        assert over <= 27  # 5 % of 300 are 15; so many have a chance under 0.2 %

    def test_the_observed_rate_and_the_bound(self):
        rng = np.random.default_rng(2)
        scores, opinions = self.world(rng, 1000, 0.5, 1.0)
        joint = self.calibrate(scores, opinions)
        flagged = self.flags(scores, opinions, joint)
        assert joint.block.observed == flagged.sum()
        assert joint.block.observed / 1000 < joint.block.upper <= self.RATE
        assert joint.review.observed == (scores > joint.review.threshold).sum()

    def test_one_that_blocks_nothing_leaves_the_threshold_of_the_guard_alone(self):
        scores = np.random.default_rng(3).normal(size=500)
        joint = self.calibrate(scores, np.zeros(500, dtype=bool))
        assert joint.block == threshold_for_fpr(scores, self.RATE)
        assert joint.review == threshold_for_fpr(scores, self.REVIEW)

    def test_one_that_blocks_everything_is_asked_less(self):
        scores = np.random.default_rng(4).normal(size=500)
        joint = self.calibrate(scores, np.ones(500, dtype=bool))
        assert joint.review.threshold > threshold_for_fpr(scores, self.REVIEW).threshold
        assert joint.review.threshold <= joint.block.threshold

    def test_one_that_blocks_too_much_is_made_strict_where_it_is_graded(self):
        scores, opinions = self.world(np.random.default_rng(4), 1000, 0.5, -1.0)
        joint = self.calibrate(scores, opinions, is_graded=True)
        assert joint.cut > 0
        assert joint.review == threshold_for_fpr(scores, self.REVIEW)
        assert self.flags(scores, opinions, joint).sum() > 0.9 * 1000 * self.RATE / 2
        strict = self.calibrate(*self.world(np.random.default_rng(4), 1000, 0.5, 3.0))
        assert strict.cut == 0

    def test_what_is_blocked_below_the_review_threshold_does_not_count(self):
        scores = np.random.default_rng(5).normal(size=500)
        review = threshold_for_fpr(scores, self.REVIEW)
        blocked = scores <= review.threshold
        assert self.calibrate(scores, blocked) == self.calibrate(scores, ~blocked & blocked)

    @given(
        st.lists(FEW_VALUES, min_size=120, max_size=200), st.integers(0, 2**32 - 1), st.booleans()
    )
    def test_ties_do_not_break_it(self, scores, seed, is_graded):
        opinions = np.random.default_rng(seed).integers(-2, 3, len(scores)).astype(float)
        joint = self.calibrate(scores, opinions, is_graded=is_graded)
        assert joint.block.observed / len(scores) <= joint.block.upper <= self.RATE

    def test_one_flagged_prompt_has_to_be_allowed(self):
        require_enough_for_two(93, 0.05)
        for enough in (require_enough_harmless, require_enough_for_two):
            with pytest.raises(GuardError, match="too few"):
                enough(58, 0.05)
        with pytest.raises(GuardError, match="with a second opinion; give at least 93"):
            require_enough_for_two(92, 0.05)
