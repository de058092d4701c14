"""Dose curves: planted records, and a planted world end to end."""

from dataclasses import replace

import numpy as np
import pytest

from latentguard.study.figures import beyond_dose as dose
from latentguard.study.figures.beyond_dose import CONTROLS, HARMFULNESS, REFUSAL, Records
from latentguard.study.fluency import MeasuredReplies, repetition
from study.figures.planted import Silent
from study.figures.worlds import SETTINGS, planted_groups, planted_study, tables


def planted(refused, losses, n=20):
    """Two doses at three layers, of which the direction refuses shares of n prompts."""

    def dosed(rates, nats):
        flags = np.array(
            [[[k < round(rate * n) for k in range(n)] for rate in of] for of in rates], dtype=float
        )
        costs = np.broadcast_to(np.array(nats)[:, :, None], flags.shape).astype(float)
        return MeasuredReplies(flags, costs, np.zeros(flags.shape))

    nothing = ((0.0,) * 3,) * 2
    by_name = {
        HARMFULNESS: dosed(refused, losses),
        CONTROLS[HARMFULNESS]: dosed(nothing, nothing),
    }
    plain = dosed(((0.0,),), ((0.5,),))
    ids = tuple(map(str, range(n)))
    return Records(ids, (2, 4, 6), (1.0, 4.0), plain, by_name, "planted")


def test_a_refusal_counts_only_while_the_reply_is_fluent():
    records = planted([(0.0, 0.8, 0.0), (0.9, 1.0, 0.0)], [(0.5, 0.9, 0.5), (1.2, 3.0, 9.0)])
    finding = dose.analyse(records, SETTINGS)
    found = finding.effects
    low, high = (found[f"fluent refusal along {HARMFULNESS}, dose {d}"] for d in (1, 4))
    assert low.value == pytest.approx(0.8) and high.value == pytest.approx(0.9)
    rows = {row[:3]: row for row in tables(finding)["Dose curves"].rows}
    assert rows[HARMFULNESS, 4.0, 4][3] == 1.0  # refused, but at a loss of 3
    best = {row[:2]: row for row in tables(finding)["Dose curves at the best layer"].rows}
    assert best[HARMFULNESS, 4.0][2:4] == (2, 0.9)
    assert "at most 0.90 of the prompts fluently refused (coefficient 4, layer 2" in (
        finding.section.text
    )
    assert "no dose curve" in finding.caveats[0]


def test_few_prompts_conclude_nothing():
    records = planted([(0.0,) * 3] * 2, [(0.5,) * 3] * 2, n=4)
    finding = dose.analyse(records, SETTINGS)
    assert not finding.effects and "4 accepted harmless prompts are too few" in finding.caveats[0]
    assert not dose.analyse(replace(records, ids=()), SETTINGS).section.parts


def test_a_world_end_to_end(tokenizer, tmp_path):
    """The refusal direction of layer 3 makes t_post hold harm; random directions do not."""
    settings = replace(SETTINGS, layer_step=3, doses=(2.0,))
    with planted_study("t_inst", tokenizer, tmp_path) as model:
        records = dose.collect(model, planted_groups(), settings)
        model.uncached = Silent(model.uncached)
        again = dose.collect(model, planted_groups(), settings)
    assert records.layers == (0, 3) and not records.unsteered.refused.any()
    assert records.dosed[REFUSAL].refused[0, 1].all()
    assert not np.nan_to_num(records.dosed[CONTROLS[REFUSAL]].refused[0, 1]).all()
    np.testing.assert_array_equal(records.dosed[REFUSAL].losses, again.dosed[REFUSAL].losses)
    titles = [part.title for part in dose.analyse(records, settings).section.parts]
    assert titles == [
        "Dose curves: refused",
        "Dose curves: fluency",
        "Dose curves at the best layer",
        "Dose curves",
    ]


def test_repetition_is_the_share_of_pairs_that_stood_before():
    assert repetition("one two three") == 0
    assert repetition("no no no no") == pytest.approx(2 / 3)
    assert repetition("a b a b a b") == pytest.approx(3 / 5)
    assert repetition("word") == repetition("") == 0
