"""Patching in worlds where t_post reads t_inst, and where it does not."""

from dataclasses import replace

import numpy as np
import pytest

from latentguard.study.figures import beyond_patching as patching
from latentguard.study.figures.beyond_patching import (
    ACCEPTED,
    BEHIND,
    OWN,
    PATCH,
    RANDOM,
    carried,
)
from study.figures.planted import Silent
from study.figures.worlds import SETTINGS, found_in, planted_groups, planted_study, tables


@pytest.fixture(scope="module")
def worlds(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    return {reads: found_in(patching, reads, tokenizer, folder) for reads in ("t_inst", "word")}


def shares(records, place, kind=PATCH):
    """Share carried by layer, of both directions: [2 l]."""
    slot = records.places.index(place)
    return np.array(
        [one.shift(kind)[:, slot].mean(1) / one.gap.mean() for one in records.directions]
    )


class TestWorlds:
    def test_t_inst_carries_refusal_between_writing_and_reading(self, worlds):
        """Written in block 1, read in block 3: at layers 1 and 2."""
        records, _ = worlds["t_inst"]
        assert records.layers == (0, 1, 2, 3)
        found = shares(records, "t_inst")
        np.testing.assert_allclose(found, [[0, 1, 1, 0]] * 2, atol=0.02)

    def test_t_inst_carries_nothing_where_the_word_is_read(self, worlds):
        """Though t_inst holds harm there just as well."""
        records, _ = worlds["word"]
        np.testing.assert_allclose(shares(records, "t_inst"), 0, atol=0.02)

    @pytest.mark.parametrize("reads", ["t_inst", "word"])
    def test_t_post_carries_it_once_it_is_read(self, worlds, reads):
        records, _ = worlds[reads]
        np.testing.assert_allclose(shares(records, "t_post"), [[0, 0, 0, 1]] * 2, atol=0.02)
        np.testing.assert_allclose(shares(records, BEHIND), [[0, 0, 0, 1]] * 2, atol=0.02)

    @pytest.mark.parametrize("reads", ["t_inst", "word"])
    def test_controls_carry_nothing(self, worlds, reads):
        records, _ = worlds[reads]
        for place in records.places:
            np.testing.assert_allclose(shares(records, place, OWN), 0, atol=0.02)
            if place not in ("t_inst", "t_post", BEHIND):
                np.testing.assert_allclose(shares(records, place), 0, atol=0.02)
            if place in ("t_inst", "t_post", BEHIND):
                assert np.abs(shares(records, place, RANDOM)).max() < 0.5

    def test_harm_that_is_accepted_carries_refusal_too_if_refusal_reads_harm(self, worlds):
        records, _ = worlds["t_inst"]
        one = records.directions[0]
        slot = records.places.index("t_inst")
        found = one.shift(ACCEPTED)[:, slot].mean(1) / one.gap.mean()
        np.testing.assert_allclose(found, [0, 1, 1, 0], atol=0.02)

    def test_the_report_says_which_world_it_is(self, worlds):
        name = "carried at t_inst: refused harmful into accepted harmless"
        reading, other = (worlds[reads][1] for reads in ("t_inst", "word"))
        assert reading.effects[name].low > 0.9 and not reading.caveats
        assert other.effects[name].high < 0.1 and not other.caveats
        assert "t_post carries more than t_inst from layer 3 on" in reading.section.text
        assert "t_inst carries at most 1.00 of the gap" in reading.section.text
        assert "t_inst carries at most 0.00 of the gap" in other.section.text

    def test_judged_replies_go_with_it(self, worlds):
        records, finding = worlds["t_inst"]
        into_harmless = records.directions[0]
        assert not into_harmless.refused_unpatched.any()
        at = dict(zip(into_harmless.judged_layers, into_harmless.refused[:, 0], strict=True))
        assert at[1].all() and at[2].all() and not at[3].any()
        rows = {row[:2]: row for row in tables(finding)["What a patch carries"].rows}
        assert rows[into_harmless.name, "t_inst"][-1].startswith("1.00 [")


def test_it_goes_on_without_asking_again(tokenizer, tmp_path):
    groups = planted_groups()
    with planted_study("t_inst", tokenizer, tmp_path) as model:
        first = patching.collect(model, groups, SETTINGS)
        model.uncached = Silent(model.uncached)
        again = patching.collect(model, groups, SETTINGS)
    for one, other in zip(first.directions, again.directions, strict=True):
        np.testing.assert_array_equal(one.odds[PATCH], other.odds[PATCH])
        np.testing.assert_array_equal(one.refused, other.refused)


def test_few_pairs_and_vague_words_conclude_nothing(worlds):
    records, _ = worlds["t_inst"]
    few = patching.analyse(records, replace(SETTINGS, enough=11))
    assert not few.effects and "10 pairs are too few" in few.caveats[0]
    openings = replace(records.openings, tells=0.7)
    vague = patching.analyse(replace(records, openings=openings), SETTINGS)
    assert not vague.effects and "AUROC of 0.700, below 0.8" in vague.caveats[0]
    none = patching.analyse(replace(records, directions=()), SETTINGS)
    assert not none.section.parts and "0 pairs" in none.caveats[0]


def test_the_share_is_a_ratio_of_means():
    found = carried(np.array([1.0, 2.0, 3.0, 2.0]), np.array([4.0, 4.0, 4.0, 4.0]))
    assert found.value == 0.5 and 0.25 <= found.low < 0.5 < found.high <= 0.75


def test_the_random_vector_is_as_long_as_the_difference(tokenizer, tmp_path):
    groups = planted_groups()
    with planted_study("t_inst", tokenizer, tmp_path) as model:
        targets, sources = (groups.test[g] for g in ("accepted_harmless", "refused_harmful"))
        maker = patching._Patches(model, targets, {PATCH: sources, OWN: targets})
        own, patch, random = (maker.patch(k, 2, "t_inst").states for k in (OWN, PATCH, RANDOM))
    for prompt in targets:
        wanted = (patch[prompt] - own[prompt]).norm()
        assert float((random[prompt] - own[prompt]).norm()) == pytest.approx(float(wanted))
