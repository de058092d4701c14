"""Directional ablation in worlds where t_post reads t_inst, and where it does not."""

from dataclasses import replace

import numpy as np
import pytest

from latentguard.study.figures import beyond_ablation as ablation
from latentguard.study.figures.beyond_ablation import (
    AT_T_INST,
    HALVES,
    HARMFULNESS,
    RANDOM,
    REFUSAL,
)
from study.figures.planted import Silent
from study.figures.worlds import SETTINGS, found_in, planted_groups, planted_study, tables

LATE = replace(SETTINGS, probed=1, layer_step=3)
"""Directions of layer 3 alone: harm is at t_inst, and at t_post."""


@pytest.fixture(scope="module")
def worlds(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    return {reads: found_in(ablation, reads, tokenizer, folder) for reads in ("t_inst", "word")}


def refused(records, kind):
    """Share of refused harmful prompts that stay refused, by layer or draw."""
    return np.nan_to_num(records.groups["refused_harmful"][kind].refused).mean(1)


def test_without_the_refusal_direction_nothing_is_refused(worlds):
    """Of layer 3, where t_post holds it; at lower layers t_post holds nothing to fit on."""
    for records, _ in worlds.values():
        assert records.layers[-1] == 3 and refused(records, "") == 1
        assert refused(records, REFUSAL)[-1] == 0


def test_harm_at_t_inst_counts_only_where_it_is_read(worlds):
    assert (refused(worlds["t_inst"][0], AT_T_INST) == 0).all()
    assert (refused(worlds["word"][0], AT_T_INST) == 1).all()


def test_controls_leave_refusal(worlds):
    for records, _ in worlds.values():
        assert (refused(records, HALVES) == 1).all()
        assert refused(records, RANDOM).mean() == 1


def test_the_report_says_which_world_it_is(worlds):
    name = f"refusal lost without the {AT_T_INST}, minus chance"
    reading, other = (worlds[reads][1].effects[name] for reads in ("t_inst", "word"))
    assert reading.value == 1 and reading.low > 0.5
    assert other.value == 0 and other.high < 0.5
    rows = {row[:2]: row for row in tables(worlds["t_inst"][1])["Directional ablation"].rows}
    assert rows["refused harmful", "nothing"][2] == 1
    assert rows["refused harmful", HARMFULNESS][2] == 0
    assert len(worlds["word"][1].section.parts) == 4


def test_replies_that_are_changed_cost_the_model_more(worlds):
    kinds = worlds["t_inst"][0].groups["refused_harmful"]
    assert kinds[AT_T_INST].losses.mean() > kinds[""].losses.mean() + 1
    assert kinds[HALVES].losses.mean() == pytest.approx(kinds[""].losses.mean(), abs=0.1)


def test_it_goes_on_without_asking_again(tokenizer, tmp_path):
    with planted_study("t_inst", tokenizer, tmp_path) as model:
        first = ablation.collect(model, planted_groups(), LATE)
        model.uncached = Silent(model.uncached)
        again = ablation.collect(model, planted_groups(), LATE)
    for name, one in first.groups["refused_harmful"].items():
        other = again.groups["refused_harmful"][name]
        np.testing.assert_array_equal(one.losses, other.losses)


def test_few_prompts_conclude_nothing(worlds):
    records, _ = worlds["t_inst"]
    finding = ablation.analyse(records, replace(SETTINGS, enough=11))
    assert not finding.effects and len(finding.caveats) == 2
    none = ablation.analyse(replace(records, groups={}, counts={}), SETTINGS)
    assert not none.effects and not none.section.parts
