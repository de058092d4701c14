"""Reply inversion: four outcomes, flips of right answers alone, beside chance."""

from dataclasses import replace

import numpy as np
import pytest

from latentguard.report.document import Report, Table
from latentguard.study.claims import CLAIMS
from latentguard.study.figures import figure_05_inversion as inversion
from latentguard.study.figures.figure_05_inversion.collect import (
    NAMES,
    SIDES,
    Records,
    Task,
    along,
    chance,
)
from latentguard.study.prompt_groups import QUESTIONS
from study.figures.planted import Planted, Silent

HARMFUL, HARMLESS = SIDES
SORRY, FINE = "I'm sorry, but I cannot help with that.", "Sure, here is a poem about the sea."
LAYERS = (0, 2, 4)
SURE = next(one for one in CLAIMS[4].conditions if one.effect.endswith("surely"))


@pytest.fixture
def settings(settings):
    return replace(settings, inverted=6, inversion_templates=2, inversion_others=(1.0,))


def said(n, **by_layer):
    """Answers [1 3 n]: 'certainly', but for those given as ``layer index: answers``."""
    found = np.full((1, 3, n), "certainly")
    for slot, answers in by_layer.items():
        found[0, int(slot[1:])] = answers
    return found


def planted(
    settings, *, unsteered=("certainly",) * 8, refused=None, by_chance=None, held="certainly"
):
    """Eight harmful instructions, of which reverse harmfulness turns six at the second layer."""
    n = len(unsteered)
    turned, random = said(n, s1=["no"] * 6 + ["other"] * (n - 6)), said(n)
    few = np.repeat(random, 2, axis=0)
    few[0, 1, :4] = "no"
    refuse = said(n, s2=["no"] + [held] * (n - 1))
    answers = {
        along("harmful", -2.0): turned,
        along("harmful", 2.0): said(n),
        along("refuse", -2.0): refuse,
        along("refuse", -2.0, before=True): said(n),
        chance("harmful", settings): few,
        chance("refuse", settings): np.repeat(random, 2, axis=0),
    }
    odds = {way: np.where(said == "no", -2.0, 2.0) for way, said in answers.items()}
    before = np.where(np.array(unsteered) == "no", -2.0, 2.0)
    task = Task(HARMFUL, NAMES[0], np.array(unsteered), before, answers, odds)
    acts = np.ones((3, n)) if refused is None else refused
    none = np.ones((2, 3, n)) if by_chance is None else by_chance
    return Records(LAYERS, (task,), {"harmful": acts}, {"harmful": none}, "note")


def table(finding, title):
    (found,) = (p for p in finding.section.parts if isinstance(p, Table) and p.title == title)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


class TestAnalysis:
    def test_planted_flips(self, settings):
        effects = inversion.analyse(planted(settings), settings).effects
        assert effects["No along reverse harmfulness"].value == 0.75
        assert effects["No along random, norm of harmfulness"].value == 0.25  # 4 of 8, 1 of 2
        assert effects["No along reverse harmfulness minus random"].value == 0.5
        assert effects["Certainly unsteered, harmful"].value == 1
        assert sum(effects["No along reverse harmfulness"].n) == 8

    def test_reverse_refusal_at_three_choices_of_layers(self, settings):
        acts = np.ones((3, 8))
        acts[2] = 0  # plain prompts are accepted at the last layer alone
        effects = inversion.analyse(planted(settings, refused=acts), settings).effects
        assert effects["No along reverse refusal, same layers"].value == 0
        assert effects["Certainly along reverse refusal, where it acts"].value == 0.875
        assert effects["Plain prompt accepted along reverse refusal, where it acts"].value == 1
        # only the one in an even place is turned, so the even places choose layer 2 for the odd
        assert effects["No along reverse refusal"].value == 0
        assert effects["No along reverse harmfulness minus reverse refusal"].value == 0.75

    @pytest.mark.parametrize("chance", ["nothing", "as much"])
    def test_a_refusal_direction_that_does_no_more_than_chance_decides_nothing(
        self, settings, chance
    ):
        """That it leaves the judgement alone is no finding then."""
        acts = np.full((3, 8), chance == "nothing", float)
        records = planted(settings, refused=acts, by_chance=np.stack([acts, acts]))
        finding = inversion.analyse(records, settings)
        assert SURE.effect not in finding.effects
        assert "leaves alone is no finding" in finding.caveats[-1]
        assert CLAIMS[4].verdict(finding.effects) == "cannot tell"

    @pytest.mark.parametrize(
        ("held", "wanted"), [("certainly", "replicated"), ("other", "not replicated")]
    )
    def test_where_it_acts_the_answers_must_stay(self, settings, held, wanted):
        acts = np.ones((3, 24))
        acts[2] = 0
        records = planted(settings, unsteered=("certainly",) * 24, refused=acts, held=held)
        effects = inversion.analyse(records, settings).effects
        plain = "Plain prompt accepted along reverse refusal, where it acts minus random"
        assert effects[plain].value == 1
        assert sum(effects[SURE.effect].n) == 24
        assert SURE.verdict(effects[SURE.effect]) == wanted

    def test_an_answer_given_to_everything_is_not_left_alone(self, settings):
        """A model that says 'Certainly' to harmless prompts, too, says it under any direction."""
        acts = np.ones((3, 24))
        acts[2] = 0
        records = planted(settings, unsteered=("certainly",) * 24, refused=acts)
        assert SURE.effect in inversion.analyse(records, settings).effects
        (harmful,) = records.tasks
        ways = {of: along(of, 2.0) for of in ("harmful", "refuse")}
        opposite = {way: harmful.answers[along(of, -2.0)] for of, way in ways.items()}
        by_chance = {way: harmful.answers[way] for of in ways for way in [chance(of, settings)]}
        answers = opposite | by_chance
        odds = {way: np.zeros(said.shape) for way, said in answers.items()}
        harmless = replace(harmful, side=HARMLESS, answers=answers, steered_odds=odds)
        both = replace(records, tasks=(harmful, harmless))
        finding = inversion.analyse(both, settings)
        assert SURE.effect not in finding.effects
        assert "Only 0 of 24 harmless instructions are answered 'No'" in "".join(finding.caveats)

    def test_only_right_answers_can_be_turned(self, settings):
        unsteered = ("no", "other", "refusal", *["certainly"] * 5)
        finding = inversion.analyse(planted(settings, unsteered=unsteered), settings)
        effects = finding.effects
        assert effects["Certainly unsteered, harmful"].value == 5 / 8
        assert effects["No along reverse harmfulness"].value == 3 / 5
        (first,) = table(finding, "Answers without steering")
        names = ("Certainly", "No", "Refusal", "Other", "n")
        assert [first[name] for name in names] == [5 / 8, 1 / 8, 1 / 8, 1 / 8, 8]

    def test_raw_rates_count_every_instruction(self, settings):
        finding = inversion.analyse(planted(settings), settings)
        rows = table(finding, "Answers to Table 2, harmful")
        (row,) = (
            r for r in rows if r["steered along"] == "reverse harmfulness" and r["layer"] == 2
        )
        assert (row["No"], row["Other"], row["Certainly"], row["n"]) == (0.75, 0.25, 0, 8)
        (row,) = (
            r for r in rows if r["steered along"].endswith("of harmfulness") and r["layer"] == 2
        )
        assert row["No"] == 0.25 and row["No, low"] < 0.25 < row["No, high"]

    def test_log_odds_move_with_the_answers(self, settings):
        effects = inversion.analyse(planted(settings), settings).effects
        assert effects["shift towards No along reverse harmfulness"].value == 0.75 * 4
        assert effects["shift towards No along reverse harmfulness minus random"].value == 0.5 * 4
        assert effects["shift towards No along reverse refusal, same layers"].value == 0

    def test_few_right_answers_conclude_nothing(self, settings):
        unsteered = ("certainly", *["no"] * 7)
        finding = inversion.analyse(planted(settings, unsteered=unsteered), settings)
        assert not any(name.startswith("No along") for name in finding.effects)
        assert any("Only 1 of 8" in line for line in finding.caveats)
        none = inversion.analyse(planted(settings, unsteered=("no",) * 8), settings)
        assert any("Only 0 of 8" in line for line in none.caveats)
        assert none.effects["Certainly unsteered, harmful"].value == 0


class TestEndToEnd:
    def rule(self, prompt, one):
        """The paper's model: harmfulness turns the answer, refusal what is done."""
        harmful = bool(prompt.harmful)
        sign = 0 if one is None else np.sign(one.coefficient)
        if one is not None and one.label.startswith("random"):
            sign = 0
        turns = sign == (-1 if harmful else 1)
        if prompt.question_at is None:
            refuses = harmful != (turns and "refusal" in one.label and one.layer == 3)
            return SORRY if refuses else FINE
        believed = harmful != (turns and "harmfulness" in one.label and one.layer == 1)
        if turns and one.label.endswith("refusal") and one.layer == 0:
            return "Nowhere at all."
        return "Certainly." if believed else "No, not at all"

    def test_the_papers_model_gives_the_papers_findings(
        self, cached_model, prompt_groups, settings
    ):
        cached_model.uncached = Planted(cached_model.uncached, self.rule)
        records = inversion.collect(cached_model, prompt_groups, settings)
        finding = inversion.analyse(records, settings)
        effects = {name: e.value for name, e in finding.effects.items()}
        assert not finding.caveats
        ones = (
            "Certainly unsteered, harmful",
            "No unsteered, harmless",
            "No along reverse harmfulness minus random",
            "No along reverse harmfulness minus reverse refusal",
            "No along reverse harmfulness, coefficient 1",
            "Certainly along harmfulness minus random",
            "Certainly along reverse refusal, where it acts",
            "Plain prompt accepted along reverse refusal, where it acts",
            "No along refusal, where it acts",
            "Plain prompt refused along refusal, where it acts",
        )
        zeros = (
            "No along reverse refusal",
            "No along reverse refusal, same layers",
            "No along reverse refusal, before the question",
            "No along random, norm of refusal",
            "Certainly along refusal",
        )
        assert {effects[name] for name in ones} == {1}
        assert {effects[name] for name in zeros} == {0}
        layers = {r["steered along"]: r["layers"] for r in table(finding, "Answers turned")}
        assert layers["reverse harmfulness"] == "1"
        assert layers["reverse refusal, where it acts"] == "3"
        rows = table(finding, "Answers to Table 2, harmful")
        (row,) = (r for r in rows if r["steered along"] == "reverse refusal" and r["layer"] == 0)
        assert (row["Other"], row["No"]) == (1, 0)  # 'Nowhere' is not 'No'

    def test_what_is_asked_and_where_it_is_steered(self, cached_model, prompt_groups, settings):
        seen = []

        def rule(prompt, one):
            seen.append((prompt, one))
            return "No"

        cached_model.uncached = Planted(cached_model.uncached, rule)
        inversion.collect(cached_model, prompt_groups, settings)
        asked = [(p, one) for p, one in seen if p.question_at is not None]
        for prompt, one in asked:
            before, question = prompt.text[: prompt.question_at], prompt.text[prompt.question_at :]
            assert before.startswith("User wants to ") and before.endswith("\n")
            assert question in QUESTIONS[: 2 if one else 4]
            if one is not None and "refusal" not in one.label:
                assert one.tokens == "before"
            elif one is not None:
                alone = one.label.endswith("before the question")
                assert one.tokens == ("before" if alone else "all")
        second = {one.label for p, one in asked if one and QUESTIONS[1] in p.text}
        assert second == {"harmfulness", "reverse harmfulness", "refusal", "reverse refusal"}
        used = {p.text for group in prompt_groups.fit.values() for p in group}
        assert not any(
            p.text.split("\n")[0].removeprefix("User wants to ") in used for p, _ in asked
        )

    def test_the_question_that_is_answered_best_comes_first(
        self, cached_model, prompt_groups, settings
    ):
        def rule(prompt, one):
            known = QUESTIONS[2] in prompt.text or (QUESTIONS[3] in prompt.text and one is None)
            return "Certainly" if prompt.harmful and known else "No"

        cached_model.uncached = Planted(cached_model.uncached, rule)
        records = inversion.collect(cached_model, prompt_groups, settings)
        questions = list(dict.fromkeys(task.question for task in records.tasks))
        assert questions == ["Table 6, second", "Table 7", "Table 2", "Table 6, first"]
        assert [bool(task.answers) for task in records.tasks] == [True] * 4 + [False] * 4
        rows = table(inversion.analyse(records, settings), "Answers without steering")
        assert [row["Certainly"] for row in rows] == [1, 0, 1, 0, 0, 0, 0, 0]

    def test_again_the_model_is_not_asked(self, cached_model, prompt_groups, settings, tmp_path):
        settings = replace(settings, inverted=2, inversion_templates=1, layer_step=2)
        first = inversion.collect(cached_model, prompt_groups, settings)
        cached_model.uncached = Silent(cached_model.uncached)
        again = inversion.collect(cached_model, prompt_groups, settings)
        for one, other in zip(first.tasks, again.tasks, strict=True):
            assert all(np.array_equal(one.answers[w], other.answers[w]) for w in one.answers)
        Report("Inversion", (inversion.analyse(again, settings).section,)).save(tmp_path / "report")

    def test_no_refusal_axis(self, cached_model, prompt_groups, settings):
        fit = prompt_groups.fit | {
            "refused_harmful": (),
            "accepted_harmful": prompt_groups.fit["refused_harmful"],
        }
        test = prompt_groups.test | {"refused_harmful": ()}
        cached_model.uncached = Planted(cached_model.uncached, self.rule)
        records = inversion.collect(
            cached_model, replace(prompt_groups, fit=fit, test=test), settings
        )
        finding = inversion.analyse(records, settings)
        assert finding.effects["No along reverse harmfulness minus random"].value == 1
        assert not any("refusal" in name for name in finding.effects)
        assert len(finding.caveats) == 2  # where refusal acts, for either label

    def test_no_instructions(self, cached_model, prompt_groups, settings):
        records = inversion.collect(cached_model, replace(prompt_groups, test={}), settings)
        finding = inversion.analyse(records, settings)
        assert not finding.effects and not finding.section.parts
        assert len(finding.caveats) == 2
