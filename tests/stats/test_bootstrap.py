"""Intervals of shares and of resampled figures: closed forms, and coverage on planted data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap

from latentguard.errors import GuardError
from latentguard.stats.bootstrap import (
    bootstrap,
    bootstrap_mean,
    crossed_mean,
    mean_curve,
    mean_difference,
)


class TestResampled:
    def test_of_a_mean_it_is_the_normal_one(self):
        sample = np.random.default_rng(1).normal(size=400)
        found = bootstrap(np.mean, sample)
        error = sample.std() / 20
        assert found.value == sample.mean()
        assert found.low == pytest.approx(sample.mean() - 1.96 * error, abs=0.2 * error)
        assert found.high == pytest.approx(sample.mean() + 1.96 * error, abs=0.2 * error)
        assert found.n == (400, 0)

    @pytest.mark.parametrize("paired", [False, True])
    def test_coverage_of_a_difference_of_means(self, paired):
        """The true difference is 0.5; pairs share a part, as two replies to one prompt do."""
        rng = np.random.default_rng(3)
        trials, hits, widths = 60, 0, []
        for _ in range(trials):
            common = rng.normal(size=40)
            one = common * paired + rng.normal(size=40) + 0.5
            other = common * paired + rng.normal(size=40)
            found = bootstrap(gap_of, one, other, paired=paired)
            hits += found.low <= 0.5 <= found.high
            widths.append(found.high - found.low)
        assert hits / trials >= 0.86
        assert np.mean(widths) == pytest.approx(2 * 1.96 * (2 / 40) ** 0.5, rel=0.1)

    def test_pairs_stay_together(self):
        one = np.arange(30.0)
        paired = bootstrap(gap_of, one, one + 2, paired=True)
        assert (paired.value, paired.low, paired.high) == pytest.approx((-2, -2, -2))
        assert paired.n == (30, 0)
        apart = bootstrap(gap_of, one, one + 2)
        assert apart.low < -4 < 0 < apart.high
        assert apart.n == (30, 30)

    def test_samples_of_any_shape_and_length(self):
        rows = np.arange(24.0).reshape(6, 2, 2)
        found = bootstrap(lambda a, b: a[:, 0, 0].sum() + b.sum(), rows, [1, 1, 1])
        assert found.value == rows[:, 0, 0].sum() + 3
        assert found.n == (6, 3)

    @settings(max_examples=5)
    @given(st.lists(st.floats(-9, 9), min_size=1, max_size=20), st.integers(0, 3))
    def test_fixed_by_the_seed_and_inside_the_data(self, sample, seed):
        found = bootstrap(np.mean, sample, seed=seed)
        assert found == bootstrap(np.mean, sample, seed=seed)
        assert min(sample) - 1e-9 <= found.low <= found.high <= max(sample) + 1e-9

    def test_draws_without_a_figure_are_left_out(self):
        """A draw may be constant, and then has no correlation."""

        def ratio(rows):
            return float("nan") if rows.std() == 0 else 1.0

        found = bootstrap(ratio, [0, 1])
        assert (found.value, found.low, found.high) == (1, 1, 1)

    @pytest.mark.parametrize("samples", [([],), ([1.0], []), ([], [1.0])])
    def test_an_empty_sample(self, samples):
        with pytest.raises(GuardError, match="found an empty one"):
            bootstrap(lambda *rows: 0.0, *samples)


class TestBca:
    @pytest.mark.parametrize("n", [12, 30])
    def test_it_covers_where_the_percentiles_are_too_narrow(self, n):
        """The mean of a skewed sample: percentiles cover about 0.88 and 0.92."""
        rng = np.random.default_rng(0)
        held = {"bca": 0, "percentile": 0}
        for trial in range(400):
            sample = rng.exponential(size=n)
            for method in held:
                found = bootstrap_mean(sample, method=method, seed=trial)
                held[method] += found.low <= 1 <= found.high
        assert held["bca"] / 400 >= 0.91
        assert held["bca"] > held["percentile"]

    def test_rows_and_weights_give_the_same_interval(self):
        sample = np.random.default_rng(4).exponential(size=25)
        rows = bootstrap(np.mean, sample, method="bca")
        weights = bootstrap_mean(sample, method="bca")
        assert rows.value == pytest.approx(weights.value)
        assert (rows.low, rows.high) == pytest.approx((weights.low, weights.high), abs=0.1)

    def test_of_many_rows_it_is_scipys(self):
        sample = np.random.default_rng(5).exponential(size=400)
        found = bootstrap(np.mean, sample, method="bca")
        other = scipy_bootstrap((sample,), np.mean, method="BCa", random_state=0)
        wanted = (other.confidence_interval.low, other.confidence_interval.high)
        assert (found.low, found.high) == pytest.approx(wanted, abs=0.015)

    def test_clusters_count_as_one_row_each(self):
        values = np.random.default_rng(6).normal(size=12)
        once = bootstrap_mean(values, method="bca")
        again = bootstrap_mean(
            np.repeat(values, 9), np.repeat(np.arange(12), 9).tolist(), method="bca"
        )
        assert (again.low, again.high) == pytest.approx((once.low, once.high))
        assert again.n == (108, 0)

    def test_equal_rows_are_a_point_and_no_figure_is_none(self):
        found = bootstrap(np.mean, [2.0, 2.0, 2.0], method="bca")
        assert (found.value, found.low, found.high) == (2, 2, 2)
        none = bootstrap(lambda rows: float("nan"), [1.0, 2.0], method="bca")
        assert np.isnan(none.low) and np.isnan(none.high)


class TestMeanCurve:
    def test_each_point_is_a_resampled_mean(self):
        rows = np.random.default_rng(2).normal(size=(80, 3)) + np.array([0, 5, -5])
        for column, found in enumerate(mean_curve(rows)):
            alone = bootstrap(np.mean, rows[:, column])
            assert found.value == pytest.approx(alone.value)
            assert found.n == (80, 0)
            assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.05)

    def test_no_row(self):
        with pytest.raises(GuardError, match="found none"):
            mean_curve(np.zeros((0, 4)))


def gap_of(one, other):
    return one.mean() - other.mean()


class TestMeanDifference:
    @pytest.mark.parametrize("directions", [5, 10])
    def test_the_spread_between_random_directions_counts(self, directions):
        """Values in nats; each direction has a shift of its own, as large as that of prompts."""
        rng = np.random.default_rng(0)
        held = 0
        for trial in range(150):
            shifts = rng.normal(size=(directions, 1))
            chance = shifts + rng.normal(size=(directions, 40))
            found = mean_difference(rng.normal(size=40) + 1, chance, seed=trial)
            held += found.low <= 1 <= found.high
        assert held / 150 >= 0.9

    def test_one_control_is_a_paired_mean(self):
        first, second = np.arange(12.0), np.arange(12.0)[::-1]
        found = mean_difference(first, second)
        assert found == mean_difference(first, [second]) == bootstrap_mean(first - second)
        assert found.n == (12, 0)

    def test_no_row(self):
        with pytest.raises(GuardError, match="at least one row"):
            mean_difference([], [])


class TestCrossedMean:
    VALUES = np.random.default_rng(0).normal(size=30)

    def test_requests_in_one_wrapper_are_drawn_alone(self):
        requests = [str(n) for n in range(30)]
        found = crossed_mean(self.VALUES, requests, ["the only one"] * 30)
        plain = bootstrap_mean(self.VALUES, requests)
        ends = (plain.value, plain.low, plain.high)
        assert (found.value, found.low, found.high) == pytest.approx(ends)
        assert found.low < found.value < found.high

    def test_of_two_owners_with_one_value_for_each_pair_both_are_drawn(self):
        """Between wrappers values differ by much more than between requests."""
        requests, wrappers = np.divmod(np.arange(30), 3)
        values = self.VALUES + 10.0 * wrappers
        found = crossed_mean(values, requests.tolist(), wrappers.tolist())
        assert found.high - found.low > 8
        alone = crossed_mean(values, requests.tolist(), [0] * 30)
        assert alone.high - alone.low < 8
