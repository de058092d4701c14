"""Beliefs as weights, and beliefs along replies as the cached model keeps them."""

import numpy as np
import pytest
import torch

from latentguard.prompts import Prompt, Reply
from latentguard.study import cached_model as cached_model_module
from latentguard.study.axes import belief, fit_axes
from latentguard.study.belief_weights import belief_weights, weighted_beliefs
from latentguard.study.cached_model import CachedModel
from latentguard.study.steering import random_axis
from study.figures.planted import Silent


@pytest.fixture
def axes(cached_model, prompt_groups):
    return fit_axes(cached_model, prompt_groups, enough=2)


def test_they_give_the_belief_of_equation_3(axes, cached_model, prompt_groups):
    states = cached_model.states(prompt_groups.test_prompts("refused_harmful")).at("t_inst")
    several = [axes.harmful, axes.refuse, random_axis(axes.harmful, 3)]
    found = weighted_beliefs(states, torch.stack([*map(belief_weights, several)]))
    for slot, axis in enumerate(several):
        np.testing.assert_allclose(found[:, slot], belief(axis, states), atol=1e-6)


def test_a_random_axis_keeps_the_middle_and_the_norm(axes):
    turned = random_axis(axes.harmful, 1)
    middles = [(one.positive + one.negative) / 2 for one in (axes.harmful, turned)]
    torch.testing.assert_close(*middles)
    torch.testing.assert_close(
        turned.direction.norm(dim=-1), axes.harmful.direction.norm(dim=-1), rtol=1e-3, atol=1e-4
    )


class Reading:
    """A model that counts the replies that it reads, and dies after some."""

    def __init__(self, model, dies_after=99):
        self.model, self.left, self.read = model, dies_after, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def capture_replies(self, replies):
        if self.read + len(replies) > self.left:
            raise SystemExit(137)
        self.read += len(replies)
        return self.model.capture_replies(replies)


def replies(model, count=5):
    made = [Reply(Prompt(f"Prompt {n}?"), "Go", (n + 3, n + 5)) for n in range(count)]
    return [*made, made[0]]


def test_beliefs_along_replies_are_kept_and_a_killed_run_goes_on(
    model, open_store, monkeypatch, axes
):
    monkeypatch.setattr(cached_model_module, "REPLIES_READ_AT_ONCE", 2)
    weights = belief_weights(axes.harmful)[None]
    store = open_store()
    with pytest.raises(SystemExit):
        CachedModel(Reading(model, 3), store).reply_beliefs(replies(model), weights)
    again = Reading(model)
    found = CachedModel(again, store).reply_beliefs(replies(model), weights)
    assert again.read == 3  # two of five are there; the sixth is the first again
    kept = CachedModel(Silent(model), store).reply_beliefs(replies(model), weights)
    for one, reply, other in zip(found, replies(model), kept, strict=True):
        (states,) = model.capture_replies([reply])
        np.testing.assert_allclose(one[:, 0], belief(axes.harmful, states), atol=1e-5)
        np.testing.assert_array_equal(one, other)


def test_other_axes_are_read_anew(model, open_store, axes):
    store = open_store()
    reader = Reading(model)
    for axis in (axes.harmful, axes.refuse):
        CachedModel(reader, store).reply_beliefs(replies(model), belief_weights(axis)[None])
    assert reader.read == 10
