"""Beliefs along the reply: planted records, and planted worlds end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest

from latentguard.prompts import Prompt, Reply
from latentguard.study.cached_model import CachedModel
from latentguard.study.figures import beyond_replies
from latentguard.study.figures.beyond_replies.changes import (
    ACCEPTED,
    ANOTHER,
    HARMLESS,
    JAILBROKEN,
    OF_HARMLESS,
    OWN,
    REFUSED,
    Records,
    ReplyGroup,
    answer,
    change_of,
    last_third,
)
from latentguard.study.figures.beyond_replies.collect import DRAWS, READINGS, other_replies
from latentguard.study.forecast import planned_replies
from latentguard.study.store import Store
from models.reply_worlds import WORLDS, reply_world
from study.figures.planted import Silent
from study.figures.worlds import SETTINGS, begins_refusing, planted_groups, tables

LONG = replace(SETTINGS, reply_tokens=6)
TOKENS = 9


def along(end, n=20, *, seed=0, beliefs=2, random=0.02):
    """Beliefs of n replies that go from 0 to ``end``, and random axes that go nowhere."""
    noise = np.random.default_rng(seed)
    values = noise.normal(0, random, (n, TOKENS + 1, 1 + DRAWS, beliefs))
    values[:, :, 0] += np.linspace(0, end, TOKENS + 1)[None, :, None]
    return values


def group(own, *, another=None, harmless=None, n=20, **how):
    ends = {OWN: own, ANOTHER: own if another is None else another, OF_HARMLESS: harmless}
    beliefs = {
        whose: along(end, n, seed=seed, **how)
        for seed, (whose, end) in enumerate(ends.items())
        if end is not None
    }
    names = tuple(f"{own} {k}" for k in range(n))
    return ReplyGroup(
        names, names, np.zeros((n, 1 + DRAWS, 2))[..., : how.get("beliefs", 2)], beliefs
    )


def found(accepted, harmless=0.0, **others):
    groups = {ACCEPTED: group(accepted, **others), HARMLESS: group(harmless)}
    return answer(change_of(groups[ACCEPTED], 0, groups[HARMLESS]))


class TestAnswer:
    def test_a_rise_is_found(self):
        assert found(0.5).startswith("yes, more than along accepted harmless replies")

    def test_it_says_whether_the_words_of_the_reply_do_it(self):
        pair = {ACCEPTED: group(0.5, harmless=0.0), "same": group(0.5, harmless=0.5)}
        reference = group(0.0)
        words, same = (answer(change_of(one, 0, reference)) for one in pair.values())
        assert words.endswith("the words of the reply count")
        assert same.endswith("and also with a harmless prompt's reply")

    def test_what_stays_is_not_found(self):
        assert found(0.0) == "no clear change"

    def test_what_falls_is_not_found(self):
        assert found(-0.5, harmless=-0.5) == "no, it falls"
        assert found(-0.2, harmless=-0.5).endswith("less than along accepted harmless replies")

    def test_a_rise_that_harmless_replies_share_is_not_found(self):
        assert found(0.5, harmless=0.5) == (
            "it rises, but not clearly more than along accepted harmless replies"
        )

    def test_a_rise_no_further_than_along_random_directions_is_not_found(self):
        change = change_of(group(0.5), 0, group(0.0))
        wide = replace(change.chance_excess, low=-0.9, high=0.9)
        assert "no more than random directions" in answer(replace(change, chance_excess=wide))

    def test_without_harmless_replies_nothing_is_said(self):
        assert "too few harmless replies" in answer(change_of(group(0.5), 0, None))


def test_the_last_third_is_of_each_replys_own_tokens():
    values = np.full((4, 8), np.nan)
    values[0] = [9, 0, 0, 0, 0, 0, 3, 6]  # 7 tokens: the last 3
    values[1, :4] = [9, 1, 1, 5]
    values[2, :2] = [9, 4]
    values[3, 0] = 9
    np.testing.assert_array_equal(last_third(values), [3, 5, 4, np.nan])


def test_the_other_reply_is_of_another_request_and_says_something_else():
    def reply(request, *ids):
        return Reply(Prompt(f"attack on {request}", pair=request), "", ids)

    replies = [reply("a", 1), reply("a", 2), reply("b", 1), reply("c", 3)]
    others = other_replies(replies)
    assert [one.ids for one in others] == [(3,), (1,), (3,), (1,)]
    assert [one.prompt for one in others] == [one.prompt for one in replies]
    assert other_replies(replies[:2]) == [None, None]


class TestFinding:
    def records(self, **groups):
        names = {REFUSED: group(0.1), ACCEPTED: group(0.5), JAILBROKEN: group(0.0)}
        return Records(names | {HARMLESS: group(0.0)} | groups, "planted")

    def test_the_caption_answers_with_numbers(self):
        finding = beyond_replies.analyse(self.records(), SETTINGS)
        caption = finding.section.parts[0].caption
        assert caption.startswith("Does \u0394 harmful rise while the model complies? Accepted")
        assert "jailbroken: no clear change" in caption and "20 accepted harmful" in caption
        effect = finding.effects["change of \u0394 harmful along the reply: accepted harmful"]
        assert effect.low < 0.44 < effect.high and effect.n == (20, 0)
        assert not finding.caveats

    def test_each_group_has_its_controls(self):
        finding = beyond_replies.analyse(self.records(), SETTINGS)
        rows = {
            row[:3]: row[3:]
            for row in tables(finding)["Change along the reply beside controls"].rows
        }
        own = rows[ACCEPTED, "\u0394 harmful", "own reply"]
        beyond = rows[ACCEPTED, "\u0394 harmful", "own less accepted harmless replies"]
        chance = rows[ACCEPTED, "\u0394 harmful", "random directions"]
        another = rows[ACCEPTED, "\u0394 harmful", f"own less {ANOTHER}"]
        assert own[0] == pytest.approx(0.44, abs=0.02) and beyond[0] == pytest.approx(
            0.44, abs=0.02
        )
        assert chance[1] < 0 < chance[2] and chance[3] == DRAWS
        assert another[1] < 0 < another[2] and beyond[3] == 40

    def test_an_empty_or_small_group_is_named_and_concludes_nothing(self):
        for few in (0, 3):
            records = self.records(**{JAILBROKEN: group(0.5, n=few)})
            finding = beyond_replies.analyse(records, SETTINGS)
            assert f"jailbroken: {few} are too few to say" in finding.section.parts[0].caption
            assert f"{few} jailbroken prompts are too few" in finding.caveats[0]
            assert not any(JAILBROKEN in name for name in finding.effects)

    def test_without_harmless_replies_nothing_is_compared(self):
        finding = beyond_replies.analyse(self.records(**{HARMLESS: group(0.0, n=0)}), SETTINGS)
        figures = [part for part in finding.section.parts if hasattr(part, "plot")]
        assert "too few harmless replies" in figures[0].caption
        names = [one.name for figure in figures for one in figure.series]
        assert names and not any("less accepted harmless" in name for name in names)

    def test_nothing_at_all(self):
        empty = {name: group(0.0, n=0) for name in (REFUSED, ACCEPTED, JAILBROKEN, HARMLESS)}
        finding = beyond_replies.analyse(Records(empty, "planted"), SETTINGS)
        assert not finding.section.parts and not finding.effects and len(finding.caveats) == 4

    def test_without_a_refusal_axis_one_belief_is_read(self):
        names = (REFUSED, ACCEPTED, JAILBROKEN, HARMLESS)
        records = Records({name: group(0.1, beliefs=1) for name in names}, "planted")
        finding = beyond_replies.analyse(records, SETTINGS)
        assert "refusal axis" in finding.caveats[-1]
        assert {row[1] for row in tables(finding)["Beliefs along the reply by group"].rows} == {
            "\u0394 harmful"
        }

    def test_a_curve_ends_where_half_of_the_replies_do(self):
        short = group(0.1)
        for values in short.beliefs.values():
            values[:12, 5:] = np.nan
        finding = beyond_replies.analyse(self.records(**{REFUSED: short}), SETTINGS)
        lengths = {one.name: len(one.places) for one in finding.section.parts[0].series}
        assert lengths["refused harmful, as read"] == 5
        assert lengths["accepted harmful, less accepted harmless replies"] == TOKENS + 1
        drawn = {t.name: len(t.x) for t in finding.section.parts[0].plot.data if t.name}
        assert drawn[REFUSED] == 5


@pytest.fixture(scope="module")
def worlds(tokenizer, tmp_path_factory):
    """Of each world its records, and whether a second look asks the model nothing."""
    made = {}
    for name in WORLDS:
        store = Store(tmp_path_factory.mktemp("worlds") / f"{name}.sqlite")
        model = CachedModel(reply_world(name, tokenizer), store, judge=begins_refusing)
        made[name] = beyond_replies.collect(model, planted_groups(), LONG)
        model.uncached = Silent(model.uncached)
        again = beyond_replies.collect(model, planted_groups(), LONG)
        for of, other in zip(made[name].groups.values(), again.groups.values(), strict=True):
            np.testing.assert_array_equal(of.beliefs[OWN], other.beliefs[OWN])
        store.close()
    return made


def answers(records):
    harmless = records.groups[HARMLESS]
    names = (ACCEPTED, JAILBROKEN)
    return [answer(change_of(records.groups[name], 0, harmless)) for name in names]


class TestWorlds:
    def test_a_belief_that_looks_back_at_the_prompt_rises_with_any_reply(self, worlds):
        for text in answers(worlds["prompt"]):
            assert text.startswith("yes") and text.endswith("also with a harmless prompt's reply")

    def test_harmful_words_of_the_reply_raise_it_and_are_named(self, worlds):
        for text in answers(worlds["words"]):
            assert text.startswith("yes") and text.endswith("the words of the reply count")
        change = change_of(worlds["words"].groups[ACCEPTED], 0, worlds["words"].groups[HARMLESS])
        theirs, difference = change.others[ANOTHER]
        assert theirs.low > 0 and abs(difference.value) < 0.1 * theirs.value

    def test_the_form_of_replies_alone_is_not_found(self, worlds):
        for text in answers(worlds["form"]):
            assert text == "it rises, but not clearly more than along accepted harmless replies"

    def test_a_belief_that_stays_is_not_found(self, worlds):
        assert not any(text.startswith("yes") for text in answers(worlds["stays"]))

    def test_the_report_holds_no_reply_and_no_prompt(self, worlds):
        finding = beyond_replies.analyse(worlds["words"], LONG)
        captions = [part.caption for part in finding.section.parts if hasattr(part, "plot")]
        rows = [part.rows for part in tables(finding).values()]
        text = json.dumps([finding.section.text, captions, rows])
        assert "SXX" not in text and "tells me of" not in text

    def test_all_groups_are_there(self, worlds):
        counts = {name: len(of) for name, of in worlds["prompt"].groups.items()}
        assert counts == {REFUSED: 12, ACCEPTED: 12, JAILBROKEN: 84, HARMLESS: 12}


class Counting:
    """A model that counts the replies that it reads and makes."""

    def __init__(self, model):
        self.model, self.read, self.made = model, 0, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def capture_replies(self, replies):
        self.read += len(replies)
        return self.model.capture_replies(replies)

    def sweep(self, prompts, interventions, **how):
        self.made += len(prompts) * len(interventions)
        return self.model.sweep(prompts, interventions, **how)


def test_the_forecast_counts_what_is_read_and_asked(cached_model, prompt_groups, settings):
    cached_model.judge = begins_refusing  # nothing is refused
    counting = cached_model.uncached = Counting(cached_model.uncached)
    beyond_replies.collect(cached_model, prompt_groups, settings)
    _, asked, read = planned_replies(cached_model, prompt_groups.pools, settings, only=["replies"])
    assert read == (READINGS * settings.test, 1, False) and 0.5 < read[0] / counting.read < 2
    plain = 3 * settings.test  # these are asked by the labelling
    assert asked == (counting.made - plain, settings.reply_tokens, False)
    both = ["jailbreaks", "replies"]  # Figure 6 asks the attacks
    *_, asked, _ = planned_replies(cached_model, prompt_groups.pools, settings, only=both)
    assert asked == (0, settings.reply_tokens, False)
