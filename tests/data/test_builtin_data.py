"""The built-in contrast set: form-matched pairs, balanced, split by pair, fixed by id."""

import hashlib
import itertools
import json
import re
import string
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest

from latentguard.data.builtin import (
    FILES,
    load_contrast,
    load_guard_prompts,
    load_samples,
    load_training_rows,
    split_of,
)
from latentguard.data.surface_audit import audit_surface, ending_class, form_class
from latentguard.errors import PromptError
from latentguard.guard.compatibility import CANARY_COUNT, canary_prompts
from latentguard.prompts import Prompt

SPLITS = ("train", "validation", "test")
CATEGORIES = {
    "violent_crimes",
    "non_violent_crimes",
    "sex_related_crimes",
    "defamation",
    "specialized_advice",
    "privacy",
    "indiscriminate_weapons",
    "hate",
    "suicide_self_harm",
    "elections",
}
LONE = {"over_refusal", "ordinary"}
MORE_CATEGORIES = {
    "sexual_content",
    "harassment",
    "cybercrime",
    "fraud",
    "drugs",
    "extremism",
    "jailbreak",
}
KINDS = {
    "borderline",
    "chat",
    "code",
    "confession",
    "fiction",
    "language",
    "pasted",
    "question",
    "register",
    "roleplay",
    "statement",
    "wrapper",
}
TEMPLATE = re.compile(r"<\|\w+\|>|</?s>|\[/?INST\]|<</?SYS>>|<(start|end)_of_turn>")


@pytest.fixture(scope="module")
def prompts():
    return load_contrast()


@pytest.fixture(scope="module")
def pairs(prompts):
    """Harmful and harmless member of each pair."""
    found = {}
    for p in prompts:
        if p.pair:
            found.setdefault(p.pair, {})[p.harmful] = p
    return [(members[True], members[False]) for members in found.values()]


def rows(name="contrast"):
    text = files("latentguard.data").joinpath(FILES[name]).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def letters(text):
    return "".join(c for c in text.lower() if c.isalnum())


class TestPairs:
    @pytest.mark.parametrize("load", [load_contrast, load_guard_prompts])
    def test_an_unknown_split_is_refused_with_the_known_ones(self, load):
        with pytest.raises(PromptError, match="no split 'trian'; expected one of train, valid"):
            load("trian")

    def test_how_many(self, prompts, pairs):
        assert len(pairs) >= 600
        assert Counter(p.pair for p in prompts if p.pair).most_common(1)[0][1] == 2
        assert {p.category for p in prompts if not p.pair} == LONE

    def test_members_share_their_form(self, pairs):
        for harmful, harmless in pairs:
            a, b = harmful.text, harmless.text
            assert ending_class(a) == ending_class(b), (a, b)
            assert a[0].isupper() == b[0].isupper(), (a, b)
            assert form_class(a) == form_class(b), (a, b)
            assert abs(len(a) - len(b)) <= max(8, 0.18 * max(len(a), len(b))), (a, b)
            assert harmful.category == harmless.category

    def test_categories_are_balanced(self, pairs):
        counts = Counter(harmful.category for harmful, _ in pairs)
        assert set(counts) == CATEGORIES
        assert max(counts.values()) == min(counts.values())

    def test_forms_are_balanced(self):
        counts = Counter((r["category"], r["form"]) for r in rows() if "pair" in r)
        assert len(counts) == 4 * len(CATEGORIES)
        for kind in ("imperative", "question", "statement", "multi"):
            assert len({counts[category, kind] for category in CATEGORIES}) == 1
        assert max(counts.values()) <= 1.6 * min(counts.values())

    def test_the_forms_are_the_ones_that_they_say(self):
        said = {r["text"]: r["form"] for r in rows() if "pair" in r}
        right = sum(form_class(text) == kind for text, kind in said.items())
        assert right / len(said) > 0.9  # the rule of the audit is rough: "any way to", "whats"


class TestRows:
    def test_lone_harmless_prompts(self, prompts):
        lone = [p for p in prompts if not p.pair]
        assert all(p.harmful is False for p in lone)
        counts = Counter(p.category for p in lone)
        assert counts["over_refusal"] >= 150
        assert counts["ordinary"] >= 150

    def test_nothing_twice(self, prompts):
        assert len({p.id for p in prompts}) == len(prompts)
        assert len({letters(p.text) for p in prompts}) == len(prompts)

    def test_plain_characters(self, prompts):
        plain = set(string.ascii_letters + string.digits + string.punctuation + " ")
        for p in [*prompts, *load_samples()]:
            assert set(p.text) <= plain, p.text
            assert p.text == " ".join(p.text.split())

    def test_what_is_known_of_each(self, prompts):
        assert {p.source for p in prompts} == {"contrast"}
        assert {p.refused for p in prompts} == {None}
        assert {p.harmful for p in prompts} == {True, False}


class TestSplits:
    @pytest.mark.parametrize(
        ("split", "pairs", "over_refusal", "ordinary"),
        [("train", 423, 78, 81), ("validation", 116, 42, 39), ("test", 121, 30, 30)],
    )
    def test_counts_are_fixed(self, split, pairs, over_refusal, ordinary):
        part = load_contrast(split)
        assert sum(p.harmful for p in part) == pairs
        assert len({p.pair for p in part if p.pair}) == pairs
        counts = Counter(p.category for p in part)
        assert (counts["over_refusal"], counts["ordinary"]) == (over_refusal, ordinary)
        assert len(part) == 2 * pairs + over_refusal + ordinary
        assert set(counts) == CATEGORIES | LONE

    def test_they_make_up_the_whole(self, prompts):
        parts = [p.id for split in SPLITS for p in load_contrast(split)]
        assert sorted(parts) == sorted(p.id for p in prompts)

    def test_a_pair_stays_together(self, pairs):
        assert all(split_of(a) == split_of(b) for a, b in pairs)

    def test_the_split_is_fixed_by_id_alone(self):
        found = [split_of(Prompt("any text", id=f"ordinary-{n:02}")) for n in range(1, 7)]
        assert found == [split_of(Prompt("other", pair=f"ordinary-{n:02}")) for n in range(1, 7)]
        known = ["train", "validation", "test", "validation", "train", "test"]
        assert [split_of(Prompt("", pair=f"hate-0{n}")) for n in range(1, 7)] == known

    def test_samples_are_in_no_split(self, prompts):
        samples = load_samples()
        assert len(samples) == 20
        assert all(p.harmful is None for p in samples)
        assert {letters(p.text) for p in samples}.isdisjoint(letters(p.text) for p in prompts)


class TestForm:
    @pytest.fixture(autouse=True)
    def no_ngrams(self, monkeypatch):
        """They are slow, and what words tell is not form."""
        nothing = lambda prompts, folds: np.zeros(len(prompts))  # noqa: E731
        monkeypatch.setattr("latentguard.data.surface_audit.held_out_ngram_scores", nothing)

    def test_form_does_not_tell_the_label_of_training_prompts(self):
        found = audit_surface(load_contrast("train"))
        assert max(found.ending, found.form, found.length) <= 0.55

    @pytest.mark.parametrize("split", SPLITS)
    def test_no_split_is_warned_of(self, split):
        assert audit_surface(load_contrast(split)).warnings == []


class TestTraffic:
    """Messages as people send them: paired like the contrast set, but of many kinds."""

    @pytest.fixture(scope="class")
    def traffic(self):
        return load_guard_prompts()

    @pytest.fixture(scope="class")
    def twins(self):
        found = {}
        for row in rows("traffic"):
            if "pair" in row:
                found.setdefault(row["pair"], {})[row["label"]] = row
        return [(members["harmful"], members["harmless"]) for members in found.values()]

    def test_each_says_where_it_comes_from(self, traffic, prompts):
        assert {p.source for p in traffic} == {"traffic"}
        assert {p.source for p in prompts} == {"contrast"}

    def test_how_many(self, traffic, twins):
        assert len(twins) >= 4300
        lone = [p for p in traffic if not p.pair]
        assert len(lone) >= 3400
        assert all(p.harmful is False for p in lone)
        assert len(traffic) == 2 * len(twins) + len(lone)

    def test_both_members_share_what_is_said_of_them(self, twins):
        for harmful, harmless in twins:
            assert harmful["kind"] == harmless["kind"]
            assert harmful["category"] == harmless["category"]

    def test_members_share_their_form(self, twins):
        for harmful, harmless in twins:
            a, b = harmful["text"], harmless["text"]
            assert ending_class(a) == ending_class(b), (a, b)
            assert form_class(a) == form_class(b), (a, b)
            assert a[0].isupper() == b[0].isupper(), (a, b)
            assert abs(len(a) - len(b)) <= max(14, 0.3 * max(len(a), len(b))), (a, b)

    def test_every_kind_and_category_is_there(self, twins):
        assert {row["kind"] for row in rows("traffic")} == KINDS
        counts = Counter(harmful["category"] for harmful, _ in twins)
        assert set(counts) == CATEGORIES | MORE_CATEGORIES
        assert max(counts.values()) <= 5 * min(counts.values())

    def test_nothing_twice(self, traffic, prompts):
        everything = [letters(p.text) for p in [*prompts, *load_samples(), *traffic]]
        assert len(set(everything)) == len(everything)
        assert len({p.id for p in [*prompts, *traffic]}) == len(prompts) + len(traffic)

    def test_template_tokens_only_in_wrappers(self):
        for row in rows("traffic"):
            assert row["kind"] == "wrapper" or not TEMPLATE.search(row["text"]), row
            assert row["text"] == row["text"].strip()

    def test_the_splits_make_up_the_whole(self, traffic):
        parts = {split: load_guard_prompts(split) for split in SPLITS}
        assert sorted(p.id for part in parts.values() for p in part) == sorted(
            p.id for p in traffic
        )
        assert 0.78 < len(parts["train"]) / len(traffic) < 0.82
        calm = [p for p in parts["validation"] if not p.harmful]
        assert len(calm) >= 299  # what a promise of 1 % needs

    @pytest.mark.parametrize("split", SPLITS)
    def test_form_does_not_tell_the_label(self, split, monkeypatch):
        nothing = lambda prompts, folds: np.zeros(len(prompts))  # noqa: E731
        monkeypatch.setattr("latentguard.data.surface_audit.held_out_ngram_scores", nothing)
        found = audit_surface(load_guard_prompts(split))
        assert max(found.ending, found.form, found.length) <= 0.56


class TestTrainingRows:
    def test_all_of_them_are_the_traffic_to_train_on(self):
        assert load_training_rows(None) == load_guard_prompts("train")
        assert load_training_rows(10**6) == load_guard_prompts("train")

    def test_the_default_is_the_knee_of_the_learning_curve(self):
        assert load_training_rows() == load_training_rows(4000)

    @pytest.mark.parametrize("count", [2, 250, 999, 4000])
    def test_as_many_as_asked_for_but_no_torn_pair(self, count):
        rows = load_training_rows(count)
        assert count - 1 <= len(rows) <= count
        assert set(Counter(p.pair for p in rows if p.pair).values()) <= {2}

    def test_those_of_a_smaller_count_are_among_those_of_a_larger(self):
        ids = [{p.id for p in load_training_rows(count)} for count in (250, 1000, 4000, None)]
        for fewer, more in itertools.pairwise(ids):
            assert fewer < more

    def test_kinds_categories_and_labels_keep_their_shares(self):
        kinds = {row["id"]: row["kind"] for row in rows("traffic")}
        for of in (lambda p: kinds[p.id], lambda p: p.category, lambda p: p.harmful):
            some, whole = (Counter(map(of, load_training_rows(n))) for n in (1000, None))
            for value, count in whole.items():
                expected = 1000 * count / whole.total()
                assert abs(some[value] - expected) <= 4 + 0.1 * expected, value

    def test_they_are_the_same_on_every_machine(self):
        ids = "\n".join(p.id for p in load_training_rows(1000))
        assert hashlib.sha256(ids.encode()).hexdigest().startswith("af712fd12a9de7a8")

    @pytest.mark.parametrize("count", [-1, 0, 1])
    def test_a_guard_needs_a_pair(self, count):
        with pytest.raises(PromptError, match=f"one pair; found {count}"):
            load_training_rows(count)


class TestCanaries:
    def test_half_harmful_half_harmless_out_of_validation(self):
        found = canary_prompts()
        assert len(found) == CANARY_COUNT == len({p.id for p in found})
        assert sum(p.harmful for p in found) == CANARY_COUNT // 2
        assert {split_of(p) for p in found} == {"validation"}
        assert len({p.category for p in found}) >= CANARY_COUNT // 2
        assert found == canary_prompts()
