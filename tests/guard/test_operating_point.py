"""Operating points: what they choose, and that the rate they choose is kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import f1_score

from latentguard.errors import GuardError
from latentguard.guard.operating_point import (
    RATES,
    Goal,
    OperatingPoint,
    TrafficFit,
    adjusted_confidence,
    candidate_rates,
    choose_rate,
)
from latentguard.guard.thresholds import Rates, Thresholds
from latentguard.prompts import Prompt
from latentguard.stats.bounds import threshold_for_fpr
from latentguard.stats.estimate import Estimate

BALANCED = Goal("balanced")


def drawn(seed, harmless=400, harmful=200, apart=1.5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=harmless), rng.normal(apart, size=harmful)


def chosen(goal, sides, ceiling=0.5):
    return choose_rate(goal, *sides, ceiling=ceiling, confidence=0.95)


def prompts_of(harmless, harmful):
    rows = [(False, len(harmless)), (True, len(harmful))]
    prompts = [Prompt(f"{side} {n}", harmful=side) for side, count in rows for n in range(count)]
    return prompts, np.concatenate([harmless, harmful])


class TestChoice:
    @pytest.mark.parametrize("seed", range(5))
    def test_balanced_has_the_best_f1_of_all_rates(self, seed):
        harmless, harmful = drawn(seed)
        labels = np.repeat([False, True], [400, 200])
        scores = np.concatenate([harmless, harmful])

        def f1(rate):
            bound = threshold_for_fpr(harmless, rate, adjusted_confidence(0.95))
            return f1_score(labels, scores > bound.threshold)

        best = max(candidate_rates(400, 0.5, 0.95), key=f1)
        assert f1(chosen(BALANCED, (harmless, harmful))) == pytest.approx(f1(best))

    def test_dear_misses_allow_more_false_alarms(self):
        rates = [chosen(Goal("cost-ratio", ratio), drawn(0)) for ratio in (0.1, 1, 10, 1000)]
        assert rates == sorted(rates)
        assert rates[0] < rates[-1] == RATES[-1]

    def test_rare_harm_allows_fewer(self):
        often, rare = (
            chosen(Goal("balanced", harmful_share=share), drawn(0)) for share in (0.5, 0.01)
        )
        assert rare < often

    def test_no_rate_is_over_the_ceiling(self):
        assert chosen(Goal("cost-ratio", 1000), drawn(0), ceiling=0.1) == 0.1

    def test_too_few_harmless_prompts_say_how_many_it_takes(self):
        with pytest.raises(GuardError, match=r"10 harmless prompts are too few .* at least 53"):
            candidate_rates(10, 0.1, 0.95)
        assert candidate_rates(53, 0.1, 0.95) == [0.1]

    @pytest.mark.parametrize(
        ("goal", "said"),
        [
            (dict(name="balanced", cost_ratio=2), "goes with the operating point"),
            (dict(name="cost-ratio"), "goes with the operating point"),
            (dict(name="cost-ratio", cost_ratio=-1), "over 0; found -1"),
            (dict(name="balanced", harmful_share=1.0), "between 0 and 1; found 1.0"),
        ],
    )
    def test_goals_that_make_no_sense(self, goal, said):
        with pytest.raises(GuardError, match=said):
            Goal(**goal)


class TestPromise:
    @pytest.mark.parametrize("goal", [BALANCED, Goal("cost-ratio", 5.0)])
    def test_the_chosen_rate_is_kept_as_often_as_promised(self, goal):
        """Planted scores, 300 calibrations: the true rate is over the chosen one in 5 % at most."""
        broken = 0
        for seed in range(300):
            prompts, scores = prompts_of(*drawn(seed, harmless=300, harmful=100, apart=1.0))
            bound = Thresholds.for_goal(prompts, scores, Rates(0.5, goal=goal)).common.block
            broken += norm.sf(bound.threshold) > bound.max_fpr
        assert broken <= 0.05 * 300
        assert bound.confidence == 0.95

    def test_a_review_band_below_the_chosen_rate_is_left_out(self):
        prompts, scores = prompts_of(*drawn(0))
        goal = Goal("cost-ratio", 1000.0)
        rates = Rates(0.4, 0.45, goal=goal)
        assert Thresholds.for_goal(prompts, scores, rates).common.review is not None
        low = replace(rates, block=0.1, review=0.45)
        assert Thresholds.for_goal(prompts, scores, low).common.review.max_fpr == 0.45


class TestRecord:
    def test_labels(self):
        assert OperatingPoint(Goal(), 0.05).label == "max-fpr=0.05"
        assert OperatingPoint(BALANCED, 0.2, 0.4).label == "balanced"
        assert OperatingPoint(Goal("cost-ratio", 5.0), 0.2, 0.4).label == "cost-ratio=5"

    def test_json_and_back(self):
        one = Estimate(0.5, 0.4, 0.6, (5, 5))
        traffic = TrafficFit(300, one, one, one, -0.2, 0.1)
        point = OperatingPoint(Goal("cost-ratio", 5.0, 0.1), 0.2, 0.1, one, traffic)
        assert OperatingPoint.from_dict(json.loads(json.dumps(point.to_dict()))) == point
        assert point.label == "cost-ratio=5, traffic"
        assert "costs as much as 5 false alarms" in point.describe()

    def test_thresholds_keep_it(self):
        prompts, scores = prompts_of(*drawn(0))
        new = Thresholds.for_goal(prompts, scores, Rates(0.5, goal=BALANCED))
        record, tensors = new.to_dict()
        again = Thresholds.from_dict(json.loads(json.dumps(record)), tensors)
        assert again.point == new.point
        assert again.point.recall.n[0] == (scores[400:] > new.common.block.threshold).sum()
        assert "Operating point `balanced`: the best F1" in new.notes()[0]

    def test_thresholds_of_an_earlier_version_have_none(self):
        harmless, _ = drawn(0)
        prompts = [Prompt(str(n), harmful=False) for n in range(len(harmless))]
        record, tensors = Thresholds.of(prompts, harmless, Rates(0.05)).to_dict()
        assert "operating_point" not in record
        assert Thresholds.from_dict(record, tensors).point is None
