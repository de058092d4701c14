"""Sorting prompts into the four groups: nothing that a centroid sees is tested."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentguard.prompts import Prompt
from latentguard.stats.rates import proportion
from latentguard.study.cached_model import CachedModel
from latentguard.study.labelling import (
    ASKED,
    GROUPS,
    Asked,
    analyse,
    collect,
    prompt_groups_of,
)
from latentguard.study.prompt_groups import (
    BEHAVING,
    PromptPools,
    contrast_pools,
    is_fit_side,
    pair_key,
)
from latentguard.study.settings import Settings

OUTCOMES = {True: "refused", False: "accepted", None: "empty"}


def asked(pool, *prompts):
    return Asked(pool, prompts, tuple(OUTCOMES[p.refused] for p in prompts))


def prompts(count, *, harmful, refused, name="p", source="set", pair=""):
    return tuple(
        Prompt(
            f"{name} {n}",
            id=f"{name}-{n}",
            harmful=harmful,
            refused=refused,
            source=source,
            pair=f"{pair}{n}" if pair else None,
        )
        for n in range(count)
    )


def pools(**named):
    return PromptPools(**({"harmful": (), "harmless": ()} | named))


def everything(prompt_groups):
    fit = [p for g in GROUPS for p in prompt_groups.fit[g]]
    return fit, [p for g in GROUPS for p in prompt_groups.test[g]]


PROMPTS = st.builds(
    Prompt,
    text=st.integers(0, 40).map("text {}".format) | st.integers(0, 40).map("Text {}?".format),
    harmful=st.booleans(),
    refused=st.sampled_from([True, False, None]),
    pair=st.none() | st.integers(0, 9).map(str),
)


class TestMaterial:
    @given(
        st.dictionaries(st.sampled_from(ASKED), st.lists(PROMPTS, max_size=40)),
        st.integers(1, 12),
    )
    def test_whatever_is_asked(self, found, most):
        records = [asked(pool, *members) for pool, members in found.items()]
        held_out = tuple(found.get("held_out", ()))
        settings = Settings(fit=most, test=most)
        prompt_groups = prompt_groups_of(records, pools(held_out=held_out), settings)
        fit, test = everything(prompt_groups)
        assert {pair_key(p) for p in fit}.isdisjoint(pair_key(p) for p in test)
        assert {pair_key(p) for p in fit}.isdisjoint(pair_key(p) for p in held_out)
        assert all(
            p.group == g for g in GROUPS for p in prompt_groups.fit[g] + prompt_groups.test[g]
        )
        assert all(
            len(one[g]) <= most for one in (prompt_groups.fit, prompt_groups.test) for g in GROUPS
        )
        plain = {p.text for name in ("harmful", "harmless") for p in found.get(name, ())}
        assert {p.text for p in fit} <= plain
        assert all(is_fit_side(p) for p in fit)
        texts = [p.text for p in fit + test]
        assert len(set(texts)) == len(texts)
        assert prompt_groups == prompt_groups_of(records, prompt_groups.pools, settings)

    def test_groups_by_label_and_reply(self):
        records = [
            asked("harmful", *prompts(40, harmful=True, refused=True, name="a")),
            asked("held_out", *prompts(30, harmful=True, refused=False, name="b")),
            asked("over_refusal", *prompts(20, harmful=False, refused=True, name="c")),
            asked("harmless", *prompts(10, harmful=False, refused=None, name="d")),
        ]
        prompt_groups = prompt_groups_of(records, pools(), Settings())
        fit = [p for p in records[0].prompts if is_fit_side(p)]
        assert prompt_groups.fit["refused_harmful"] == tuple(fit)
        assert set(prompt_groups.test["refused_harmful"]) == set(records[0].prompts) - set(fit)
        assert set(prompt_groups.test["accepted_harmful"]) == set(records[1].prompts)
        assert set(prompt_groups.test["refused_harmless"]) == set(records[2].prompts)
        for group in GROUPS[1:]:
            assert prompt_groups.fit[group] == ()
        assert prompt_groups.test["accepted_harmless"] == ()

    def test_refused_harmful_prompts_are_of_the_centroids_kind_first(self):
        """The paper tests AdvBench and JailbreakBench; others fill up."""
        plain = asked("harmful", *prompts(40, harmful=True, refused=True, name="a"))
        other = asked("held_out", *prompts(90, harmful=True, refused=True, name="b"))
        few, many = (prompt_groups_of([plain, other], pools(), Settings(test=n)) for n in (5, 60))
        assert set(few.test["refused_harmful"]) < set(plain.prompts)
        sources = [p in set(plain.prompts) for p in many.every_source]
        assert len(sources) == 60 and 0 < sum(sources) < 40  # the earlier set takes all alike
        left = [p for p in plain.prompts if not is_fit_side(p)]
        assert set(left) < set(many.test["refused_harmful"])
        assert len(many.test["refused_harmful"]) == 60

    def test_a_twin_in_another_pool_is_not_tested(self):
        """The harmless twin of a prompt that is in a centroid shares its form."""
        pair = dict(pair="t")
        records = [
            asked("harmful", *prompts(30, harmful=True, refused=True, name="bad", **pair)),
            asked("over_refusal", *prompts(30, harmful=False, refused=False, name="fine", **pair)),
        ]
        prompt_groups = prompt_groups_of(records, pools(), Settings())
        used = {p.pair for p in prompt_groups.fit["refused_harmful"]}
        assert used
        assert used.isdisjoint(p.pair for p in prompt_groups.test["accepted_harmless"])
        assert len(prompt_groups.test["accepted_harmless"]) == 30 - len(used)

    def test_a_held_out_prompt_is_in_no_centroid(self):
        shared = prompts(30, harmful=True, refused=True)
        records = [asked("harmful", *shared), asked("held_out", *shared)]
        prompt_groups = prompt_groups_of(records, pools(held_out=shared[:20]), Settings())
        assert set(prompt_groups.fit["refused_harmful"]).isdisjoint(shared[:20])
        assert set(shared[:20]) <= set(prompt_groups.test["refused_harmful"])

    def test_what_a_centroid_leaves_over_is_not_tested(self):
        """Else the settings would move prompts from one side to the other."""
        record = asked("harmful", *prompts(60, harmful=True, refused=True))
        few, many = (prompt_groups_of([record], pools(), Settings(fit=n)) for n in (5, 60))
        assert few.test == many.test
        assert few.fit["refused_harmful"] == many.fit["refused_harmful"][:5]

    def test_the_built_in_set(self):
        found = contrast_pools()
        records = [
            asked(
                name, *(replace(p, refused=n % 3 == 0) for n, p in enumerate(getattr(found, name)))
            )
            for name in ASKED
        ]
        prompt_groups = prompt_groups_of(records, found, Settings())
        fit, _ = everything(prompt_groups)
        pairs = {p.pair for p in fit if p.pair}
        for name in ("held_out", "over_refusal", "matched"):
            assert pairs.isdisjoint(p.pair for p in getattr(found, name))
        assert all(len(prompt_groups.test[g]) >= 60 for g in GROUPS)
        assert all(len(prompt_groups.fit[g]) >= 60 for g in BEHAVING)

    def test_nothing(self):
        prompt_groups = prompt_groups_of([], pools(), Settings())
        assert everything(prompt_groups) == ([], [])


class TestAnalyse:
    RECORDS = (
        asked(
            "harmful",
            *prompts(30, harmful=True, refused=True, name="a"),
            *prompts(10, harmful=True, refused=False, name="b", source="other"),
            *prompts(4, harmful=True, refused=None, name="c"),
        ),
        Asked("held_out", prompts(2, harmful=True, refused=None, name="d"), ("cut", "empty")),
        asked("over_refusal"),
    )

    def tables(self, settings=None):
        settings = settings or Settings()
        prompt_groups = prompt_groups_of(self.RECORDS, pools(), settings)
        finding = analyse(self.RECORDS, prompt_groups, settings)
        return finding, *finding.section.parts

    def test_rates(self):
        _, rates, _ = self.tables()
        rows = {row[:2]: row[2:] for row in rates.rows}
        all_refused, none = proportion([True] * 30), proportion([False] * 10)
        assert rows == {
            ("harmful", "set"): (1.0, all_refused.low, 1.0, 30, 4, 0),
            ("harmful", "other"): (0.0, 0.0, none.high, 10, 0, 0),
            ("held_out", "set"): (None, None, None, 0, 1, 1),
        }

    def test_groups(self):
        _, _, groups = self.tables()
        fit = sum(is_fit_side(p) for p in self.RECORDS[0].prompts if p.refused)
        left = sum(not is_fit_side(p) for p in self.RECORDS[0].prompts if p.refused is False)
        assert [row[:3] for row in groups.rows] == [
            ("refused harmful", fit, 30 - fit),
            ("accepted harmful", 0, left),
            ("refused harmless", 0, 0),
            ("accepted harmless", 0, 0),
        ]
        assert groups.rows[0][3] == "set"

    def test_small_groups_are_named(self):
        finding, _, groups = self.tables(Settings(enough=3))
        small = [row[0] for row in groups.rows if row[2] < 3]
        assert small == ["refused harmless", "accepted harmless"]
        assert len(finding.caveats) == 2
        for name, sentence in zip(small, finding.caveats, strict=True):
            assert sentence.startswith(f"Only 0 {name} prompts")

    def test_rows_fit_their_heads(self):
        _, *tables = self.tables()
        for table in tables:
            assert {len(row) for row in table.rows} == {len(table.columns)}

    def test_no_text_is_shown(self):
        finding, *tables = self.tables()
        shown = repr((finding.section.text, [t.rows for t in tables]))
        assert not any(p.text in shown for one in self.RECORDS for p in one.prompts)


class TestOnAModel:
    @pytest.fixture
    def judged(self, model, cached_model):
        """The random model's replies are judged by the first token, so that both sides occur."""

        def judge(reply):
            return ("refused", "accepted", "cut")[reply.ids[0] % 3]

        calls = []
        cached_model = CachedModel(model, cached_model.store, judge=judge)
        cached_model.step = lambda what, total: calls.append((what, total)) or (lambda count: None)
        cached_model.calls = calls
        return cached_model

    def test_every_pool_is_asked(self, judged, settings):
        found = contrast_pools()
        records = collect(judged, found, settings)
        assert [one.pool for one in records] == list(ASKED)
        assert [len(one.prompts) for one in records] == [settings.asked] * 4
        for one in records:
            own = {p.text: p for p in getattr(found, one.pool)}
            for prompt, outcome in zip(one.prompts, one.outcomes, strict=True):
                refused = {"refused": True, "accepted": False}.get(outcome)
                assert prompt == replace(own[prompt.text], refused=refused)
        assert len({outcome for one in records for outcome in one.outcomes}) == 3
        prompt_groups = prompt_groups_of(records, found, settings)
        assert analyse(records, prompt_groups, settings).effects == {}

    def test_a_second_time_nothing_is_asked(self, judged, settings, monkeypatch):
        found = contrast_pools()
        records = collect(judged, found, settings)
        monkeypatch.setattr(judged, "uncached", Deaf(judged.uncached))
        assert collect(judged, found, settings) == records

    def test_empty_pools(self, judged, settings):
        records = collect(judged, pools(harmful=(Prompt("a", harmful=True),)), settings)
        assert [len(one.prompts) for one in records] == [1, 0, 0, 0]
        prompt_groups = prompt_groups_of(records, pools(), settings)
        assert len(analyse(records, prompt_groups, settings).caveats) == 4


class Deaf:
    """A model that cannot be asked."""

    def __init__(self, model):
        self.fingerprint = model.fingerprint
