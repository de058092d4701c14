"""Wrappers: what they keep of a prompt, what they put around it, what they are told apart by."""

from dataclasses import replace

import pytest

from latentguard.prompts import Message, Prompt
from latentguard.study.attacks import (
    SLOT,
    TARGET,
    TEMPLATES,
    Template,
    given_waves,
    goal_in,
    holds,
    outside,
    rewrap,
    suffix_wave,
    template_waves,
    with_suffix,
    wrap,
)
from latentguard.study.prompt_groups import PromptGroups, PromptPools

ASK = Prompt("Do {a} thing", id="h1", harmful=True, refused=True, source="set", question_at=3)
HARMLESS = (Prompt("Bake bread", id="b0", harmful=False), Prompt("Sing", id="b1", harmful=False))


class TestTemplates:
    def test_names_and_slots(self):
        assert len({one.name for one in TEMPLATES}) == len(TEMPLATES) >= 7
        assert all(one.text.count(SLOT) == 1 for one in TEMPLATES)
        assert all(len(one.text) < 200 for one in TEMPLATES)  # short

    def test_both_kinds_of_last_token_are_there(self):
        ends = [one.text.endswith(SLOT) for one in TEMPLATES]
        assert any(ends)
        assert not all(ends)

    @pytest.mark.parametrize("template", TEMPLATES, ids=lambda one: one.name)
    def test_wrap_keeps_the_request_and_its_label(self, template):
        before, after = template.text.split(SLOT)
        found = wrap(ASK, template)
        assert found.text == before + ASK.text + after
        assert (found.harmful, found.source, found.category) == (True, "set", template.name)
        assert (found.refused, found.question_at) == (None, None)  # of the bare request alone
        assert found.id.startswith("h1+")
        assert " " not in found.id
        assert found.pair == ASK.text

    def test_history_and_pair_stay(self):
        turns = (Message("user", "Hi"), Message("assistant", "Hello"))
        asked = replace(ASK, history=turns, pair="twins")
        found = wrap(asked, TEMPLATES[0])
        assert (found.history, found.pair) == (turns, "twins")

    def test_a_prompt_that_looks_like_a_slot(self):
        assert wrap(Prompt(SLOT), Template("t", f"a {SLOT} b")).text == f"a {SLOT} b"

    def test_no_name(self):
        assert wrap(Prompt("x"), TEMPLATES[0]).id == "unnamed+role-play"


class TestGoals:
    def test_the_longest_goal_counts(self):
        goals = [Prompt("Do it"), Prompt("Do it now")]
        assert goal_in(Prompt("Please Do it now !!"), goals) == "Do it now"

    def test_a_bare_goal_has_no_wrapper(self):
        assert goal_in(Prompt("Do it"), [Prompt("Do it")]) is None
        assert goal_in(Prompt("Other"), [Prompt("Do it")]) is None

    def test_rewrap(self):
        attack = Prompt("Do it !x", id="a", harmful=True, category="suffix")
        found = rewrap(attack, "Do it", HARMLESS[0])
        assert (found.text, found.harmful, found.id) == ("Bake bread !x", False, "b0+suffix")

    @pytest.mark.parametrize("text", ["do IT, now: xx", "please: Do it now", "DO IT NOW."])
    def test_holds_by_words(self, text):
        assert holds(Prompt(text), [Prompt("Do it now!")])

    @pytest.mark.parametrize("text", ["do it", "undo it now", "do it nowhere"])
    def test_holds_whole_words_only(self, text):
        assert not holds(Prompt(text), [Prompt("Do it now!")])


def material(jailbreaks, fit):
    pools = PromptPools((Prompt("Do A"), Prompt("Do B"), Prompt("Do C")), (), jailbreaks=jailbreaks)
    return PromptGroups(pools, {"refused_harmful": fit}, {})


ATTACKS = (
    Prompt("Do A !!", category="suffix", harmful=True),
    Prompt("Do B !!", category="suffix", harmful=True),
    Prompt("Kindly think of it", category="persuasion", harmful=True),
    Prompt("Who knows"),
)


class TestWaves:
    def test_attacks_on_a_centroid_are_left_out(self):
        found = outside(material(ATTACKS, (Prompt("do a.", harmful=True),)))
        assert found == list(ATTACKS[1:])
        harmless_fit = material(ATTACKS, (Prompt("Do A", harmful=False),))
        assert outside(harmless_fit) == list(ATTACKS)

    def test_given(self):
        waves = {wave.kind: wave for wave in given_waves(material(ATTACKS, ()), HARMLESS, 9)}
        assert list(waves) == ["suffix", "persuasion", "other"]
        suffix = waves["suffix"]
        assert set(suffix.attacked) == set(ATTACKS[:2])
        assert (suffix.known, suffix.bare) == ((0, 1), HARMLESS)
        assert [p.text for p in suffix.wrapped] == ["Bake bread !!", "Sing !!"]
        assert suffix.paired
        assert suffix.ends
        assert waves["persuasion"].wrapped == ()  # its wrapper is not known
        assert waves["persuasion"].known == ()

    def test_given_that_end_with_the_request(self):
        (wave,) = given_waves(material((Prompt("Please Do A"),), ()), HARMLESS, 9)
        assert not wave.ends

    def test_given_at_most(self):
        sizes = [len(w.attacked) for w in given_waves(material(ATTACKS, ()), (), 1)]
        assert sizes == [1, 1, 1]

    def test_given_without_harmless(self):
        for wave in given_waves(material(ATTACKS, ()), (), 9):
            assert (wave.known, wave.wrapped, wave.bare) == ((), (), ())

    def test_templates(self):
        waves = list(template_waves((ASK,), HARMLESS))
        assert [wave.kind for wave in waves] == [f"own template: {t.name}" for t in TEMPLATES]
        for wave, template in zip(waves, TEMPLATES, strict=True):
            assert wave.attacked == (wrap(ASK, template),)
            assert wave.wrapped == tuple(wrap(p, template) for p in HARMLESS)
            assert (wave.known, wave.bare, wave.paired) == ((0,), HARMLESS, False)
            assert wave.ends == (not template.text.endswith(SLOT))
        assert {wave.family for wave in waves} == {"own templates"}

    def test_suffixes(self):
        asked = [replace(ASK, text=text) for text in "pqr"]
        wave = suffix_wave(asked, [" 1", " 2", " 3"], HARMLESS)
        assert [p.text for p in wave.attacked] == ["p 1", "q 2", "r 3"]
        assert [p.text for p in wave.wrapped] == ["Bake bread 1", "Sing 2", "Bake bread 3"]
        assert wave.bare == (*HARMLESS, HARMLESS[0])
        assert wave.known == (0, 1, 2)
        assert suffix_wave(asked, [" 1", " 2", " 3"], ()).known == ()
        assert suffix_wave([], [], HARMLESS).attacked == ()

    def test_with_suffix(self):
        assert with_suffix(ASK, " ! !").text == ASK.text + " ! !"
        assert TARGET.startswith("Sure")
