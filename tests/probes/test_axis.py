"""Axes: centroids that stream and merge, planted directions, the equations of the paper."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from fake_backend import FakeBackend, labelled, with_refusals
from latentguard.errors import GuardError
from latentguard.probes.axis import GROUPS, Axis, Centroid
from latentguard.probes.probe import centroid
from latentguard.prompts import Prompt
from latentguard.states import States


def states(prompts=None, **how):
    batches = FakeBackend(**how).capture(labelled(60) if prompts is None else prompts)
    return States.collect(batches)


@pytest.fixture(scope="module")
def whole():
    return states()


class TestCentroid:
    def test_mean(self):
        values = torch.randn(9, 2, 3, dtype=torch.bfloat16)
        found = Centroid.of(values)
        assert found.count == 9
        assert found.mean.dtype == torch.float64
        assert torch.allclose(found.mean, values.double().mean(0), atol=1e-12)

    def test_of_nothing(self):
        nothing, some = Centroid.of(torch.empty(0, 2, 3)), Centroid.of(torch.randn(4, 2, 3))
        assert nothing.count == 0
        for merged in (nothing.merge(some), some.merge(nothing)):
            assert merged.count == 4
            assert torch.equal(merged.mean, some.mean)
        assert nothing.merge(nothing).count == 0

    def test_the_order_of_merging_is_free(self):
        sizes = (1, 40, 0, 7)
        parts = [Centroid.of(100 + 10 * torch.randn(size, 2, 3)) for size in sizes]
        means = []
        for order in itertools.permutations(parts):
            merged = order[0].merge(order[1]).merge(order[2].merge(order[3]))
            assert merged.count == 48
            means.append(merged.mean)
        spread = torch.stack(means).amax(0) - torch.stack(means).amin(0)
        assert spread.max() < 1e-12 * 100


class TestFit:
    def test_streamed_is_whole(self, whole):
        cuts = [0, 1, 2, 30, 31, 77, 100, 120]
        parts = [
            replace(whole, values=whole.values[a:b], prompts=whole.prompts[a:b])
            for a, b in itertools.pairwise(cuts)
        ]
        streamed = Axis.fit(iter(parts), "t_inst")
        one = Axis.fit(whole, "t_inst")
        assert streamed.counts == one.counts == (60, 60)
        assert torch.allclose(streamed.positive, one.positive, rtol=0, atol=1e-6)
        assert torch.allclose(streamed.negative, one.negative, rtol=0, atol=1e-6)

    def test_batches_with_one_side_only(self, whole):
        sides = [whole.where(GROUPS[group]) for group in ("harmful", "harmless")]
        found = Axis.fit(sides, "t_inst")
        assert torch.allclose(found.positive, Axis.fit(whole, "t_inst").positive, atol=1e-6)

    def test_the_planted_direction_is_found(self):
        backend = FakeBackend()
        axis = Axis.fit(backend.capture(labelled(300)), "t_inst")
        found = cosine_similarity(axis.direction, backend.harm, dim=-1)
        assert found[1:].min() > 0.99
        assert axis.direction[1:].norm(dim=-1).sub(6).abs().max() < 0.6  # twice the signal of 3

    def test_the_direction_of_refusal(self):
        backend = FakeBackend()
        prompts = with_refusals(labelled(150))
        prompts += [Prompt(p.text, harmful=not p.harmful, refused=p.refused) for p in prompts]
        groups = dict(positive="refused", negative="accepted", name="refuse")
        axis = Axis.fit(backend.capture(prompts), "t_post", **groups)
        assert (axis.name, axis.position, axis.counts) == ("refuse", "t_post", (300, 300))
        planted = 2 * backend.refusal + backend.harm  # "bad" and "no" come together here
        assert cosine_similarity(axis.direction, planted, dim=-1)[1:].min() > 0.99

    @pytest.mark.parametrize("group", GROUPS)
    def test_groups(self, group):
        """A name such as refused_harmless holds both of its words; an unknown label holds none."""
        words = {
            "harmful": lambda p: p.harmful is True,
            "harmless": lambda p: p.harmful is False,
            "refused": lambda p: p.refused is True,
            "accepted": lambda p: p.refused is False,
        }
        for harmful, refused in itertools.product((True, False, None), repeat=2):
            prompt = Prompt("any", harmful=harmful, refused=refused)
            wanted = all(words[word](prompt) for word in group.split("_"))
            assert GROUPS[group](prompt) is wanted

    def test_an_axis_of_chosen_layers(self, whole):
        some = Axis.fit(whole.select((2, 5)), "t_inst")
        assert some.layers == (2, 5)
        assert torch.equal(some.positive, Axis.fit(whole, "t_inst").positive[[2, 5]])


class TestBelief:
    def test_the_equations(self, whole):
        axis = Axis.fit(whole, "t_inst")
        h = whole.at("t_inst").double()
        plus = h[[p.harmful for p in whole.prompts]].mean(0)
        minus = h[[not p.harmful for p in whole.prompts]].mean(0)

        def cosine(a, b):
            return (a * b).sum(-1) / (a.pow(2).sum(-1).sqrt() * b.pow(2).sum(-1).sqrt())

        by_layer = cosine(h, plus) - cosine(h, minus)
        found = axis.layer_beliefs(whole.at("t_inst"))
        assert found.shape == (120, 7)
        assert torch.allclose(found.double(), by_layer, atol=1e-6)
        assert torch.allclose(
            axis.belief(whole.at("t_inst")).double(), by_layer.mean(-1), atol=1e-6
        )

    def test_harmful_prompts_are_believed_harmful(self, whole):
        axis = Axis.fit(whole, "t_inst")
        fresh = states(labelled(50, start=900))
        belief = axis.belief(fresh.at("t_inst"))
        truth = torch.tensor([p.harmful for p in fresh.prompts])
        assert belief[truth].min() > belief[~truth].max()

    def test_the_kernel_of_the_centroid_probe_is_the_belief(self, whole):
        axis = Axis.fit(whole.select((1, 2, 4)), "t_inst")
        h = whole.select((1, 2, 4)).at("t_inst")
        for values in (h, h.bfloat16(), h * 1000, h / 1000):
            assert torch.allclose(centroid(axis)(values), axis.belief(values), rtol=0, atol=1e-6)


class TestErrors:
    @pytest.mark.parametrize("group", GROUPS)
    def test_an_empty_group_is_named(self, whole, group):
        nobody = whole.where(lambda p: False)
        with pytest.raises(GuardError, match=f"The harmful axis needs {group} prompts"):
            Axis.fit(nobody, "t_inst", positive=group)
        other = "harmless" if group == "harmful" else "harmful"
        with pytest.raises(GuardError, match=r"needs refused_harmful prompts and found none"):
            Axis.fit(whole, "t_inst", positive=other, negative="refused_harmful")

    def test_no_batches(self):
        with pytest.raises(GuardError, match="needs harmful prompts and found none"):
            Axis.fit([], "t_inst")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_undefined_states_name_group_and_position(self, whole, value):
        values = whole.values.clone()
        row = next(i for i, p in enumerate(whole.prompts) if not p.harmful)
        values[row, 0, 3, 5] = value
        broken = replace(whole, values=values)
        with pytest.raises(GuardError, match="harmless prompts at t_inst"):
            Axis.fit(broken, "t_inst")
        Axis.fit(broken, "t_post")

    def test_another_position(self, whole):
        with pytest.raises(KeyError, match=r"post\+9"):
            Axis.fit(whole, "post+9")
