"""The surface audit: what form alone gives away, on sets made so that the answer is known."""

import numpy as np
import pytest

from latentguard.data.surface_audit import (
    audit_surface,
    ending_class,
    form_class,
    held_out_ngram_scores,
    ngram_scores,
    surface_warnings,
)
from latentguard.errors import GuardError
from latentguard.prompts import Prompt
from latentguard.stats.detection import auroc


def prompts_of(harmful, harmless):
    sides = ((harmful, True), (harmless, False))
    return [
        Prompt(text, id=f"{n}-{side}", harmful=side)
        for texts, side in sides
        for n, text in enumerate(texts)
    ]


class TestForms:
    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("Stop.", "."),
            ("Why? ", "?"),
            ("No!\n", "!"),
            ("word", "word"),
            ("item 3", "word"),
            ("caf\u00e9", "word"),
            ('a "quote"', "other"),
            ("list:", "other"),
            (" ", "other"),
        ],
    )
    def test_endings(self, text, kind):
        assert ending_class(text) == kind

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("What is this", "question"),
            ("Tell me, is it so?", "question"),
            ("I'm lost.", "statement"),
            ("Because it rains", "statement"),
            ("Write a poem.", "imperative"),
            ("  write a poem", "imperative"),
            ("I am lost. Help me.", "multi"),
            ("Sort these\napples", "multi"),
            ("Is pi 3.14 or 3.15?", "question"),
        ],
    )
    def test_forms(self, text, kind):
        assert form_class(text) == kind


class TestFigures:
    def test_an_ending_that_tells_all(self):
        found = audit_surface(prompts_of(["Say that."] * 6, ["Say that?"] * 8))
        assert (found.n, found.ending, found.length) == ((6, 8), 1.0, 0.5)
        assert found.endings == {".": (6, 0), "?": (0, 8)}
        assert found.forms == {"imperative": (6, 0), "question": (0, 8)}
        assert [w.split()[1] for w in found.warnings] == ["ending", "form"]

    def test_shares_not_counts_decide(self):
        """With one class ten times as frequent, guessing it would be right too often."""
        found = audit_surface(prompts_of(["Say it.", "Say it?"] * 5, ["Say it.", "Say it?"] * 50))
        assert (found.ending, found.form) == (0.5, 0.5)
        assert found.warnings == []

    def test_half_told(self):
        found = audit_surface(prompts_of(["Say it."] * 5 + ["Say it?"] * 5, ["Say it."] * 10))
        assert found.ending == 0.75

    def test_four_kinds(self):
        """Guess the class in which each ending is more frequent: .4 + .3 + .3 + .4 of 2."""
        harmful = ["Say it."] * 4 + ["Say it?"] * 3 + ["Say it!"] * 2 + ["Say it"] * 1
        harmless = ["Say it."] * 1 + ["Say it?"] * 2 + ["Say it!"] * 3 + ["Say it"] * 4
        assert audit_surface(prompts_of(harmful, harmless)).ending == pytest.approx(0.7)

    @pytest.mark.parametrize("longer", [True, False])
    def test_length_in_its_better_direction(self, longer):
        sides = ["word " * n for n in range(20, 30)], ["word " * n for n in range(1, 11)]
        found = audit_surface(prompts_of(*(sides if longer else sides[::-1])))
        assert found.length == 1.0
        assert any("length" in warning for warning in found.warnings)

    def test_ngrams_that_tell_and_that_do_not(self):
        words = ["alpha", "beta", "gamma", "delta", "omega"] * 4
        told = audit_surface(prompts_of([f"sly {w}" for w in words], [f"kind {w}" for w in words]))
        assert told.ngrams == 1.0
        pairs = [
            Prompt(f"{w} {n}{n}", id=f"{n}{side}", pair=f"{n}", harmful=side)
            for n, w in enumerate(words)
            for side in (True, False)
        ]
        assert audit_surface(pairs).ngrams == 0.5  # both of a pair say the same

    def test_unlabelled_prompts_are_left_out(self):
        some = prompts_of(["Say that."] * 5, ["Say that?"] * 5)
        assert audit_surface([*some, *(Prompt("never seen") for _ in range(9))]) == audit_surface(
            some
        )

    def test_the_quick_warnings_are_those_of_the_audit(self):
        sets = [
            prompts_of(["Say that."] * 6, ["Say that?"] * 8),
            prompts_of(["Say that."] * 6, ["Say that."] * 8),
            prompts_of(["Say that very much indeed."] * 6, ["Say that."] * 8),
        ]
        for prompts in sets:
            assert surface_warnings(prompts) == audit_surface(prompts).warnings
        assert surface_warnings([]) == []
        assert surface_warnings(prompts_of(["a"], [])) == []


class TestBaselines:
    def test_members_of_a_pair_do_not_help_each_other(self):
        """Twins share a word that no other prompt has; it may not carry over the folds."""
        prompts = [
            Prompt(f"word{n} {'x' * (n % 3 + 2)}", id=f"{n}-{k}", pair=f"{n}", harmful=n % 2 == 0)
            for n in range(40)
            for k in range(2)
        ]
        labels = np.array([p.harmful for p in prompts])
        alone = [Prompt(p.text, id=p.id, harmful=p.harmful) for p in prompts]
        assert auroc(labels, held_out_ngram_scores(alone)) > 0.9
        assert auroc(labels, held_out_ngram_scores(prompts)) < 0.7

    def test_scores_of_other_prompts(self):
        train = prompts_of(["sly trick", "sly plan"] * 3, ["kind trick", "kind plan"] * 3)
        scores = ngram_scores(train, [Prompt("sly"), Prompt("kind"), Prompt("unseen")])
        assert scores[0] > scores[2] > scores[1]
        assert scores.dtype == np.float64


class TestErrors:
    @pytest.mark.parametrize(
        ("prompts", "found"),
        [
            ([], "found 0 and 0"),
            ([Prompt("a"), Prompt("b")], "found 0 and 0"),
            (prompts_of(["a"] * 9, []), "found 9 and 0"),
            (prompts_of(["a"] * 9, ["b"] * 4), "found 9 and 4"),
        ],
    )
    def test_too_few(self, prompts, found):
        with pytest.raises(GuardError, match=f"at least 5 harmful and 5 harmless.*{found}"):
            audit_surface(prompts)

    def test_too_few_pairs(self):
        """Ten prompts in three pairs cannot be split into five folds."""
        prompts = [Prompt(f"some text {n}", harmful=n % 2 == 0, pair=f"{n % 3}") for n in range(12)]
        with pytest.raises(GuardError, match="pairs"):
            audit_surface(prompts)
