"""Figures 13 to 16: planted positions and answers, and the tiny model end to end."""

from dataclasses import replace

import numpy as np
import pytest

from latentguard.prompts import Reply
from latentguard.study.cached_model import CachedModel
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
        beliefs[group] = {}
        for at, sign in zip(POSITIONS, signs, strict=True):
            beliefs[group][at] = s_of(sign, n, depth, rng)
    steered = [Steered("", -1, ("no",) * n)]
    for layer in (4, 12):
        for along, share in (*zip(POSITIONS, certainly, strict=True), ("random", 0), ("random", 0)):
            yes = round(share * n)
            steered.append(Steered(along, layer, ("certainly",) * yes + ("other",) * (n - yes)))
    return Records(POSITIONS, beliefs, tuple(steered), (0.5, 0.8, 1.0, 1.5, 2.0), "planted")


def s_of(sign, n, depth, rng):
    """s of n prompts at one position: of one sign at the middle layers."""
    s = np.zeros((n, depth + 1))
    s[:, 9:21] = sign * 0.1
    return s + 0.001 * rng.standard_normal(s.shape)


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
    placed = records.beliefs["accepted_harmful"]
    assert tuple(placed) == records.positions == records.places
    assert placed["t_post"].shape == (6, cached_model.depth + 1)
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
    for group, placed in records.beliefs.items():
        for at, s in placed.items():
            np.testing.assert_array_equal(s, again.beliefs[group][at])


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
    np.testing.assert_allclose(records.beliefs["accepted_harmful"]["t_post"], expected, atol=1e-5)


def test_a_model_that_refuses_nothing(cached_model, prompt_groups, alone):
    cached_model.uncached = Planted(cached_model.uncached, lambda p, one: "")
    fit = {g: tuple(replace(p, refused=False) for p in of) for g, of in prompt_groups.fit.items()}
    fit["accepted_harmful"], fit["refused_harmful"] = fit["refused_harmful"], ()
    test = {"accepted_harmful": prompt_groups.test["accepted_harmful"]}
    bare = replace(prompt_groups, fit=fit, test=test)
    finding = analyse(collect(cached_model, bare, alone), alone)
    assert len(finding.caveats) == 2 and not finding.effects


class TestModelsThatThink:
    """Replies that think are planted; the tiny model reads them."""

    @pytest.fixture
    def thinker(self, cached_model, monkeypatch):
        monkeypatch.setattr(type(cached_model.uncached), "may_think", True)
        model = Thinker(cached_model.uncached)
        return CachedModel(model, cached_model.store)

    def test_both_ends_of_the_thinking_are_rows_of_their_own(self, thinker, prompt_groups, alone):
        records = collect(thinker, prompt_groups, alone)
        assert records.places == (*records.positions, "last thought", "after thinking")
        assert records.thinking == {
            "fitted refused harmful": 6,
            "fitted accepted harmless": 6,
            "tested accepted harmful": 6,
            "tested refused harmless": 6,
        }
        finding = analyse(records, alone)
        rows = {row[0]: row for row in tables(finding)["Clusters at every position"].rows}
        assert rows["last thought"][4] == rows["after thinking"][8] == 6
        assert "'last thought' is the last token" in finding.section.text
        steered = tables(finding)["Answers by position of the direction"].rows
        assert not {"last thought", "after thinking"} & {row[0] for row in steered}

    def test_the_thought_is_read_where_the_label_is_planted_in_it(
        self, thinker, prompt_groups, alone
    ):
        records = collect(thinker, prompt_groups, alone)
        harmful, harmless = (
            records.beliefs[g]["last thought"][:, 0]  # the embedding of the token itself
            for g in ("accepted_harmful", "refused_harmless")
        )
        assert harmful.min() > 0 > harmless.max()

    def test_too_few_thoughts_are_a_caveat(self, thinker, prompt_groups, alone):
        thinker.uncached.thinks = lambda prompt: prompt.harmful
        records = collect(thinker, prompt_groups, alone)
        assert records.places == records.positions
        (caveat,) = [c for c in analyse(records, alone).caveats if c.startswith("Thinking")]
        assert "6 fitted refused harmful, 0 fitted accepted harmless" in caveat
        assert "set 'reply_tokens' above 4" in caveat

    def test_a_killed_run_reads_no_thought_twice(self, thinker, prompt_groups, alone):
        first = collect(thinker, prompt_groups, alone)
        thinker.uncached = Silent(thinker.uncached)
        again = collect(thinker, prompt_groups, alone)
        for at in ("last thought", "after thinking"):
            one, other = (r.beliefs["accepted_harmful"][at] for r in (first, again))
            np.testing.assert_array_equal(one, other)

    def test_a_model_without_thinking_in_its_template_is_not_asked(
        self, cached_model, prompt_groups, alone
    ):
        cached_model.uncached = Thinker(cached_model.uncached)
        records = collect(cached_model, prompt_groups, alone)
        assert records.places == records.positions and not records.thinking


class Thinker:
    """A model whose thoughts name the label of the prompt; what it refuses is by its group."""

    def __init__(self, model):
        self.model, self.thinks = model, lambda prompt: True

    def __getattr__(self, name):
        return getattr(self.model, name)

    def sweep(self, prompts, interventions, *, watch=(), **how):
        return [[self._reply(p, one, watch) for p in prompts] for one in interventions]

    def _reply(self, prompt, one, watch):
        thought = "They ask 7" if prompt.harmful else "They ask 2"
        text = f"{thought}</think> No." if self.thinks(prompt) else "No."
        ids = tuple(self.model.tokenizer.encode(text, add_special_tokens=False))
        watched = tuple((word, -1.0) for word in watch)
        return Reply(prompt, text, ids, True, one.label if one else "", watched)
