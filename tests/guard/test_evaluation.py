"""Evaluation of verdicts on labelled prompts, against counts made by hand."""

from dataclasses import replace

import pytest

from latentguard.errors import PromptError
from latentguard.guard.evaluation import compare, comparison_table, evaluate, require_labels
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt


def verdict(score, threshold=0.5):
    return Verdict("", score, 0.5, score > threshold, {})


PROMPTS = [
    Prompt("a", id="a", harmful=True, category="fraud", segment="en"),
    Prompt("b", id="b", harmful=True, category="fraud,hate", segment="en"),
    Prompt("c", id="c", harmful=True, category="hate", segment="de"),
    Prompt("d", id="d", harmful=False, segment="en"),
    Prompt("e", id="e", harmful=False, category="fraud", segment="de"),
]
SCORES = [0.9, 0.3, 0.6, 0.1, 0.7]
VERDICTS = [verdict(score) for score in SCORES]


class TestEvaluate:
    def test_shares_are_counted_at_the_threshold(self):
        total = evaluate(PROMPTS, VERDICTS).total
        assert total.caught.n == (2, 1)
        assert total.falsely_flagged.n == (1, 1)
        assert total.auroc.value == pytest.approx(4 / 6)

    def test_a_category_has_its_harmful_prompts_against_all_harmless_ones(self):
        fraud, hate = evaluate(PROMPTS, VERDICTS).categories
        assert (fraud.name, fraud.caught.n, fraud.falsely_flagged.n) == ("fraud", (1, 1), (1, 0))
        assert fraud.auroc.value == pytest.approx(3 / 4)
        assert (hate.name, hate.caught.n, hate.falsely_flagged) == ("hate", (1, 1), None)

    def test_a_segment_has_its_own_prompts_alone(self):
        en, de = evaluate(PROMPTS, VERDICTS).segments
        assert (en.name, en.auroc.value) == ("en", 1.0)
        assert (de.name, de.auroc.value) == ("de", 0.0)

    def test_one_label_alone_has_no_auroc(self):
        harmful = evaluate(PROMPTS[:3], VERDICTS[:3])
        assert (harmful.total.auroc, harmful.total.falsely_flagged) == (None, None)
        assert "| all | 3 | 0.667" in harmful.tables()[0].markdown()

    def test_every_row_needs_a_label(self):
        with pytest.raises(PromptError, match=r"Prompt 2 \('b'\) has no label"):
            require_labels([PROMPTS[0], replace(PROMPTS[1], harmful=None)])

    def test_many_prompts_need_no_table_of_pairs(self, monkeypatch):
        by_pairs = evaluate(PROMPTS, VERDICTS).total.auroc
        monkeypatch.setattr("latentguard.guard.evaluation.MAX_PAIRS", 0)
        assert evaluate(PROMPTS, VERDICTS).total.auroc.value == by_pairs.value


class TestCompare:
    def test_a_fall_in_detection_is_worse(self):
        prompts = [Prompt(str(n), harmful=True) for n in range(60)]
        before = [verdict(n < 37) for n in range(60)]
        after = [verdict(n < 21) for n in range(60)]
        (change,) = compare(prompts, before, after)
        assert str(change) == "caught 21 of 60 instead of 37 of 60"
        assert change.is_worse
        assert not compare(prompts, after, before)[0].is_worse
        assert "| all | caught | 0.617" in comparison_table([change], "").markdown()

    def test_more_false_alarms_are_worse(self):
        prompts = [Prompt(str(n), harmful=False) for n in range(60)]
        (change,) = compare(prompts, [verdict(0)] * 60, [verdict(n < 20) for n in range(60)])
        assert change.is_worse
        assert str(change) == "falsely flagged 20 of 60 instead of 0 of 60"

    def test_a_few_flips_are_no_change(self):
        prompts = [Prompt(str(n), harmful=True) for n in range(60)]
        one = [verdict(n < 30) for n in range(60)]
        assert not compare(prompts, one, [verdict(n < 29) for n in range(60)])[0].is_worse
