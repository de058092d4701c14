"""Figures 13 to 16: planted positions and answers, and the tiny model end to end."""

from dataclasses import replace

import numpy as np
import pytest

from latentguard.study.figures.figure_13_positions import Records, Steered, analyse, collect
from latentguard.study.settings import Settings
from study.figures.planted import Planted, Silent

POSITIONS = ("inst-2", "inst-1", "t_inst", "post+1", "t_post")
EFFECT = "flip to Certainly, t_inst minus other positions"


def planted(harmful, harmless, certainly, n=20, depth=28):
    """Signs of s at each position over layers 9 to 20 (0 elsewhere), and shares of Certainly."""
    rng = np.random.default_rng(0)
    beliefs = {}
    for group, signs in (("accepted_harmful", harmful), ("refused_harmless", harmless)):
        s = np.zeros((n, len(POSITIONS), depth + 1))
        s[:, :, 9:21] = np.array(signs)[:, None] * 0.1
        beliefs[group] = s + 0.001 * rng.standard_normal(s.shape)
    steered = [Steered("", -1, ("no",) * n)]
    for layer in (4, 12):
        for along, share in (*zip(POSITIONS, certainly, strict=True), ("random", 0), ("random", 0)):
            yes = round(share * n)
            steered.append(Steered(along, layer, ("certainly",) * yes + ("other",) * (n - yes)))
    return Records(POSITIONS, beliefs, tuple(steered), (0.5, 0.8, 1.0, 1.5, 2.0), "planted")


def tables(finding):
    return {p.title: p for p in finding.section.parts if hasattr(p, "rows")}


def test_only_t_inst_is_found_to_encode_harmfulness():
    records = planted((1, -1, 1, -1, -1), (-1, -1, -1, 1, 1), (0.2, 0.2, 0.9, 0.2, 0.2))
    finding = analyse(records, Settings())
    rows = tables(finding)["Clusters at every position"].rows
    assert {row[0]: row[-1] for row in rows} == {
        "inst-2": "yes",
        "inst-1": "no",
        "t_inst": "yes",
        "post+1": "no",
        "t_post": "no",
    }
    assert rows[0][1] == pytest.approx(0.1, abs=0.01) and rows[0][4] == 20
    assert finding.effects[EFFECT].value == pytest.approx(0.7)
    assert finding.effects[EFFECT].low > 0 and not finding.caveats
    answers = {
        row[0]: row[1:] for row in tables(finding)["Answers by position of the direction"].rows
    }
    assert answers["t_inst"] == pytest.approx((1.0, 0.9, *answers["t_inst"][2:4], 20, 0, 0, 0.1))
    assert answers["unsteered"][5:] == (1.0, 0.0, 0.0) and answers["random"][1] == 0.0


def test_directions_that_do_nothing_are_not_compared():
    records = planted((1,) * 5, (-1,) * 5, (0.05, 0.0, 0.05, 0.0, 0.0))
    finding = analyse(records, Settings())
    assert not finding.effects and "no direction turns 10%" in finding.caveats[0]


def test_no_answers_and_no_groups():
    records = Records(POSITIONS, {}, (), (1.0,) * 5, "planted")
    finding = analyse(records, Settings())
    assert len(finding.caveats) == 3 and not finding.effects and not finding.section.parts
    few = planted((1,) * 5, (1,) * 5, (0.5,) * 5, n=4)
    finding = analyse(replace(few, beliefs={}), Settings())
    assert not finding.effects and len(finding.section.parts) == 2


@pytest.fixture
def alone(settings):
    return replace(settings, probed=1, random_draws=1)


def test_end_to_end(cached_model, prompt_groups, alone):
    cached_model.uncached = Planted(
        cached_model.uncached,
        lambda p, one: "Certainly" if one and one.label == "t_inst" else "No.",
    )
    records = collect(cached_model, prompt_groups, alone)
    assert records.positions == ("inst-2", "inst-1", *cached_model.span)
    assert records.norms[2] == pytest.approx(1)
    shape = records.beliefs["accepted_harmful"].shape
    assert shape == (6, len(records.positions), cached_model.depth + 1)
    finding = analyse(records, alone)
    assert finding.effects[EFFECT].value == 1.0 and not finding.caveats
    titles = [part.title for part in finding.section.parts]
    assert titles == [
        "s over the middle layers, by position",
        "Clusters at every position",
        "s by layer at every position",
        "Steering with the direction of each position",
        "Answers by position of the direction",
    ]
    cached_model.uncached = Silent(cached_model.uncached)
    again = collect(cached_model, prompt_groups, alone)
    assert again.steered == records.steered
    for group, s in records.beliefs.items():
        np.testing.assert_array_equal(s, again.beliefs[group])


def test_every_position_has_its_own_centroids(cached_model, prompt_groups, alone):
    records = collect(cached_model, prompt_groups, alone)
    at_post = cached_model.states(prompt_groups.test["accepted_harmful"], positions=("t_post",)).at(
        "t_post"
    )
    fitted = [
        cached_model.states(prompt_groups.fit[g], positions=("t_post",))
        .at("t_post")
        .double()
        .mean(0)
        for g in ("refused_harmful", "accepted_harmless")
    ]
    cosines = [(at_post * c).sum(-1) / (at_post.norm(dim=-1) * c.norm(dim=-1)) for c in fitted]
    expected = (cosines[0] - cosines[1]).numpy()
    np.testing.assert_allclose(records.beliefs["accepted_harmful"][:, -1], expected, atol=1e-5)


def test_a_model_that_refuses_nothing(cached_model, prompt_groups, alone):
    cached_model.uncached = Planted(cached_model.uncached, lambda p, one: "")
    fit = {g: tuple(replace(p, refused=False) for p in of) for g, of in prompt_groups.fit.items()}
    fit["accepted_harmful"], fit["refused_harmful"] = fit["refused_harmful"], ()
    test = {"accepted_harmful": prompt_groups.test["accepted_harmful"]}
    bare = replace(prompt_groups, fit=fit, test=test)
    finding = analyse(collect(cached_model, bare, alone), alone)
    assert len(finding.caveats) == 2 and not finding.effects
