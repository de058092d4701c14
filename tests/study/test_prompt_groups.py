"""PromptPools from the built-in set, from folders and from named files; drawing from them."""

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentguard.data.builtin import load_contrast, split_of
from latentguard.errors import PromptError
from latentguard.prompts import Message, Prompt
from latentguard.study.prompt_groups import (
    FOLDER,
    QUESTIONS,
    PromptGroups,
    PromptPools,
    contrast_pools,
    inversion_prompt,
    is_fit_side,
    read_pools,
    sample_prompts,
)

POOLS = [f.name for f in fields(PromptPools)]
TEXTS = st.lists(st.text(min_size=1, max_size=8), max_size=30)


def write(path, *rows):
    """Rows are (text, label) or (text, label, more)."""
    lines = []
    for text, label, *more in rows:
        row = dict(text=text) | ({"label": label} if label else {}) | (more[0] if more else {})
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """The least that a study needs, with one wrong row in each file."""
    write(tmp_path / "advbench.jsonl", ("bad 1", "harmful"), ("bad 2", None), ("fine", "harmless"))
    write(tmp_path / "alpaca_harmless.jsonl", ("good 1", "harmless"), ("good 2", None))
    return tmp_path


def said(pool):
    return [p.text for p in pool]


def test_kinds_of_attacks_are_named_for_what_they_are(folder):
    """The suffixes at hand are not the paper's GCG suffixes, nor are its templates in the wild."""
    kinds = ["suffix", "template", "persuasion", "other"]
    rows = [(f"a {kind}", "harmful", {"category": kind}) for kind in kinds]
    write(folder / "jailbreaks.jsonl", *rows)
    found = [p.category for p in read_pools(folder).jailbreaks]
    assert found == ["DSN suffixes", "in-the-wild templates", "persuasion samples", "other"]


class TestContrastPools:
    def test_labels(self):
        pools = contrast_pools()
        for name in ("harmful", "held_out", "categories"):
            assert all(p.harmful for p in getattr(pools, name))
        for name in ("harmless", "over_refusal"):
            assert not any(p.harmful for p in getattr(pools, name))
        assert {p.harmful for p in pools.matched} == {True, False}

    def test_what_is_fitted_is_in_no_control(self):
        pools = contrast_pools()
        fitted = {p.text for p in (*pools.harmful, *pools.harmless)}
        pairs = {p.pair for p in (*pools.harmful, *pools.harmless)} - {None}
        for name in ("held_out", "over_refusal", "matched"):
            apart = getattr(pools, name)
            assert apart
            assert fitted.isdisjoint(p.text for p in apart)
            assert pairs.isdisjoint(p.pair for p in apart)

    def test_every_prompt_has_a_place(self):
        pools = contrast_pools()
        placed = {p.text for name in POOLS for p in getattr(pools, name)}
        left = {p.text for p in load_contrast()} - placed
        lone = [p for p in load_contrast() if p.text in left]
        assert {(split_of(p), p.pair, p.harmful) for p in lone} <= {("test", None, False)}

    def test_matched_are_whole_pairs(self):
        sides = {}
        for p in contrast_pools().matched:
            sides.setdefault(p.pair, []).append(p.harmful)
        assert all(sorted(found) == [False, True] for found in sides.values())

    def test_it_is_the_default(self):
        assert read_pools() == contrast_pools()
        assert {p.source for p in read_pools().harmful} == {"contrast"}


class TestFolders:
    def test_the_least(self, folder):
        pools = read_pools(folder)
        assert said(pools.harmful) == ["bad 1", "bad 2"]
        assert said(pools.harmless) == ["good 1", "good 2"]
        assert [p.harmful for p in pools.harmful + pools.harmless] == [True] * 2 + [False] * 2
        assert {p.source for p in pools.harmful} == {"advbench"}
        assert pools.matched == contrast_pools().matched
        for name in set(POOLS) - {"harmful", "harmless", "matched"}:
            assert getattr(pools, name) == ()

    def test_each_file_goes_where_it_belongs(self, folder):
        sides = ("harmful", "harmless")
        rows = {s: [(f"{s} of {s2}", s) for s2 in "ab"] for s in sides}
        for name in {name for names in FOLDER.values() for name in names}:
            mine = [(f"{name}: {text}", label) for s in sides for text, label in rows[s]]
            write(folder / f"{name}.jsonl", *mine)
        pools = read_pools(folder)
        for pool, names in FOLDER.items():
            found = getattr(pools, pool)
            wanted = {"harmless": {False}, "over_refusal": {False}, "moderation": {False, True}}
            wanted["toxicchat"] = {False, True}
            labels = wanted.get(pool, {True})
            assert [p.source for p in found] == [n for n in names for _ in range(2 * len(labels))]
            assert {p.harmful for p in found} == labels
            assert all(p.text.startswith(f"{p.source}: {_word(p)}") for p in found)
        own = [p for p in pools.matched if p.source != "contrast"]
        assert [(p.source, p.harmful) for p in own] == [
            (name, label) for name in ("jbb", "xstest") for label in (True,) * 2 + (False,) * 2
        ]

    def test_a_text_that_comes_again_is_taken_once(self, folder):
        write(folder / "jbb.jsonl", ("bad 2", "harmful"), ("bad 3", "harmful"), ("bad 3", None))
        pools = read_pools(folder)
        assert [(p.text, p.source) for p in pools.harmful] == [
            ("bad 1", "advbench"),
            ("bad 2", "advbench"),
            ("bad 3", "jbb"),
        ]

    def test_a_row_of_the_other_side_does_not_hide_one(self, folder):
        rows = ("same", "harmless"), ("same", "harmful")
        write(folder / "jbb.jsonl", *rows)
        assert "same" in said(read_pools(folder).harmful)

    def test_unlabelled_moderation_rows_are_left_out(self, folder):
        write(folder / "openai_moderation.jsonl", ("a", None), ("b", "harmful"), ("c", "harmless"))
        assert [(p.text, p.harmful) for p in read_pools(folder).moderation] == [
            ("b", True),
            ("c", False),
        ]

    def test_what_a_row_says_of_itself_is_kept(self, folder):
        more = dict(category="kind", pair="7", id="x", history=[dict(role="user", content="h")])
        write(folder / "jailbreaks.jsonl", ("attack", "harmful", more))
        (found,) = read_pools(folder).jailbreaks
        history = (Message("user", "h"),)
        wanted = Prompt("attack", "x", True, None, "kind", "jailbreaks", "7", history)
        assert found == wanted

    def test_no_folder(self, tmp_path):
        with pytest.raises(PromptError, match=r"--data-dir should be a folder; found nothing"):
            read_pools(tmp_path / "none")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(PromptError, match="harmful and harmless prompts; found 0 and 0"):
            read_pools(tmp_path)

    def test_one_side_only(self, folder):
        (folder / "alpaca_harmless.jsonl").unlink()
        with pytest.raises(PromptError, match="found 2 and 0"):
            read_pools(folder)

    def test_a_bad_file_is_named(self, folder):
        (folder / "jbb.jsonl").write_text('{"text": ""}\n')
        with pytest.raises(PromptError, match=r"jbb\.jsonl, line 1"):
            read_pools(folder)


class TestNamed:
    def test_it_takes_the_place_of_a_pool(self, folder, tmp_path):
        path = write(tmp_path / "mine.jsonl", ("worse", "harmful"), ("tame", "harmless"))
        pools = read_pools(folder, {"harmful": path, "over_refusal": [path]})
        assert [(p.text, p.source) for p in pools.harmful] == [("worse", "mine")]
        assert said(pools.over_refusal) == ["tame"]
        assert said(pools.harmless) == ["good 1", "good 2"]

    def test_several_files(self, tmp_path):
        first = write(tmp_path / "a.jsonl", ("x", None), ("y", None))
        second = write(tmp_path / "b.jsonl", ("y", None), ("z", None))
        pools = read_pools(None, {"harmful": [first, second]})
        assert [(p.text, p.source) for p in pools.harmful] == [("x", "a"), ("y", "a"), ("z", "b")]

    def test_matched_sets_have_both_labels(self, tmp_path):
        rows = [(f"{label} {n}", label, {"pair": str(n)}) for n in "ab" for label in SIDES]
        path = write(tmp_path / "twins.jsonl", *rows, ("?", None))
        found = read_pools(None, {"matched": path}).matched
        assert [(p.harmful, p.pair) for p in found] == [
            (s == "harmful", n) for n in "ab" for s in SIDES
        ]

    @pytest.mark.parametrize("pool", ["harmfull", "text", ""])
    def test_an_unknown_pool(self, pool):
        with pytest.raises(PromptError, match=f"there is no pool '{pool}'; expected one of cat"):
            read_pools(None, {pool: "a.jsonl"})

    @pytest.mark.parametrize("given", [3, True, {"file": "a.jsonl"}, [1], ["a.jsonl", ["b.jsonl"]]])
    def test_another_kind(self, given):
        with pytest.raises(PromptError, match="'harmful' should be a file or a list of them"):
            read_pools(None, {"harmful": given})

    def test_an_empty_list_empties_a_pool(self):
        assert read_pools(None, {"over_refusal": []}).over_refusal == ()
        with pytest.raises(PromptError, match="found 0 and"):
            read_pools(None, {"harmful": []})

    def test_a_missing_file(self):
        with pytest.raises(PromptError, match=r"none\.jsonl cannot be read"):
            read_pools(None, {"held_out": "none.jsonl"})


class TestSpread:
    @given(TEXTS, st.integers(0, 40), st.integers(0, 5), st.randoms(use_true_random=False))
    def test_the_same_whatever_the_order(self, texts, count, seed, random):
        prompts = [Prompt(t) for t in dict.fromkeys(texts)]
        found = sample_prompts(prompts, count, seed=seed)
        mixed = random.sample(prompts, len(prompts))
        assert found == sample_prompts(iter(mixed), count, seed=seed)
        assert len(found) == min(count, len(prompts))
        assert found == sample_prompts(prompts, len(prompts), seed=seed)[:count]

    def test_the_same_on_every_machine(self):
        prompts = [Prompt(c) for c in "abcdefgh"]
        assert "".join(said(sample_prompts(prompts, 8))) == "eghbfacd"
        assert "".join(said(sample_prompts(prompts, 3, seed=1))) == "gca"

    def test_labels_do_not_move_a_prompt(self):
        prompts = [Prompt(str(n)) for n in range(50)]
        labelled = [Prompt(str(n), id=f"x{n}", harmful=n % 2 == 0) for n in range(50)]
        assert said(sample_prompts(prompts, 20)) == said(sample_prompts(labelled, 20))

    def test_a_prompt_that_is_there_stays_when_others_join(self):
        some, more = ([Prompt(str(n)) for n in range(k)] for k in (100, 110))
        gone = set(sample_prompts(some, 50)) - set(sample_prompts(more, 50))
        assert len(gone) <= 10


class TestSides:
    def test_twins_fall_on_one_side(self):
        sides = {}
        for p in load_contrast():
            if p.pair:
                sides.setdefault(p.pair, set()).add(is_fit_side(p))
        assert all(len(found) == 1 for found in sides.values())

    @pytest.mark.parametrize("text", ["How do I?", "Name it", "a. b. c"])
    def test_the_same_text_falls_on_one_side(self, text):
        alike = [text, text.upper(), f"{text} ", f"{text}!", f"{text} ?.", text.lower()]
        assert len({is_fit_side(Prompt(t)) for t in alike}) == 1

    def test_about_half(self):
        count = sum(is_fit_side(Prompt(f"text {n}")) for n in range(2000))
        assert 900 < count < 1100

    def test_labels_do_not_matter(self):
        for n in range(30):
            a, b = Prompt(f"t {n}"), Prompt(f"t {n}", id="x", harmful=True, refused=False)
            assert is_fit_side(a) == is_fit_side(b)


class TestInverted:
    @pytest.mark.parametrize("question", QUESTIONS)
    def test_the_question_begins_where_it_says(self, question):
        prompt = Prompt("bake a cake", id="7", harmful=False, pair="2")
        found = inversion_prompt(prompt, question)
        assert found.text == f"User wants to bake a cake\n{question}"
        assert found.text[found.question_at :] == question
        assert (found.id, found.harmful, found.pair) == ("7", False, "2")

    def test_each_question_asks_for_the_two_answers(self):
        assert len(set(QUESTIONS)) == len(QUESTIONS) == 4
        assert all("'Certainly'" in q and "'No'" in q for q in QUESTIONS)


def test_a_group_that_is_missing_has_no_prompts():
    prompts = (Prompt("a"),)
    groups = PromptGroups(PromptPools((), ()), {"refused_harmful": prompts}, {})
    assert groups.fit_prompts("refused_harmful") == prompts
    assert groups.fit_prompts("accepted_harmful") == ()
    assert groups.test_prompts("refused_harmful") == ()


SIDES = ("harmful", "harmless")


def _word(prompt):
    return "harmful" if prompt.harmful else "harmless"
