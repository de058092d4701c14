"""Before an hour is spent: what the model refuses, what can be decided, how long it takes."""

from dataclasses import replace

import pytest

from latentguard.study import forecast as module
from latentguard.study.claims import CLAIMS
from latentguard.study.figures import (
    figure_04_steering,
    figure_05_inversion,
    figure_13_positions,
)
from latentguard.study.forecast import Forecast, forecast, planned_replies, spoken
from latentguard.study.prompt_groups import contrast_pools


def planted(model, *, refuses):
    """The model with a judge that goes by the label."""
    model.judge = lambda reply: "refused" if reply.prompt.harmful in refuses else "accepted"
    return model


@pytest.fixture
def pools():
    return contrast_pools()


def test_it_says_how_many_are_refused_and_which_claims_can_decide(cached_model, pools, settings):
    found = forecast(planted(cached_model, refuses={True}), pools, settings)
    assert found.refused["harmful"].value == 1 and found.refused["harmless"].value == 0
    assert found.groups["refused_harmful"] == 24  # 12 asked of two pools
    assert found.groups["refused_harmless"] == 0
    assert found.missing("clusters") == ("accepted_harmful", "refused_harmless")
    assert found.missing("steering") == ()
    text = "\n".join(found.lines())
    assert "harmful: 12 of 12 sampled prompts are refused" in text
    able = next(line for line in found.lines() if line.startswith("claims that can decide"))
    numbers = set(able.partition(": ")[2].split(", "))
    assert "4" in numbers and not numbers & {"2", "3"}
    assert "about 0 refused harmless prompts, 2 are needed" in text


def test_a_model_that_refuses_nothing_is_told_before_the_study(cached_model, pools, settings):
    found = forecast(planted(cached_model, refuses=set()), pools, settings)
    able = next(line for line in found.lines() if line.startswith("claims that can decide"))
    centroids = {str(n) for n, claim in enumerate(CLAIMS, 1) if claim.centroids}
    assert not set(able.partition(": ")[2].split(", ")) & centroids


def test_the_replies_are_taken_from_the_store_by_labelling(cached_model, pools, settings):
    from latentguard.study import labelling

    model = planted(cached_model, refuses={True})
    forecast(model, pools, settings)
    asked = []
    sweep = model.uncached.sweep
    model.uncached = Counting(model.uncached, sweep, asked)
    labelling.collect(model, pools, replace(settings, asked=module.SAMPLE))
    assert asked == []


def test_the_time_is_of_the_whole_study(cached_model, pools, settings):
    ticks = iter((0.0, 6.0, 10.0, 22.0))  # the sweep of replies, then that of answers
    found = forecast(planted(cached_model, refuses={True}), pools, settings, clock=ticks.__next__)
    planned = list(planned_replies(cached_model, pools, settings))
    timed = 2 * module.TIMED * module.TIMED_LAYERS
    seconds = {
        False: 6 / timed / (settings.reply_tokens + module.READING),
        True: 12 / timed / (settings.inversion_tokens + module.READING),
    }
    expected = sum(n * (length + module.READING) * seconds[kind] for n, length, kind in planned)
    assert found.seconds == pytest.approx(expected)
    assert found.replies == sum(one.replies for one in planned)
    assert "in all on this machine" in list(found.lines())[-1]


@pytest.mark.parametrize(
    ("name", "experiment"),
    [
        ("steering", figure_04_steering),
        ("inversion", figure_05_inversion),
        ("positions", figure_13_positions),
    ],
)
def test_planned_replies_are_about_those_that_are_made(
    cached_model, prompt_groups, settings, name, experiment
):
    asked = []
    cached_model.uncached = Counting(cached_model.uncached, cached_model.uncached.sweep, asked)
    experiment.collect(cached_model, prompt_groups, settings)
    _, *rest = planned_replies(cached_model, prompt_groups.pools, settings, only=[name])
    planned = sum(one.replies for one in rest)
    assert 0.5 < planned / sum(asked) < 2


class Counting:
    """A model that notes how many replies it makes."""

    def __init__(self, model, sweep, asked):
        self._model, self._sweep, self._asked = model, sweep, asked

    def __getattr__(self, name):
        return getattr(self._model, name)

    def sweep(self, prompts, interventions, **how):
        prompts, interventions = tuple(prompts), tuple(interventions)
        self._asked.append(len(prompts) * len(interventions))
        return self._sweep(prompts, interventions, **how)


def test_only_the_claims_of_what_runs_are_named(cached_model, pools, settings):
    found = forecast(planted(cached_model, refuses={True}), pools, settings, only=["template"])
    lines = list(found.lines(["template"]))
    assert "claims that can decide: 1" in lines
    assert not any("hardly" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(20, "about a minute"), (1200, "about 20 minutes"), (9000, "about 2.5 hours")],
)
def test_durations_in_words(seconds, words):
    assert spoken(seconds) == words


def test_a_forecast_without_any_prompt_still_speaks():
    lines = list(
        Forecast(
            {}, dict.fromkeys(module.LABELS["harmful"] + module.LABELS["harmless"], 0), 10, 0.0, 0
        ).lines()
    )
    assert lines[0] == "claims that can decide: 8"
