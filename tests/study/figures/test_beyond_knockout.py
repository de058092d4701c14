"""Attention knock-out in worlds where t_post reads t_inst, and where it does not."""

from dataclasses import replace

import numpy as np
import pytest

from latentguard.study.figures import beyond_knockout as knockout
from latentguard.study.figures.beyond_knockout import CUTS, lost
from study.figures.planted import Silent
from study.figures.worlds import SETTINGS, found_in, planted_groups, planted_study, tables

T_INST, RANDOM, FROM_T_POST, BUT_T_INST, BUT_RANDOM, ALL, ALL_FROM_T_POST = (c.name for c in CUTS)


@pytest.fixture(scope="module")
def worlds(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    return {reads: found_in(knockout, reads, tokenizer, folder) for reads in ("t_inst", "word")}


def fallen(records, name):
    """Whether each refused prompt's odds have fallen."""
    return records.refused.uncut - records.refused.cut[name] > 5


class TestWorlds:
    def test_without_t_inst_refusal_is_lost_only_where_it_is_read(self, worlds):
        for name in (T_INST, FROM_T_POST):
            assert fallen(worlds["t_inst"][0], name).all()
            assert not fallen(worlds["word"][0], name).any()

    def test_t_inst_alone_suffices_only_where_it_is_read(self, worlds):
        assert not fallen(worlds["t_inst"][0], BUT_T_INST).any()
        assert fallen(worlds["word"][0], BUT_T_INST).all()

    def test_without_the_instruction_refusal_is_lost_in_both(self, worlds):
        for records, _ in worlds.values():
            assert fallen(records, ALL).all() and fallen(records, ALL_FROM_T_POST).all()

    def test_a_random_token_is_no_loss_where_t_inst_is_read(self, worlds):
        records, _ = worlds["t_inst"]
        assert not fallen(records, RANDOM).any() and fallen(records, BUT_RANDOM).all()

    def test_windows_find_the_block_that_reads(self, worlds):
        """A window of one block: block 3 reads."""
        records, _ = worlds["t_inst"]
        assert records.width == 1 and records.first_blocks == (1, 2, 3, 4)
        loss = (records.refused.uncut - records.refused.windows[T_INST]).mean(1)
        assert loss[2] > 5 and np.abs(loss[[0, 1, 3]]).max() < 1e-3

    def test_the_report_says_which_world_it_is(self, worlds):
        reading, other = (worlds[reads][1] for reads in ("t_inst", "word"))
        name = "lost without t_inst, beyond random"
        assert reading.effects[name].low > 0.2 and not reading.caveats
        assert other.effects[name].high < 0.1
        assert "Where no token behind t_inst sees it, 0." in reading.section.text

    def test_judged_replies_go_with_it(self, worlds):
        records, finding = worlds["t_inst"]
        assert records.refused.refused_uncut.all()
        assert np.isnan(records.refused.refused[T_INST]).all()  # an empty reply
        rows = {row[0]: row for row in tables(finding)["Attention knock-out"].rows}
        assert rows[BUT_T_INST][-2].startswith("1.00 [") and rows[FROM_T_POST][-1] is None


def test_it_goes_on_without_asking_again(tokenizer, tmp_path):
    with planted_study("word", tokenizer, tmp_path) as model:
        first = knockout.collect(model, planted_groups(), SETTINGS)
        model.uncached = Silent(model.uncached)
        again = knockout.collect(model, planted_groups(), SETTINGS)
    for name, odds in first.refused.cut.items():
        np.testing.assert_array_equal(odds, again.refused.cut[name])


def test_few_prompts_and_vague_words_conclude_nothing(worlds):
    records, _ = worlds["t_inst"]
    few = knockout.analyse(records, replace(SETTINGS, enough=11))
    assert not few.effects and "10 prompts of a group are too few" in few.caveats[0]
    vague = replace(records, openings=replace(records.openings, tells=0.7))
    assert "below 0.8" in knockout.analyse(vague, SETTINGS).caveats[0]


def test_the_loss_is_a_share_of_the_gap():
    refused, accepted = np.array([4.0, 6.0, 5.0]), np.array([1.0, -1.0])
    found = lost(refused, refused - 2.5, accepted)
    assert found.value == pytest.approx(0.5) and found.low < 0.5 < found.high
