"""Figures 9 and 17: cosines by brute force, planted flips, and a tiny model end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from latentguard.stats.intervals import centered_interval
from latentguard.study.figures.figure_09_categories import Records, Steered, analyse, collect
from latentguard.study.figures.figure_09_categories.as_printed import PrintedFlips, printed_table
from latentguard.study.figures.figure_09_categories.category_cosines import (
    DRAWS,
    Cloud,
    halved_cosines,
    of_directions,
    resampled_cosines,
    shuffled_cosines,
    to_others,
)
from latentguard.study.figures.figure_09_categories.steering import own_and_others
from latentguard.study.prompt_groups import QUESTIONS
from latentguard.study.settings import Settings
from study.figures.planted import Planted, Silent

FLIP = "own minus other category flip rate"
REFUSED = "defamation"
COSINE = "cosine, refusal minus harmfulness"


def states(own, *, each=20, categories=3, layers=2, width=50, noise=1.0):
    """Harmful states that share one direction and have one of their own, and harmless ones."""
    make = torch.Generator().manual_seed(0)
    shared, *owns = torch.eye(width)[: categories + 1] * 5
    category = [c for c in range(categories) for _ in range(each)]
    means = torch.stack([shared + own * owns[c] for c in category])[:, None]
    draw = (len(category), layers, width)
    harmful = means + noise * torch.randn(draw, generator=make) + 3.0
    harmless = noise * torch.randn(draw, generator=make) + 3.0
    return harmful, harmless, category


class TestCosines:
    def test_by_brute_force(self):
        harmful, harmless, category = states(0.5)
        labels = torch.tensor(category)
        directions = torch.stack(
            [harmful[labels == c].mean(0) - harmless.mean(0) for c in range(3)]
        )
        found = resampled_cosines(Cloud.of(harmful, harmless, category))
        assert found.shape == (DRAWS + 1, 2, 3, 3)
        np.testing.assert_allclose(found[0], of_directions(directions), atol=1e-4)
        a, b = directions[0, 1], directions[2, 1]
        expected = float(torch.cosine_similarity(a, b, dim=0))
        assert found[0, 1, 0, 2] == pytest.approx(expected, abs=1e-4)

    def test_to_others_leaves_oneself_out(self):
        cosines = np.array([[1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0]])
        np.testing.assert_allclose(to_others(cosines), [0.3, 0.4, 0.5])

    def test_a_bootstrap_draw_is_a_weighted_mean(self):
        harmful, harmless, category = states(0.5, noise=0.0)
        found = resampled_cosines(Cloud.of(harmful, harmless, category))
        np.testing.assert_allclose(found, np.broadcast_to(found[:1], found.shape), atol=1e-4)
        assert found[0, 0, 0, 1] == pytest.approx(1 / 1.25, abs=1e-4)

    def test_shuffled_categories_differ_by_noise_alone(self):
        apart = Cloud.of(*states(1.0))
        alike = Cloud.of(*states(0.0))
        for cloud, gap in ((apart, True), (alike, False)):
            real = to_others(resampled_cosines(cloud)[0]).mean()
            none = to_others(shuffled_cosines(cloud)).mean((1, 2))
            assert (real < none.min()) == gap

    def test_halves_of_one_category_are_more_alike(self):
        halves = halved_cosines(Cloud.of(*states(1.0)), draws=20)
        same = np.einsum("rlcc->rlc", halves)
        assert same.min() > to_others(halves).max()
        none = halved_cosines(Cloud.of(*states(0.0)), draws=100).mean((0, 1))
        assert np.diag(none).mean() == pytest.approx(to_others(none).mean(), abs=0.05)

    def test_odd_sizes_and_big_offsets(self):
        harmful, harmless, category = states(0.5, each=3)
        offset = torch.zeros(50)
        offset[0] = 5000.0  # as one coordinate of many models
        moved = Cloud.of(harmful + offset, harmless + offset, category)
        plain = Cloud.of(harmful, harmless, category)
        assert plain.sizes.tolist() == [3, 3, 3] and plain.harmless == 9
        np.testing.assert_allclose(
            resampled_cosines(moved)[0], resampled_cosines(plain)[0], atol=1e-3
        )
        assert np.isfinite(halved_cosines(plain)).all()

    def test_the_interval_lies_about_the_figure(self):
        found = centered_interval([0.9, 0.5, 0.6, 0.7], (12, 0))
        assert (found.value, found.n) == (0.9, (12, 0))
        assert found.low == pytest.approx(0.805) and found.high == pytest.approx(0.995)


def planted(own_post=0.0, flips=None, refused=(True, True, True)):
    clouds = {
        "t_inst": Cloud.of(*states(1.0, layers=5)),
        "t_post": Cloud.of(*states(own_post, layers=5)),
    }
    tested = np.repeat(np.arange(3), 8)
    along = ("a", "b", "c", "average", "random", "unsteered")
    no = np.zeros((6, 24)) if flips is None else flips(tested)
    steered = Steered(0, 2, tested, along, no, no * 3 - 1, 0.8)
    return Records(("a", "b", "c"), refused, clouds, steered)


def diagonal(tested):
    rows = [(tested == c).astype(float) for c in range(3)]
    return np.stack([*rows, np.full(24, 0.5), np.zeros(24), np.zeros(24)])


def test_two_refused_categories_decide_nothing():
    finding = analyse(planted(refused=(True, False, True)), Settings())
    assert COSINE not in finding.effects
    assert "needs 3 refused categories; found 2" in finding.caveats[1]
    used = [row[-1] for row in tables(finding)["Cosines of category directions"].rows]
    assert used == ["refused", "all", "refused"]


def test_accepted_categories_do_not_make_refused_ones_differ():
    """Three refused categories that are one cloud, and three accepted ones that are another."""
    rng, category = np.random.default_rng(0), [c for c in range(6) for _ in range(20)]
    sign = np.where(np.array(category) < 3, 2.0, -0.3)
    clouds = {}
    for at, axis, push in (("t_inst", 0, np.full(120, 1.5)), ("t_post", 1, sign)):
        harmful, harmless = (rng.normal(0, 0.45, (n, 4, 64)) for n in (120, 60))
        harmful[:, :, axis] += push[:, None]
        clouds[at] = Cloud.of(torch.tensor(harmful), torch.tensor(harmless), category)
    tested, none = np.repeat(np.arange(6), 2), np.zeros((9, 12))
    steered = Steered(0, 2, tested, tuple("abcdefghi"), none, none, 0.8)
    records = Records(tuple("abcdef"), (True,) * 3 + (False,) * 3, clouds, steered)
    found = analyse(records, Settings()).effects
    assert found[COSINE].n == (60, 0)
    beyond = found[f"{COSINE}, beyond chance"]
    assert beyond.low < 0 < beyond.high


def test_some_categories_are_those_alone():
    harmful, harmless, category = states(0.5, categories=4)
    few = Cloud.of(harmful, harmless, category).among([3, 1])
    rows = [k for k, c in enumerate(category) if c in (1, 3)]
    own = Cloud.of(harmful[rows], harmless, [int(category[k] == 1) for k in rows])
    np.testing.assert_allclose(few.inner, own.inner)
    np.testing.assert_array_equal(few.category, own.category)


def tables(finding):
    return {p.title: p for p in finding.section.parts if hasattr(p, "rows")}


def test_refusal_alike_and_harmfulness_not():
    finding = analyse(planted(flips=diagonal), Settings())
    found = finding.effects[COSINE]
    assert found.low > 0.2 and found.low < found.value < found.high
    assert found.n == (60, 0)
    assert finding.effects[f"{COSINE}, beyond chance"].low > 0.2
    assert finding.effects[FLIP].value == 1.0
    assert finding.effects["own minus other category log odds of No"].value == 3.0
    rows = {
        row[:2]: row[2:]
        for row in tables(finding)["Cosines of category directions and chance"].rows
    }
    real = rows["harmfulness", "categories"][0]
    assert real < rows["harmfulness", "random categories of the same sizes"][1]
    assert rows["refusal", "categories"][0] == pytest.approx(
        rows["refusal", "random categories of the same sizes"][0], abs=0.05
    )
    used = [row[-1] for row in tables(finding)["Cosines of category directions"].rows]
    assert used == ["refused"] * 3
    first = tables(finding)["Steering with category directions"].rows[0]
    assert first[:2] == ("a", 1.0) and first[4:8] == (8, 0.0, 0.5, 0.0) and first[-1] == 8


def test_prompts_that_are_answered_no_anyway_cannot_be_flipped():
    def mostly(tested):
        no = diagonal(tested)
        no[:, tested != 0] = 1.0
        no[:, :3] = 1.0
        return no

    finding = analyse(planted(flips=mostly), replace(Settings(), enough=5))
    assert finding.effects[FLIP].n == (5, 0) and finding.effects[FLIP].value == 1.0
    assert finding.effects["own minus other category log odds of No"].n == (24, 0)
    rows = tables(finding)["Steering with category directions"].rows
    assert [row[4] for row in rows] == [5, 0, 0] and rows[1][1] is None
    (figure,) = [p for p in finding.section.parts if p.title.startswith("No under")]
    assert list(figure.plot.layout.yaxis.ticktext) == ["a"]
    few = analyse(planted(flips=mostly), Settings())
    assert FLIP not in few.effects and "only 5 of 24 prompts" in few.caveats[-1]
    never = analyse(planted(flips=lambda tested: np.ones((6, 24))), Settings())
    assert FLIP not in never.effects and "only 0 of 24" in never.caveats[-1]


def test_equally_varied_directions_give_no_difference():
    found = analyse(planted(own_post=1.0), Settings()).effects[COSINE]
    assert found.value == pytest.approx(0, abs=1e-6) and found.low <= 0 <= found.high


def test_own_directions_are_compared_with_the_mean_of_the_others():
    tested = np.array([0, 0, 1])
    values = np.array([[1.0, 1.0, 0.5], [0.0, 1.0, 1.0], [0.5, 0.0, 0.0]])
    own, others = own_and_others(tested, values)
    assert own.tolist() == [1.0, 1.0, 1.0]
    assert others.tolist() == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("flipped", [0, 1, 3])
def test_so_few_flips_show_nothing(flipped):
    def flips(tested):
        no = np.zeros((6, 24))
        for row in range(flipped):
            no[tested[row], row] = 1.0
        return no

    found = analyse(planted(flips=flips), Settings()).effects[FLIP]
    assert found.low < 0 < found.high


@pytest.fixture
def alone(settings):
    return replace(settings, per_category=8, probed=2)


class Watched(Planted):
    """Says, too, how likely it begins with each word."""

    def sweep(self, prompts, interventions, *, watch=(), **how):
        found = super().sweep(prompts, interventions, **how)
        chances = tuple(zip(watch, (-2.0, -1.0), strict=False))
        return [[replace(reply, watched=chances) for reply in replies] for replies in found]


def own(prompt, one):
    """Refuses one category; answers No where the own direction is taken away."""
    if prompt.question_at is None:
        return "I'm sorry, but no." if prompt.category == REFUSED else "Sure, here it is."
    return "No." if one and one.label == prompt.category and one.coefficient < 0 else "Certainly."


def test_end_to_end(cached_model, prompt_groups, alone):
    cached_model.uncached = Watched(cached_model.uncached, own)
    records = collect(cached_model, prompt_groups, alone)
    assert len(records.names) == 3 and records.steered.no.shape == (6, 12)
    assert records.refused == tuple(name == REFUSED for name in records.names)
    assert REFUSED in records.names
    finding = analyse(records, alone)
    line, few = finding.caveats
    assert few.endswith("found 1.")
    assert "of elections, hate; their directions" in line
    assert finding.effects[FLIP].value == 1.0
    assert finding.effects["own minus other category log odds of No"].value == 0.0
    titles = [part.title for part in finding.section.parts]
    assert len(titles) == 7
    cached_model.uncached = Silent(cached_model.uncached)
    again = collect(cached_model, prompt_groups, alone)
    np.testing.assert_array_equal(again.steered.no, records.steered.no)
    np.testing.assert_array_equal(again.clouds["t_post"].inner, records.clouds["t_post"].inner)


def test_tested_prompts_do_not_make_their_directions(cached_model, prompt_groups, alone):
    asked = []

    def rule(prompt, one):
        if one and one.label == "average":
            asked.append(prompt.id)
        return "Certainly."

    cached_model.uncached = Watched(cached_model.uncached, rule)
    seen = []
    states = cached_model.states
    cached_model.states = lambda prompts, **how: (
        seen.append(list(prompts)) or states(prompts, **how)
    )
    collect(cached_model, prompt_groups, alone)
    fitted = {p.id for p in seen[-1]}
    assert len(asked) == 12 and len(fitted) == 12 and not fitted & set(asked)


def test_a_real_model_answers(cached_model, prompt_groups, alone):
    records = collect(cached_model, prompt_groups, replace(alone, random_draws=1, categories=2))
    assert np.isfinite(records.steered.odds).all()
    assert analyse(records, alone).section.parts


@pytest.mark.parametrize("lack", ["categories", "accepted_harmless"])
def test_without_categories_or_harmless_prompts(cached_model, prompt_groups, alone, lack):
    if lack == "categories":
        bare = replace(prompt_groups, pools=replace(prompt_groups.pools, categories=()))
    else:
        bare = replace(prompt_groups, fit={**prompt_groups.fit, "accepted_harmless": ()})
    finding = analyse(collect(cached_model, bare, alone), alone)
    assert "too few" in finding.caveats[0] and not finding.effects and not finding.section.parts


def test_the_question_that_is_answered_best_is_asked(cached_model, prompt_groups, alone):
    def rule(prompt, one):
        return "Certainly." if QUESTIONS[1] in prompt.text else "No."

    cached_model.uncached = Watched(cached_model.uncached, rule)
    records = collect(cached_model, prompt_groups, replace(alone, inversion_templates=3))
    assert records.steered.question == 1 and records.steered.open.all()


def test_nothing_refused_and_nothing_to_choose_a_layer_on(cached_model, prompt_groups, alone):
    cached_model.uncached = Watched(cached_model.uncached, lambda prompt, one: "Sure.")
    fit = {"accepted_harmful": prompt_groups.fit["refused_harmful"]}
    bare = replace(prompt_groups, fit={**prompt_groups.fit, **fit, "refused_harmful": ()}, test={})
    records = collect(cached_model, bare, alone)
    assert records.refused == (False,) * 3
    assert records.steered.layer in alone.probed_layers(cached_model.depth)
    few = replace(alone, enough=100)
    found = analyse(records, few)
    assert "only 12 of 12 prompts" in found.caveats[2] and FLIP not in found.effects


def test_figure_9b_as_printed_takes_the_best_layer_of_each_direction():
    answers = {
        "a": np.array([["no", "certainly", "other"], ["no", "no", "other"]]),
        "average of all": np.array([["certainly"] * 3, ["no", "certainly", "certainly"]]),
        "b": np.array([["other"] * 3, ["other"] * 3]),
    }
    table = printed_table(PrintedFlips("hate", (4, 8), answers, ("certainly", "no", "other")))
    rows = {row[0]: (row[1], row[2], row[5]) for row in table.rows}
    assert rows["a"] == (8, 1.0, 2)
    assert rows["average of all"] == (8, pytest.approx(1 / 3), 3)
    assert rows["b"] == (None, None, 0)
    assert rows["unsteered"] == (None, 0.5, 2)
    assert table.rows[0][0] == "a"


def test_one_category_is_tested_with_every_direction_at_every_layer(
    cached_model, prompt_groups, alone
):
    cached_model.uncached = Watched(cached_model.uncached, own)
    records = collect(cached_model, prompt_groups, replace(alone, protocol="paper"))
    printed = records.printed
    assert "hate" in printed.tested
    assert printed.layers == alone.layers(cached_model.depth)
    assert list(printed.answers) == [*records.names, "average of all"]
    assert all(of.shape == (len(printed.layers), 4) for of in printed.answers.values())
    rates = {row[0]: row[2] for row in printed_table(printed).rows}
    assert rates[printed.tested] == 1.0
    assert {rates[name] for name in records.names if name != printed.tested} == {0.0}
