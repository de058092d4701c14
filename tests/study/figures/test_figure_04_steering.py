"""Steering harmless prompts: layers chosen elsewhere, effects beside chance, alike or not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentguard.errors import LatentGuardError
from latentguard.probes.axis import Axis
from latentguard.report.document import Report
from latentguard.stats.rates import proportion, share
from latentguard.study.axes import Axes, fit_axes
from latentguard.study.figures import figure_04_steering as steering
from latentguard.study.figures.figure_04_steering.direction_cosine import compare_directions
from latentguard.study.figures.figure_04_steering.held_out_cosine import (
    HeldOutCosine,
    held_out_cosines,
    held_out_table,
)
from latentguard.study.steering import Steering, at_layers, best_layers, random_like, steer_each
from study.figures.planted import Planted, Silent

SORRY, FINE = "I'm sorry, but I cannot help with that.", "Sure, here is a poem about the sea."


def records(harmful, chance, refuse=None, unsteered=None, layers=(0, 2, 4)):
    """Planted flags [layers n] of the directions, [draws layers n] of chance."""
    n = np.shape(harmful)[1]
    refused = {}
    for of, name, flags in (("harmful", "harmfulness", harmful), ("refuse", "refusal", refuse)):
        if flags is None:
            continue
        whole = np.asarray(flags, dtype=float)[None]
        refused[Steering(f"{name} direction", of, 1.0, "all")] = whole
        refused[Steering(f"{name} direction, instruction only", of, 1.0, "instruction")] = 0 * whole
        refused[Steering(f"random, norm of {name} direction", of, 1.0, "all", len(chance))] = (
            np.asarray(chance, dtype=float)
        )
    flags = np.zeros(n) if unsteered is None else np.asarray(unsteered, dtype=float)
    ids = tuple(f"p{i}" for i in range(n))
    return steering.Records(ids, layers, flags, refused, None, "note")


class TestLayers:
    def test_the_best_layer_of_the_other_half_is_taken(self):
        hits = np.zeros((3, 6))
        hits[2, 0::2] = 1  # best for even places
        hits[1, 1::2] = 1  # best for odd places
        assert best_layers(hits).tolist() == [1, 2, 1, 2, 1, 2]

    @given(st.integers(2, 9), st.integers(0, 2**32 - 1))
    def test_a_prompt_takes_no_part_in_the_choice_of_its_layer(self, n, seed):
        rng = np.random.default_rng(seed)
        hits = rng.random((4, n)) < 0.5
        one = int(rng.integers(n))
        changed = hits.copy()
        changed[:, one] = ~changed[:, one]
        assert best_layers(hits)[one] == best_layers(changed)[one]

    def test_noise_shows_no_effect_at_layers_chosen_elsewhere(self):
        """The maximum over 20 layers of coin flips is well over a half; this is not."""
        rng = np.random.default_rng(0)
        found, highest = [], []
        for _ in range(300):
            hits = rng.random((20, 24)) < 0.5
            found.append(at_layers(hits[None], best_layers(hits)).mean())
            highest.append(hits.mean(1).max())
        assert abs(np.mean(found) - 0.5) < 0.02
        assert np.mean(highest) > 0.65

    def test_one_prompt_or_none(self):
        assert best_layers(np.ones((3, 1))).tolist() == [0]
        assert best_layers(np.ones((3, 0))).tolist() == []

    def test_share_counts_a_prompt_once_however_many_the_draws(self):
        flags = np.array([[True, False, False, False]])
        assert share(np.repeat(flags, 5, 0)) == share(flags) == proportion(flags[0])
        mixed = share(np.vstack([flags, ~flags]))
        assert mixed.value == 0.5 and sum(mixed.n) == 4


class TestWays:
    def axes(self, refuse=True):
        torch.manual_seed(0)
        means = torch.randn(4, 3, 8)
        harmful = Axis("harmful", "t_inst", (0, 1, 2), means[0], means[1], (3, 3))
        other = Axis("refuse", "t_post", (0, 1, 2), means[2], means[3], (3, 3))
        return Axes(harmful, other if refuse else None, "")

    def test_directions_at_each_layer(self):
        axes = self.axes()
        found = Steering("w", "refuse", -2.0, "before").interventions(axes, (0, 2))
        assert [(i.layer, i.coefficient, i.tokens, i.label) for i in found] == [
            (0, -2.0, "before", "w"),
            (2, -2.0, "before", "w"),
        ]
        assert torch.equal(found[1].vector, axes.refuse.direction[2])

    def test_random_draws_are_as_long_and_come_draw_by_draw(self):
        axes = self.axes()
        found = Steering("w", "harmful", 1.0, "all", draws=3).interventions(axes, (1, 2))
        assert [i.layer for i in found] == [1, 2] * 3
        for i in found:
            direction = axes.harmful.direction[i.layer]
            assert torch.isclose(i.vector.norm(), direction.norm())
        assert torch.equal(found[3].vector, random_like(axes.harmful.direction[2], 1))

    def test_without_a_refusal_axis_nothing_is_steered_along_it(self):
        assert (
            Steering("w", "refuse", 1.0, "all").interventions(self.axes(refuse=False), (0,)) == []
        )

    def test_replies_come_to_the_way_and_layer_they_belong_to(
        self, cached_model, prompt_groups, settings
    ):
        def rule(prompt, one):
            return "plain" if one is None else f"{one.label} {one.layer} {one.coefficient:g}"

        cached_model.uncached = Planted(cached_model.uncached, rule)
        axes = fit_axes(cached_model, prompt_groups, enough=settings.enough)
        ways = [Steering("a", "harmful", 1.0, "all"), Steering("b", "refuse", 2.0, "all", 2)]
        prompts = prompt_groups.test["accepted_harmless"][:2]
        unsteered, found = steer_each(cached_model, prompts, ways, axes, (1, 3))
        assert [r.text for r in unsteered] == ["plain"] * 2
        assert [[of[0].text for of in draw] for draw in found[ways[0]]] == [["a 1 1", "a 3 1"]]
        assert [[of[1].text for of in draw] for draw in found[ways[1]]] == [["b 1 2", "b 3 2"]] * 2


class TestAnalysis:
    def test_planted_effects(self, settings):
        harmful = np.zeros((3, 20))
        harmful[1, :15] = 1
        refuse = np.zeros((3, 20))
        refuse[2] = 1
        chance = np.zeros((5, 3, 20))
        chance[0, 1, :10] = 1  # one draw of five, half of the prompts
        effects = steering.analyse(records(harmful, chance, refuse), settings).effects
        assert effects["refusal along harmfulness"].value == 0.75
        assert effects["refusal along harmfulness, random"].value == pytest.approx(0.1)
        assert effects["refusal along harmfulness minus random"].value == pytest.approx(0.65)
        assert effects["refusal along refusal"].value == 1
        assert effects["refusal along refusal minus random"].value == 1
        assert effects["refusal along refusal minus along harmfulness"].value == 0.25
        assert effects["refusal, unsteered"].value == 0
        assert sum(effects["refusal along harmfulness"].n) == 20

    def test_interval_of_the_difference_is_that_of_paired_prompts(self, settings):
        rng = np.random.default_rng(1)
        harmful = np.zeros((3, 60))
        harmful[0] = rng.random(60) < 0.6
        chance = np.zeros((1, 3, 60))
        chance[0, 0] = rng.random(60) < 0.3
        found = steering.analyse(records(harmful, chance), settings).effects
        over = found["refusal along harmfulness minus random"]
        gap = harmful[0] - chance[0, 0]
        half = 1.96 * gap.std() / np.sqrt(60)
        assert over.value == pytest.approx(gap.mean())
        assert over.low == pytest.approx(gap.mean() - half, abs=0.04)
        assert over.high == pytest.approx(gap.mean() + half, abs=0.04)

    def test_empty_replies_are_no_refusals_and_are_counted(self, settings):
        harmful = np.array([[1, 1, np.nan, 0]] * 3)
        finding = steering.analyse(records(harmful, np.zeros((2, 3, 4))), settings)
        (table,) = (p for p in finding.section.parts if p.title.endswith("by layer") and p.columns)
        first = dict(zip(table.columns, table.rows[0], strict=True))
        assert (first["refused"], first["n"], first["empty or cut"]) == (0.5, 4, 0.25)

    def test_highest_of_layers_is_told_apart(self, settings):
        harmful = np.zeros((3, 4))
        harmful[1, ::2] = 1  # chosen on even places, it fails in the odd ones, and the reverse
        finding = steering.analyse(records(harmful, np.zeros((2, 3, 4))), settings)
        (table,) = (p for p in finding.section.parts if p.title.endswith("best layer"))
        first = dict(zip(table.columns, table.rows[0], strict=True))
        assert (first["refused"], first["highest of layers"]) == (0, 0.5)

    def test_few_prompts_conclude_nothing(self, settings):
        few = records(np.ones((3, 1)), np.zeros((2, 3, 1)))
        finding = steering.analyse(few, settings)
        assert not finding.effects
        assert any("Only 1" in line for line in finding.caveats)
        assert any("refusal direction" in line for line in finding.caveats)


class TestLikeness:
    def sides(self, n=40, d=24, noise=0.0, same=False):
        rng = np.random.default_rng(0)
        one, other = np.eye(d)[0], np.eye(d)[0 if same else 1]
        pushed = np.stack([one, other])[:, None]  # [p l d]
        up, down = (noise * rng.normal(size=(n, 2, 1, d)) for _ in range(2))
        return up + pushed, down

    @pytest.mark.parametrize(("same", "expected"), [(True, 1.0), (False, 0.0)])
    def test_known_directions(self, same, expected):
        found = compare_directions(*self.sides(same=same))
        assert found.between == pytest.approx(expected)
        assert found.itself == pytest.approx(1.0)
        assert found.fitted == (40, 40)

    def test_shapes_and_the_first_row_by_hand(self):
        up, down = self.sides(noise=1.0)
        found = compare_directions(up, down)
        assert found.between.shape == (1001, 1) and found.itself.shape == (2, 100, 1)
        a, b = (up.mean(0) - down.mean(0))[:, 0]
        assert found.between[0, 0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    def test_bootstrap_is_that_of_refits(self):
        up, down = self.sides(noise=1.0)
        rng, values = np.random.default_rng(5), []
        for _ in range(1000):
            left, right = (side[rng.integers(40, size=40)].mean(0)[:, 0] for side in (up, down))
            a, b = left - right
            values.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        found = np.quantile(compare_directions(up, down).between[1:], [0.025, 0.975])
        assert found == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.06)

    def test_noise_neither_lowers_the_interval_nor_hides_what_is_alike(self):
        """Directions of cosine 0.4, fitted on few prompts: the plain cosine is far lower."""
        rng = np.random.default_rng(0)
        u, v = np.eye(256)[0], 0.4 * np.eye(256)[0] + 0.84**0.5 * np.eye(256)[1]
        up, down = (
            0.18 * rng.normal(size=(30, 2, 4, 256)) + sign * np.stack([u, v])[:, None] / 2
            for sign in (1, -1)
        )
        found = compare_directions(up, down)
        assert found.mean.low < found.mean.value < found.mean.high < 0.39
        assert found.noiseless.value == pytest.approx(0.4, abs=0.05)
        value, low, high = found.bands[0]
        assert np.all(np.array(low) < value) and np.all(np.array(high) > value)

    def test_no_prompt_is_multiplied_with_itself(self):
        """By brute force: inner products of directions, mean over pairs of different prompts."""
        rng = np.random.default_rng(2)
        up, down = rng.normal(size=(6, 2, 1, 5)), rng.normal(size=(7, 2, 1, 5))
        up += 3 * np.array([[1.0, 0, 0, 1, 0], [0, 1.0, 0, 1, 0]])[:, None]

        def product(a, b):
            """Of the differences of means at positions a and b."""
            total = 0.0
            for one, other, sign in ((up, up, 1), (down, down, 1), (up, down, -1), (down, up, -1)):
                pairs = [
                    one[i, a, 0] @ other[j, b, 0]
                    for i in range(len(one))
                    for j in range(len(other))
                    if one is not other or i != j
                ]
                total += sign * np.mean(pairs)
            return total

        wanted = product(0, 1) / np.sqrt(product(0, 0) * product(1, 1))
        assert compare_directions(up, down).noiseless.value == pytest.approx(wanted)

    def test_noise_that_both_positions_share_does_not_move_it(self):
        """Orthogonal directions; the plain cosine leans to that of the noise."""
        rng = np.random.default_rng(4)
        plain, noiseless, held = [], [], 0
        for _ in range(40):
            states = rng.normal(size=(2, 20, 2, 1, 32)) + 2 * rng.normal(size=(2, 20, 1, 1, 32))
            states[0, :, 0, 0, 0] += 6
            states[0, :, 1, 0, 1] += 6
            found = compare_directions(*states)
            plain.append(found.mean.value)
            noiseless.append(found.noiseless.value)
            held += found.noiseless.low <= 0 <= found.noiseless.high
        assert np.mean(plain) > 0.2
        assert np.mean(noiseless) == pytest.approx(0, abs=0.06)
        assert held >= 34

    def test_noise_alone_tells_nothing(self):
        noise = np.random.default_rng(3).normal(size=(2, 30, 2, 1, 50))
        found = compare_directions(*noise)
        if found.itself.mean(1).min() <= 0:
            assert np.isnan(found.noiseless.value)
        assert abs(found.mean.value) < 0.5

    def test_noise_is_not_like_itself(self):
        noise = np.random.default_rng(0).normal(size=(2, 30, 2, 1, 50))
        assert abs(compare_directions(*noise).itself.mean()) < 0.1


class TestEndToEnd:
    def test_what_the_model_says_is_what_is_found(self, cached_model, prompt_groups, settings):
        def rule(prompt, one):
            return SORRY if one and one.label == "refusal direction" and one.layer == 2 else FINE

        cached_model.uncached = Planted(cached_model.uncached, rule)
        found = steering.collect(cached_model, prompt_groups, settings)
        assert len(found.ids) == 4 and found.layers == (0, 1, 2, 3)
        effects = steering.analyse(found, settings).effects
        assert effects["refusal along refusal minus random"].value == 1
        assert effects["refusal along harmfulness minus random"].value == 0
        assert effects["cosine of the directions"].n == (6, 6)

    def test_options_of_steering(self, cached_model, prompt_groups, settings):
        """One layer's direction at every layer, and at each token of the reply."""
        seen = []
        axes = fit_axes(cached_model, prompt_groups, enough=settings.enough)

        def rule(prompt, one):
            seen.append(one)
            return FINE

        cached_model.uncached = Planted(cached_model.uncached, rule)
        chosen = replace(settings, steer_from_layer=2, steer_while_replying=True)
        steering.collect(cached_model, prompt_groups, chosen)
        steered = [one for one in seen if one is not None]
        assert {one.layer for one in steered} == {0, 1, 2, 3}
        assert all(one.while_replying for one in steered)
        along = [one for one in steered if one.label == "harmfulness direction"]
        assert along and all(torch.equal(one.vector, axes.harmful.direction[2]) for one in along)
        with pytest.raises(LatentGuardError, match="'steer_from_layer' is at most 4, the last"):
            steering.collect(cached_model, prompt_groups, replace(settings, steer_from_layer=9))

    def test_cosine_is_that_of_the_axes(self, cached_model, prompt_groups, settings):
        axes = fit_axes(cached_model, prompt_groups, enough=settings.enough)
        found = steering.collect(cached_model, prompt_groups, settings).alike
        expected = torch.cosine_similarity(axes.harmful.direction, axes.refuse.direction, dim=-1)
        assert found.between[0] == pytest.approx(expected[1:].numpy(), abs=1e-5)

    def test_again_the_model_is_not_asked(self, cached_model, prompt_groups, settings, tmp_path):
        settings = replace(settings, steered=2, layer_step=2)
        first = steering.collect(cached_model, prompt_groups, settings)
        cached_model.uncached = Silent(cached_model.uncached)
        again = steering.collect(cached_model, prompt_groups, settings)
        assert first.ids == again.ids and list(first.refused) == list(again.refused)
        for way, flags in first.refused.items():
            assert np.array_equal(flags, again.refused[way], equal_nan=True)
        section = steering.analyse(again, settings).section
        Report("Steering", (section,)).save(tmp_path / "report")

    def test_tables_are_whole(self, cached_model, prompt_groups, settings):
        cached_model.uncached = Planted(cached_model.uncached, lambda prompt, one: FINE)
        finding = steering.analyse(
            steering.collect(cached_model, prompt_groups, settings), settings
        )
        for part in finding.section.parts:
            for row in getattr(part, "rows", ()):
                assert len(row) == len(part.columns)

    def test_no_refusal_and_no_prompts(self, cached_model, prompt_groups, settings):
        none = replace(prompt_groups, fit=prompt_groups.fit | {"refused_harmful": ()}, test={})
        none.fit["accepted_harmful"] = prompt_groups.fit["refused_harmful"]
        found = steering.collect(cached_model, none, settings)
        finding = steering.analyse(found, settings)
        assert not finding.effects and len(finding.caveats) == 2
        half = replace(none, test=prompt_groups.test)
        found = steering.collect(cached_model, half, settings)
        assert {way.of for way in found.refused} == {"harmful"}
        effects = steering.analyse(found, settings).effects
        assert "refusal along harmfulness minus random" in effects
        assert "cosine of the directions" not in effects


class TestHeldOut:
    def test_refused_prompts_lie_along_the_direction_and_accepted_ones_against_it(self):
        along = HeldOutCosine("refused", np.full((4, 3), 0.6), np.full((4, 3), 0.9))
        against = HeldOutCosine("accepted", np.full((4, 3), -0.1), np.full((4, 3), -0.8))
        rows = {row[:2]: (row[2], row[5], row[6]) for row in held_out_table((along, against)).rows}
        assert rows["refused", "as they are"] == (pytest.approx(0.6), 4, 0.57)
        assert rows["accepted", "centred"] == (pytest.approx(-0.8), 4, -0.14)

    def test_cosines_are_those_of_the_states(self, cached_model, prompt_groups):
        axes = fit_axes(cached_model, prompt_groups, enough=2)
        found = {one.behaviour: one for one in held_out_cosines(cached_model, prompt_groups, axes)}
        prompts = [
            p
            for g in ("refused_harmful", "refused_harmless")
            for p in prompt_groups.test_prompts(g)
        ]
        states = cached_model.states(prompts).at("t_post")
        row, layer = 1, 2
        v, x = axes.refuse.direction[layer], states[row, layer]
        middle = (axes.refuse.positive + axes.refuse.negative)[layer] / 2
        wanted = [float(a @ v / (a.norm() * v.norm())) for a in (x, x - middle)]
        one = found["refused"]
        assert one.as_they_are[row, layer - 1] == pytest.approx(wanted[0], abs=1e-5)
        assert one.centred[row, layer - 1] == pytest.approx(wanted[1], abs=1e-5)
        assert len(found["accepted"].centred) == len(prompts)
