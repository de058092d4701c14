"""Moving to unlabelled traffic, against planted shares and shifts."""

import numpy as np
import pytest
from scipy.stats import gaussian_kde, norm

from fake_backend import FakeBackend
from guard.kinds import labelled
from latentguard.errors import GuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.operating_point import RATES, Goal
from latentguard.guard.thresholds import Rates
from latentguard.guard.traffic import ScoreMixture, _density, adapt_to_traffic
from latentguard.guard.verdict import Verdict
from latentguard.serve.chat_thresholds import ChatThresholds
from latentguard.stats.bounds import smallest_n

MAX_FPR = 0.05


class World:
    """Harmless scores N(low, spread), harmful ones N(high, 1), so many of them harmful."""

    def __init__(self, low=0.0, high=2.0, share=0.1, spread=1.0, n=600, seed=0):
        rng = np.random.default_rng(seed)
        self.low, self.high, self.spread = low, high, spread
        self.harmless = rng.normal(size=500)
        self.harmful = rng.normal(2.0, size=250)
        count = round(share * n)
        safe = rng.normal(low, spread, size=n - count)
        self.traffic = np.concatenate([safe, rng.normal(high, size=count)])

    def mixture(self, share=None):
        return ScoreMixture.fit(self.harmless, self.harmful, self.traffic, share)

    def fpr(self, threshold):
        return norm.sf((threshold - self.low) / self.spread)

    def recall(self, threshold):
        return norm.sf(threshold - self.high)

    @property
    def best_recall(self):
        return self.recall(self.low + self.spread * norm.isf(MAX_FPR))


WORLDS = {
    "as at calibration": dict(),
    "ordinary traffic lies lower": dict(low=-1.5),
    "both lie lower": dict(low=-1.0, high=1.6),
    "little is harmful": dict(low=-0.5, share=0.01),
    "nothing is harmful": dict(low=-0.5, share=0.0),
    "much is harmful": dict(low=-0.5, share=0.4),
    "narrower": dict(low=-0.5, spread=0.8),
}


class TestDensity:
    def test_it_is_a_kernel_estimate_of_the_scores_drawn_together(self):
        """Another library's estimate, less the floor; the variance stays."""
        scores, relative = np.random.default_rng(0).normal(2, 3, size=400), 1.06 * 400**-0.2
        inner = scores.mean() + (1 - relative**2) ** 0.5 * (scores - scores.mean())
        kernel = gaussian_kde(inner, bw_method=relative * scores.std() / inner.std(ddof=1))
        at = np.linspace(-15, 20, 999)
        density = _density(scores)(at) - 1e-6 / (relative * scores.std())
        assert density == pytest.approx(kernel(at), rel=1e-3, abs=1e-6)
        variance = np.trapezoid(density * (at - scores.mean()) ** 2, at)
        assert variance == pytest.approx(scores.var(), rel=1e-3)

    def test_far_off_is_a_floor(self):
        assert _density(np.zeros(10))(np.array([1e9]))[0] > 0


class TestThreshold:
    @pytest.mark.parametrize("name", WORLDS)
    def test_the_rate_is_kept_in_the_mean_and_recall_is_near_the_best(self, name):
        """Three draws of each planted world."""
        worlds = [World(**WORLDS[name], seed=seed) for seed in range(3)]
        thresholds = [one.mixture().threshold(Goal(), MAX_FPR) for one in worlds]
        pairs = list(zip(worlds, thresholds, strict=True))
        assert np.mean([one.fpr(t) for one, t in pairs]) <= 1.2 * MAX_FPR
        assert np.mean([one.recall(t) for one, t in pairs]) >= 0.6 * worlds[0].best_recall

    def test_the_threshold_at_calibration_would_miss_much(self):
        """What is gained: the same threshold without a look at the traffic."""
        world = World(low=-1.5, high=1.5)
        old = np.quantile(world.harmless, 0.95)
        new = world.mixture().threshold(Goal(), MAX_FPR)
        assert world.recall(new) > 1.5 * world.recall(old)

    def test_no_threshold_keeps_an_impossible_rate(self):
        world = World()
        threshold = world.mixture().threshold(Goal(), 1e-6)
        assert threshold > max(world.traffic.max(), world.harmless.max())

    def test_a_stated_share_is_used(self):
        fit = World(share=0.3).mixture(share=0.3)
        assert fit.share().value == pytest.approx(0.3)

    def test_dear_misses_lower_the_threshold(self):
        fit = World().mixture()
        cheap, dear = (fit.threshold(Goal("cost-ratio", ratio), 0.5) for ratio in (0.5, 20.0))
        assert dear < cheap


class TestEstimate:
    @pytest.mark.parametrize("share", [0.05, 0.3])
    def test_the_share_of_harmful_prompts(self, share):
        found = World(share=share, low=-0.5).mixture().share()
        assert found.low <= share <= found.high

    def test_probabilities_follow_a_shift(self):
        """Half way between the classes of the traffic the probability is one half."""
        slope, intercept = World(low=-1.0, high=1.4, share=0.3, n=2000).mixture().platt()
        assert -intercept / slope == pytest.approx(0.2, abs=0.25)

    def test_thinned_traffic_says_the_same(self, monkeypatch):
        thinned = World(n=1500, share=0.2).mixture()
        monkeypatch.setattr("latentguard.guard.traffic.MAX_TRAFFIC", 1500)
        whole = World(n=1500, share=0.2).mixture()
        assert thinned.share().value == pytest.approx(whole.share().value, abs=0.02)
        goal = Goal()
        assert thinned.threshold(goal, MAX_FPR) == pytest.approx(
            whole.threshold(goal, MAX_FPR), abs=0.1
        )


class TestAdapt:
    @pytest.fixture
    def guard(self):
        backend = FakeBackend(signal=0.6)
        guard = LatentGuard.fit(backend, labelled(80), reading="t_inst", probe="centroid")
        return guard.calibrate(backend, labelled(400, start=1000), max_fpr=MAX_FPR)

    def test_everything_follows(self, guard):
        world = World(low=-1.0)
        known = world.harmless, world.harmful
        moved = adapt_to_traffic(guard, *known, world.traffic, Rates(MAX_FPR))
        threshold = world.mixture().threshold(Goal(), MAX_FPR)
        assert moved.threshold == moved.bound.threshold == threshold
        assert moved.thresholds.common.block == moved.bound
        assert moved.bound.observed == (world.traffic > threshold).sum()
        assert moved.operating_point == "max-fpr=0.05, traffic"
        assert moved.promise.startswith("an estimate, and no bound: ")
        assert moved.thresholds.reliability is None
        assert LatentGuard.from_dict(*moved.to_dict()).promise == moved.promise

    def test_a_review_band_moves_too(self, guard):
        world = World(low=-1.0)
        known = world.harmless, world.harmful
        moved = adapt_to_traffic(guard, *known, world.traffic, Rates(MAX_FPR, 0.2))
        own = moved.thresholds.common
        assert own.review.threshold < own.block.threshold

    @pytest.mark.parametrize("goal", [Goal("balanced", None, 0.002), Goal("cost-ratio", 1.0)])
    def test_an_estimated_rate_is_no_bound(self, guard, goal):
        """Little harm makes a high threshold; the rate of the guard is one that it can promise."""
        world = World(low=-1.0, share=0.01)
        rates = Rates(0.5, goal=goal)
        moved = adapt_to_traffic(guard, world.harmless, world.harmful, world.traffic, rates)
        estimate = moved.thresholds.point.traffic.fpr
        scores = moved.thresholds.common.scores
        assert smallest_n(estimate.value) > len(scores) >= smallest_n(moved.bound.max_fpr)
        assert moved.bound.max_fpr == moved.thresholds.point.max_fpr
        assert moved.bound.max_fpr in RATES
        decided = ChatThresholds(moved).decide(
            [Verdict("a", 9.0, 0.5, False, {})] * 2, [False, True], [None] * 2
        )
        assert decided.verdict.flagged

    def test_the_table_of_thresholds_states_no_bound(self, guard):
        world = World()
        moved = adapt_to_traffic(
            guard, world.harmless, world.harmful, world.traffic, Rates(MAX_FPR)
        )
        assert "no bound" in moved.thresholds.tables()[0].note

    def test_few_prompts_are_refused(self, guard):
        world = World()
        with pytest.raises(GuardError, match="100 unlabelled prompts; found 99"):
            adapt_to_traffic(
                guard, world.harmless, world.harmful, world.traffic[:99], Rates(MAX_FPR)
            )
        with pytest.raises(GuardError, match="30 labelled prompts of each class; found 29"):
            adapt_to_traffic(
                guard, world.harmless, world.harmful[:29], world.traffic, Rates(MAX_FPR)
            )
