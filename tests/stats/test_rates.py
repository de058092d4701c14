"""Shares and their differences: closed forms, and coverage on planted data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from latentguard.errors import GuardError
from latentguard.stats.rates import (
    mean_rate_difference,
    proportion,
    rate_difference,
    rate_difference_by_direction,
    share,
)

FLAGS = st.lists(st.booleans(), min_size=1, max_size=200)


def wilson(count, n):
    z = norm.ppf(0.975)
    middle = (count + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * (count * (n - count) / n + z**2 / 4) ** 0.5
    return max(middle - half, 0), min(middle + half, 1)


class TestProportion:
    @given(FLAGS)
    def test_wilsons_formula_and_scipy(self, flags):
        found = proportion(flags)
        count, n = sum(flags), len(flags)
        assert found.value == count / n
        assert found.n == (count, n - count)
        assert (found.low, found.high) == pytest.approx(wilson(count, n), abs=1e-9)
        other = binomtest(count, n).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((other.low, other.high))

    @given(FLAGS)
    def test_the_other_share_is_its_mirror(self, flags):
        found, other = proportion(flags), proportion([not flag for flag in flags])
        assert (other.value, other.low, other.high) == pytest.approx(
            (1 - found.value, 1 - found.high, 1 - found.low)
        )

    @pytest.mark.parametrize("n", [1, 20])
    def test_none_and_all(self, n):
        none, every = proportion([False] * n), proportion([True] * n)
        assert (none.value, none.low, every.value, every.high) == (0, 0, 1, 1)
        assert 0 < none.high < 1
        assert 0 < every.low < 1

    @pytest.mark.parametrize("n", [10, 24, 60])
    def test_coverage_of_any_rate(self, n):
        """The sum over all outcomes of the chance of those whose interval holds the rate."""
        ends = [proportion([True] * k + [False] * (n - k)) for k in range(n + 1)]
        covered = [
            sum(binom.pmf(k, n, p) for k, one in enumerate(ends) if one.low <= p <= one.high)
            for p in np.linspace(0.02, 0.98, 49)
        ]
        assert np.mean(covered) == pytest.approx(0.95, abs=0.015)
        assert min(covered) > 0.82

    def test_no_flag(self):
        with pytest.raises(GuardError, match="found none"):
            proportion([])

    def test_kinds_of_flags(self):
        assert proportion(np.array([1, 0, 0, 1])) == proportion([True, False, False, True])


class TestShare:
    def test_one_draw_is_a_proportion(self):
        flags = [True] * 3 + [False] * 9
        assert share([flags]) == share([flags, flags]) == proportion(flags)

    def test_draws_are_no_more_prompts(self):
        rng = np.random.default_rng(0)
        flags = np.repeat(rng.random((1, 40)) < 0.5, 5, axis=0)
        flags[0, 0] = not flags[0, 0]  # so that not all draws agree
        found = share(flags)
        assert found.value == pytest.approx(flags.mean())
        assert sum(found.n) == 40
        once = proportion(flags[1])
        assert found.high - found.low == pytest.approx(once.high - once.low, abs=0.05)

    def test_no_prompt(self):
        with pytest.raises(GuardError):
            share(np.zeros((3, 0)))


class TestRateDifference:
    @pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.9, 0.1), (0.97, 0.03), (0.95, 0.6)])
    @pytest.mark.parametrize("n", [10, 20, 30])
    def test_coverage_against_one_control(self, n, p, q):
        rng = np.random.default_rng(0)
        held = 0
        for _ in range(400):
            draw = rng.random(n)
            other = np.where(rng.random(n) < 0.5, draw, rng.random(n))
            found = rate_difference(draw < p, other < q)
            held += found.low <= p - q <= found.high
        assert held / 400 >= 0.93

    @pytest.mark.parametrize("spread", [0.0, 0.2])
    @pytest.mark.parametrize("n", [12, 100])
    def test_coverage_against_ten_random_directions(self, n, spread):
        """Each direction has a rate of its own, about 0.4; prompts alone would cover 0.7."""
        rng = np.random.default_rng(0)
        held = 0
        for _ in range(300):
            rates = np.clip(0.4 + spread * rng.standard_normal(10), 0, 1)
            chance = rng.random((10, n)) < rates[:, None]
            found = rate_difference(rng.random(n) < 0.7, chance)
            held += found.low <= 0.3 <= found.high
        assert held / 300 >= 0.93

    def test_is_bonett_and_prices(self):
        """From the counts of the four outcomes, as printed in Bonett and Price 2012."""
        first = [1] * 12 + [1] * 6 + [0] * 2 + [0] * 10
        second = [1] * 12 + [0] * 6 + [1] * 2 + [0] * 10
        more, less = (6 + 1) / 32, (2 + 1) / 32
        half = norm.ppf(0.975) * ((more + less - (more - less) ** 2) / 32) ** 0.5
        found = rate_difference(first, second)
        assert found.value == pytest.approx(4 / 30)
        assert (found.low, found.high) == pytest.approx((more - less - half, more - less + half))

    def test_few_prompts_that_agree_are_no_point(self):
        found = rate_difference([1, 1, 1], [0, 0, 0])
        assert (found.value, found.high, found.n) == (1, 1, (3, 0))
        assert found.low < 0.7

    def test_one_draw_is_taken_as_it_is(self):
        first, second = [1, 1, 0, 1], [0, 1, 0, 0]
        assert rate_difference(first, second) == rate_difference(first, [second])

    def test_groups_count_alike_whatever_their_size(self):
        one, other = ([1] * 30, [0] * 30), ([0] * 10, [0] * 10)
        found = mean_rate_difference([one, other])
        assert found.value == 0.5 and found.n == (40, 0)
        alone = rate_difference(*other)
        assert found.high - found.low < alone.high - alone.low

    def test_no_prompt(self):
        for none in ([([], [])], [], [([1], [0]), ([], [])]):
            with pytest.raises(GuardError, match="at least one row"):
                mean_rate_difference(none)


class TestRateDifferenceByDirection:
    @pytest.mark.parametrize("n", [12, 50])
    def test_coverage_where_each_prompt_meets_one_of_twenty(self, n):
        """Directions differ as Beta(0.3, 0.6) does; a plain paired interval covers 0.85."""
        rng = np.random.default_rng(1)
        held = 0
        for _ in range(400):
            rates = rng.beta(0.3, 0.6, size=20)
            chance = rng.random(n) < rates[np.arange(n) % 20]
            found = rate_difference_by_direction(rng.random(n) < 0.6, chance, 20)
            held += found.low <= 0.6 - 1 / 3 <= found.high
        assert held / 400 >= 0.93

    def test_a_direction_each_is_a_plain_difference(self):
        first, second = [1, 1, 0, 1], [0, 1, 0, 0]
        plain = rate_difference(first, second)
        assert rate_difference_by_direction(first, second, 4) == plain
        assert rate_difference_by_direction(first, second, 9) == plain

    def test_no_prompt(self):
        with pytest.raises(GuardError, match="at least one row"):
            rate_difference_by_direction([], [], 5)
