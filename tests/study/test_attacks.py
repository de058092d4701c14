"""Wrappers: what they keep of a prompt, what they put around it, what they are told apart by."""

from dataclasses import replace

import pytest

from latentguard.prompts import Message, Prompt
from latentguard.study.attacks import (
    SLOT,
    TARGET,
    TEMPLATES,
    Template,
    given_attacks,
    goal_in,
    holds,
    outside,
    rewrap,
    suffix_attacks,
    template_attacks,
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


def prompt_groups(jailbreaks, fit):
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
        found = outside(prompt_groups(ATTACKS, (Prompt("do a.", harmful=True),)))
        assert found == list(ATTACKS[1:])
        harmless_fit = prompt_groups(ATTACKS, (Prompt("Do A", harmful=False),))
        assert outside(harmless_fit) == list(ATTACKS)

    def test_given(self):
        attack_sets = {
            attack_set.kind: attack_set
            for attack_set in given_attacks(prompt_groups(ATTACKS, ()), HARMLESS, 9)
        }
        assert list(attack_sets) == ["suffix", "persuasion", "other"]
        suffix = attack_sets["suffix"]
        assert set(suffix.attacked) == set(ATTACKS[:2])
        assert (suffix.known, suffix.bare) == ((0, 1), HARMLESS)
        assert [p.text for p in suffix.wrapped] == ["Bake bread !!", "Sing !!"]
        assert suffix.paired
        assert suffix.ends
        assert attack_sets["persuasion"].wrapped == ()  # its wrapper is not known
        assert attack_sets["persuasion"].known == ()

    def test_given_that_end_with_the_request(self):
        (attack_set,) = given_attacks(prompt_groups((Prompt("Please Do A"),), ()), HARMLESS, 9)
        assert not attack_set.ends

    def test_given_at_most(self):
        sizes = [len(w.attacked) for w in given_attacks(prompt_groups(ATTACKS, ()), (), 1)]
        assert sizes == [1, 1, 1]

    def test_given_without_harmless(self):
        for attack_set in given_attacks(prompt_groups(ATTACKS, ()), (), 9):
            assert (attack_set.known, attack_set.wrapped, attack_set.bare) == ((), (), ())

    def test_templates(self):
        attack_sets = list(template_attacks((ASK,), HARMLESS))
        assert [attack_set.kind for attack_set in attack_sets] == [
            f"own template: {t.name}" for t in TEMPLATES
        ]
        for attack_set, template in zip(attack_sets, TEMPLATES, strict=True):
            assert attack_set.attacked == (wrap(ASK, template),)
            assert attack_set.wrapped == tuple(wrap(p, template) for p in HARMLESS)
            assert (attack_set.known, attack_set.bare, attack_set.paired) == ((0,), HARMLESS, False)
            assert attack_set.ends == (not template.text.endswith(SLOT))
        assert {attack_set.family for attack_set in attack_sets} == {"own templates"}

    def test_suffixes(self):
        asked = [replace(ASK, text=text) for text in "pqr"]
        attack_set = suffix_attacks(asked, [" 1", " 2", " 3"], HARMLESS)
        assert [p.text for p in attack_set.attacked] == ["p 1", "q 2", "r 3"]
        assert [p.text for p in attack_set.wrapped] == ["Bake bread 1", "Sing 2", "Bake bread 3"]
        assert attack_set.bare == (*HARMLESS, HARMLESS[0])
        assert attack_set.known == (0, 1, 2)
        assert suffix_attacks(asked, [" 1", " 2", " 3"], ()).known == ()
        assert suffix_attacks([], [], HARMLESS).attacked == ()

    def test_with_suffix(self):
        assert with_suffix(ASK, " ! !").text == ASK.text + " ! !"
        assert TARGET.startswith("Sure")
