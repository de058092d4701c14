"""Axes of a study on planted states; steering along them or along chance; positions by name."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fake_backend import FakeBackend, planted
from latentguard.errors import GuardError, PromptError
from latentguard.models.layout import Layout
from latentguard.probes.axis import Axis
from latentguard.prompts import Prompt, Reply
from latentguard.study.axes import Axes, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.prompt_groups import PromptGroups, PromptPools
from latentguard.study.steering import (
    Steering,
    at_layers,
    best_layers,
    middle_layers,
    random_like,
    reply_to_each,
    steer,
    steer_at_random,
    steer_each,
)
from latentguard.study.store import Store

HITS = arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 7)))


@pytest.fixture
def backend():
    return FakeBackend(depth=4, width=24)


@pytest.fixture
def cached_model(backend, tmp_path):
    store = Store(tmp_path / "s")
    yield CachedModel(backend, store)
    store.close()


def group(count, *, harmful, refused):
    """Prompts whose text says which group they are of; see ``FakeBackend``."""
    words = f"{'bad' if harmful else 'good'} {'no' if refused else 'yes'}"
    return tuple(Prompt(f"{words} {n}", harmful=harmful, refused=refused) for n in range(count))


def prompt_groups(refused_harmful, accepted_harmless, accepted_harmful=0, test=()):
    fit = {
        "refused_harmful": group(refused_harmful, harmful=True, refused=True),
        "accepted_harmful": group(accepted_harmful, harmful=True, refused=False),
        "accepted_harmless": group(accepted_harmless, harmful=False, refused=False),
    }
    return PromptGroups(PromptPools((), ()), fit, {"accepted_harmful": test})


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


class TestFitAxes:
    def test_it_finds_what_was_planted(self, cached_model, backend):
        axes = fit_axes(cached_model, prompt_groups(60, 60))
        assert (axes.harmful.position, axes.refuse.position) == ("t_inst", "t_post")
        assert axes.harmful.counts == axes.refuse.counts == (60, 60)
        assert (cosine(axes.harmful.direction, backend.harm)[1:] > 0.9).all()
        both = backend.harm + 2 * backend.refusal
        assert (cosine(axes.refuse.direction, both)[1:] > 0.9).all()
        assert axes.note.startswith("Centroids: 60 refused harmful and 60 accepted harmless")

    def test_equal_to_the_axes_of_the_groups(self, cached_model, backend):
        found = prompt_groups(12, 15, accepted_harmful=5)
        axes = fit_axes(cached_model, found)
        prompts = [*found.fit["refused_harmful"], *found.fit["accepted_harmless"]]
        states = list(backend.capture(prompts))
        for axis, at in ((axes.harmful, "t_inst"), (axes.refuse, "t_post")):
            wanted = Axis.fit(states, at, positive="refused_harmful", negative="accepted_harmless")
            assert torch.allclose(axis.direction, wanted.direction, atol=1e-5)

    def test_tested_prompts_take_no_part(self, cached_model, backend):
        test = group(30, harmful=True, refused=False)
        fit_axes(
            cached_model, prompt_groups(12, 15, test=tuple(Prompt(f"test {p.text}") for p in test))
        )
        assert not any(text.startswith("test") for text in backend.captured)

    @pytest.mark.parametrize(("refused", "accepted"), [(9, 20), (20, 9), (0, 20), (20, 1)])
    def test_too_few(self, cached_model, refused, accepted):
        axes = fit_axes(cached_model, prompt_groups(refused, accepted, accepted_harmful=7))
        assert axes.refuse is None
        assert axes.harmful.counts == (refused + 7, accepted)
        assert f"{refused} refused harmful and {accepted} accepted harmless" in axes.note

    def test_just_enough(self, cached_model):
        assert fit_axes(cached_model, prompt_groups(3, 3), enough=3).refuse is not None

    @pytest.mark.parametrize(
        "found", [prompt_groups(0, 0), prompt_groups(20, 0), prompt_groups(0, 20)]
    )
    def test_a_side_without_prompts(self, cached_model, found):
        with pytest.raises(GuardError, match=r"needs harm(ful|less) prompts and found none"):
            fit_axes(cached_model, found)

    def test_no_groups_at_all(self, cached_model):
        with pytest.raises(GuardError, match="found none"):
            fit_axes(cached_model, PromptGroups(PromptPools((), ()), {}, {}))


def axis(depth=4, width=24, name="harmful"):
    positive = 3 * planted(name, depth, width) + 1
    ones = torch.ones(depth + 1, width)
    return Axis(name, "t_inst", tuple(range(depth + 1)), positive, ones, (5, 5))


class TestSteer:
    @pytest.mark.parametrize("layer", [0, 2, 4])
    def test_along_the_direction_of_that_layer(self, layer):
        one = steer(axis(), layer, -2.0, tokens="before", label="back")
        assert (one.layer, one.coefficient, one.tokens, one.label) == (
            layer,
            -2.0,
            "before",
            "back",
        )
        assert torch.equal(one.vector, axis().direction[layer])

    def test_the_direction_of_another_layer(self):
        how = dict(tokens="all", label="", from_layer=1, while_replying=True)
        one = steer(axis(), 3, **how)
        assert one.layer == 3 and one.while_replying
        assert torch.equal(one.vector, axis().direction[1])
        chance = steer_at_random(axis(), 3, draw=0, **how)
        assert chance.layer == 3 and chance.while_replying
        assert torch.equal(chance.vector, random_like(axis().direction[1], 0))

    @pytest.mark.parametrize("layer", [0, 1, 4])
    def test_at_random_is_as_long(self, layer):
        one = steer_at_random(axis(), layer, 1.0, tokens="all", label="r", draw=2)
        real = axis().direction[layer]
        assert one.vector.norm() == pytest.approx(float(real.norm()), rel=1e-5)
        assert one.vector.shape == real.shape

    def test_a_draw_is_one_direction_at_every_layer(self):
        how = dict(tokens="all", label="")
        vectors = [steer_at_random(axis(), n, **how, draw=3).vector for n in range(1, 5)]
        assert all(cosine(v, vectors[0]) == pytest.approx(1, abs=1e-5) for v in vectors)

    @given(st.integers(1, 64), st.floats(1e-3, 1e3), st.integers(0, 20))
    def test_random_like(self, width, length, draw):
        vector = torch.ones(width) * length / width**0.5
        found = random_like(vector, draw)
        assert found.norm() == pytest.approx(length, rel=1e-4)
        assert torch.equal(found, random_like(vector, draw))
        assert torch.isfinite(found).all()

    def test_draws_differ_and_lean_nowhere(self):
        vector = torch.randn(400)
        draws = torch.stack([random_like(vector, n) for n in range(30)])
        angles = cosine(draws[:, None], draws[None]) - torch.eye(30)
        assert angles.abs().max() < 0.3
        assert cosine(draws, vector).abs().max() < 0.3

    def test_of_nothing(self):
        """At layer 0 of t_post every prompt holds the same: the direction is zero there."""
        assert torch.equal(random_like(torch.zeros(8), 1), torch.zeros(8))

    def test_it_leaves_the_random_numbers_alone(self):
        before = torch.get_rng_state()
        random_like(torch.ones(8), 0)
        assert torch.equal(torch.get_rng_state(), before)


class TestWays:
    def test_the_direction_itself(self):
        axes = Axes(axis(), axis(name="refuse"), "")
        made = Steering("away", "refuse", -1.5, "all").interventions(axes, [0, 3])
        assert [(i.layer, i.coefficient, i.tokens, i.label) for i in made] == [
            (0, -1.5, "all", "away"),
            (3, -1.5, "all", "away"),
        ]
        assert torch.equal(made[1].vector, axes.refuse.direction[3])

    def test_options_go_to_every_layer_and_draw(self):
        axes = Axes(axis(), None, "")
        options = dict(from_layer=2, while_replying=True)
        plain = Steering("h", "harmful", 1.0, "all", **options).interventions(axes, [0, 1, 4])
        assert all(torch.equal(one.vector, axis().direction[2]) for one in plain)
        chance = Steering("r", "harmful", 1.0, "all", 3, **options).interventions(axes, [0, 4])
        assert len(chance) == 6 and all(one.while_replying for one in [*plain, *chance])

    def test_random_directions_draw_by_draw(self):
        axes = Axes(axis(), None, "")
        made = Steering("r", "harmful", 2.0, "t_inst", draws=2).interventions(axes, [1, 2])
        assert [i.layer for i in made] == [1, 2, 1, 2]
        for n, one in enumerate(made):
            assert torch.equal(one.vector, random_like(axes.harmful.direction[one.layer], n // 2))

    def test_no_axis(self):
        assert Steering("r", "refuse", 1.0, "all").interventions(Axes(axis(), None, ""), [1]) == []


class Echo:
    """A cached_model that says how it was steered."""

    def replies(self, prompts, interventions, **how):
        self.how, self.times = how, getattr(self, "times", 0) + 1
        said = ["" if i is None else f"{i.label} {i.layer}" for i in interventions]
        return [[Reply(p, text, (), True) for p in prompts] for text in said]


class TestReplyToEach:
    def test_each_kind_gets_the_replies_under_its_own_edits(self):
        def steered(name, count):
            return [steer(axis(), n, tokens="all", label=name) for n in range(count)]

        model = Echo()
        edits = {"a": steered("a", 3), "none": [], "b": steered("b", 1)}
        plain, found = reply_to_each(model, [Prompt("p")], edits, what="w")
        assert [reply.text for reply in plain] == [""]
        assert texts([found["a"]]) == [[["a 0"], ["a 1"], ["a 2"]]]
        assert (found["none"], texts([found["b"]])) == ([], [[["b 0"]]])
        assert model.times == 1


class TestSteerEach:
    PROMPTS = (Prompt("a"), Prompt("b"))

    def test_each_way_gets_its_own_replies(self):
        ways = [
            Steering("h", "harmful", 1.0, "all"),
            Steering("r", "refuse", 1.0, "all"),
            Steering("c", "harmful", 1.0, "all", draws=3),
        ]
        cached_model = Echo()
        plain, found = steer_each(
            cached_model, self.PROMPTS, ways, Axes(axis(), None, ""), [0, 2], what="w"
        )
        assert [r.text for r in plain] == ["", ""]
        assert list(found) == [ways[0], ways[2]]
        said = {way: texts(replies) for way, replies in found.items()}
        assert said[ways[0]] == [[["h 0"] * 2, ["h 2"] * 2]]
        assert said[ways[2]] == [[["c 0"] * 2, ["c 2"] * 2]] * 3
        assert (cached_model.how, cached_model.times) == ({"what": "w"}, 1)

    def test_no_way(self):
        plain, found = steer_each(Echo(), self.PROMPTS, [], Axes(axis(), None, ""), [0])
        assert (len(plain), found) == (2, {})


def texts(replies):
    return [[[reply.text for reply in layer] for layer in draw] for draw in replies]


class TestBestLayers:
    @given(HITS)
    def test_no_prompt_chooses_its_own_layer(self, hits):
        picks = best_layers(hits)
        for n in range(hits.shape[1]):
            turned = hits.copy()
            turned[:, n] = ~turned[:, n]
            assert best_layers(turned)[n] == picks[n]

    @given(HITS)
    def test_the_best_of_the_other_half(self, hits):
        picks = best_layers(hits)
        count = hits.shape[1]
        for n in range(count) if count > 1 else ():
            others = [m for m in range(count) if m % 2 != n % 2]
            rates = [float(np.mean([row[m] for m in others])) for row in hits]
            assert picks[n] == rates.index(max(rates))

    def test_chance_gains_nothing(self):
        rng = np.random.default_rng(0)
        rates = []
        for _ in range(300):
            hits = rng.random((20, 24)) < 0.3
            rates.append(at_layers(hits[None], best_layers(hits)).mean())
        assert np.mean(rates) == pytest.approx(0.3, abs=0.02)

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_to_choose(self, count):
        assert best_layers(np.ones((3, count), bool)).tolist() == [0] * count

    def test_at_layers(self):
        hits = np.arange(24).reshape(2, 3, 4) % 5 == 0
        found = at_layers(hits, np.array([2, 0, 1, 2]))
        wanted = [[hits[d, layer, n] for n, layer in enumerate([2, 0, 1, 2])] for d in range(2)]
        assert found.tolist() == wanted


class TestMiddleLayers:
    def test_the_papers(self):
        assert middle_layers(28, (9, 20)) == slice(9, 21)
        assert middle_layers(14, (9, 20)) == slice(4, 11)

    @given(st.integers(1, 120), st.integers(0, 40), st.integers(0, 40))
    def test_never_empty_and_never_the_embedding(self, depth, low, width):
        layers = list(range(depth + 1))[middle_layers(depth, (low, low + width))]
        assert layers
        assert layers[0] >= 1


class TestPositions:
    LAYOUT = Layout(tuple(range(100, 112)), 7, ((0, 1), (1, 4), (4, 6)))
    """Five tokens of the template, three of the message, four of the template."""

    def test_counted_from_t_inst(self):
        assert [self.LAYOUT.index(f"inst-{k}") for k in (0, 1, 2, 7)] == [7, 6, 5, 0]
        assert [self.LAYOUT.index(f"post+{k}") for k in (1, 4)] == [8, 11]
        assert (self.LAYOUT.index("t_inst"), self.LAYOUT.index("t_post")) == (7, 11)

    def test_means(self):
        ends = [(self.LAYOUT.start(p), self.LAYOUT.index(p)) for p in ("mean", "post")]
        assert ends == [(5, 7), (8, 11)]
        bare = Layout(self.LAYOUT.ids[:8], 7, self.LAYOUT.spans)  # nothing comes after
        assert (bare.start("post"), bare.index("post")) == (7, 7)

    @pytest.mark.parametrize(
        "position",
        ["inst-8", "inst-99", "inst-", "inst--1", "inst+1", "inst-1.0", "inst-1 ", "post+0", ""],
    )
    def test_no_such_position(self, position):
        with pytest.raises(PromptError, match=r"post\+1 to post\+4 and inst-1 to inst-7"):
            self.LAYOUT.index(position)
