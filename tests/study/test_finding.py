"""Cells of tables: a value, its interval, and n."""

from latentguard.stats.bootstrap import bootstrap_mean
from latentguard.stats.rates import proportion
from latentguard.study.finding import cells


def test_the_mean_of_a_single_value_has_no_interval():
    assert cells(bootstrap_mean([0.3])) == (0.3, None, None, 1)


def test_a_rate_of_a_single_prompt_has_one():
    value, low, high, n = cells(proportion([True]))
    assert (value, n) == (1.0, 1)
    assert low < high


def test_several_equal_values_keep_theirs():
    assert cells(bootstrap_mean([0.5, 0.5])) == (0.5, 0.5, 0.5, 2)
