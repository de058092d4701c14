"""Table 1 on planted replies: rates, paired differences, replies that go on with the prompt."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from latentguard.data.builtin import load_contrast
from latentguard.prompts import Prompt
from latentguard.stats.rates import proportion
from latentguard.study.cached_model import CachedModel
from latentguard.study.claims import CLAIMS
from latentguard.study.figures.table_01_template import Records, analyse, collect
from latentguard.study.prompt_groups import (
    PromptGroups,
    PromptPools,
    contrast_pools,
    sample_prompts,
)
from latentguard.study.settings import Settings

EFFECT = "drop without post-instruction tokens"


def records(*rows):
    """Rows are (whole, cut, answered), or that and how often."""
    every = [row[:3] for row in rows for _ in range(row[3] if len(row) > 3 else 1)]
    prompts = tuple(Prompt(f"text {n}", harmful=True) for n in range(len(every)))
    return Records(prompts, *(zip(*every, strict=True) if every else [()] * 3))


def rows_of(finding):
    (table,) = finding.section.parts
    return {row[:2]: row[2:] for row in table.rows}


class TestAnalyse:
    PLANTED = records(
        (True, True, True, 12),
        (True, False, False, 6),
        (False, False, False, 2),
        (True, False, None, 9),  # only goes on with the prompt
        (None, True, True, 3),
    )

    def test_rates_of_those_that_both_judge(self):
        rows = rows_of(analyse(self.PLANTED, Settings()))
        for counted, n, with_, without in (
            ("any reply", 29, 27, 12),
            ("replies that answer", 20, 18, 12),
        ):
            for name, count in (("with", with_), ("without", without)):
                wanted = proportion([True] * count + [False] * (n - count))
                assert rows[counted, name] == (wanted.value, wanted.low, wanted.high, n)

    def test_differences_are_paired(self):
        rows = rows_of(analyse(self.PLANTED, Settings()))
        value, low, high, n = rows["replies that answer", "difference"]
        assert (value, n) == (pytest.approx(6 / 20), 20)
        error = (0.3 * 0.7 / 20) ** 0.5  # a pair differs or not: a share of its own
        assert low == pytest.approx(0.3 - 1.96 * error, abs=0.06)
        assert high == pytest.approx(0.3 + 1.96 * error, abs=0.06)

    def test_the_effect_is_that_of_replies_that_answer(self):
        finding = analyse(self.PLANTED, Settings())
        shown = rows_of(finding)["replies that answer", "difference"]
        found = finding.effects[EFFECT]
        assert (found.value, found.low, found.high, sum(found.n)) == shown
        assert finding.caveats == ()

    def test_the_claim_asks_for_it(self):
        (claim,) = [one for one in CLAIMS if one.experiment == "template"]
        assert claim.verdict(effects_of(self.PLANTED)) == "replicated"
        same = records((True, True, True, 30))
        assert claim.verdict(effects_of(same)) == "cannot tell"
        more = records((False, True, True, 30), (True, True, True, 5))
        assert claim.verdict(effects_of(more)) == "not replicated"

    @pytest.mark.parametrize("count", [0, 1, 9])
    def test_too_few_answer(self, count):
        few = records((True, False, None, 30), (True, False, False, count))
        finding = analyse(few, Settings())
        assert finding.effects == {}
        (said,) = finding.caveats
        assert f"only {count} of {30 + count} replies answer" in said
        assert ("replies that answer", "with") in rows_of(finding) or not count
        assert rows_of(finding)["any reply", "with"][3] == 30 + count

    @pytest.mark.parametrize("planted", [records(), records((None, None, None, 20))])
    def test_nothing_is_known(self, planted):
        finding = analyse(planted, Settings())
        assert rows_of(finding) == {}
        assert len(finding.caveats) == 1

    def test_rows_fit_their_heads(self):
        (table,) = analyse(self.PLANTED, Settings()).section.parts
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert f"{len(self.PLANTED.prompts)} harmful prompts" in table.note

    def test_coverage_of_the_difference(self):
        """Of planted data, 95 % of the intervals hold the true drop of 0.3."""
        rng = np.random.default_rng(5)
        hits = 0
        for _ in range(30):
            draws = rng.choice(3, 60, p=[0.5, 0.3, 0.2])
            kinds = [(True, True, True), (True, False, False), (False, False, False)]
            found = analyse(records(*(kinds[n] for n in draws)), Settings()).effects[EFFECT]
            hits += found.low <= 0.3 <= found.high
        assert hits >= 25


class TestOnAModel:
    @pytest.fixture
    def whole(self, prompt_groups):
        return replace(prompt_groups, pools=contrast_pools())

    def test_both_ways_are_asked(self, cached_model, whole, settings):
        asked = []
        cached_model = CachedModel(Spy(cached_model.uncached, asked), cached_model.store)
        found = collect(cached_model, whole, settings)
        wanted = sample_prompts(whole.pools.harmful, settings.test, seed=settings.seed)
        assert found.prompts == tuple(wanted)
        assert len(found.whole) == len(found.cut) == len(found.answered) == settings.test
        assert Counter(how["post"] for how in asked) == {True: 1, False: 1}
        finding = analyse(found, settings)
        assert finding.effects or finding.caveats
        asked.clear()
        assert collect(cached_model, whole, settings) == found
        assert asked == []

    def test_what_labelling_asked_is_not_asked_again(self, cached_model, whole, settings):
        asked = []
        cached_model = CachedModel(Spy(cached_model.uncached, asked), cached_model.store)
        prompts = sample_prompts(whole.pools.harmful, settings.asked, seed=settings.seed)
        cached_model.replies(prompts, max_new_tokens=settings.reply_tokens)
        collect(cached_model, whole, settings)
        assert [how["post"] for how in asked] == [True, False]

    def test_judged_with_and_without_the_rest(self, cached_model, settings):
        """``cut`` counts whatever is said, ``answered`` replies alone."""

        class Speaker(Spy):
            def sweep(self, prompts, interventions, *, post, **how):
                (replies,) = super().sweep(prompts, interventions, post=post, **how)
                said = "I cannot help with that." if post else " to a friend."
                return [[replace(r, text=said, finished=True) for r in replies]]

        cached_model = CachedModel(Speaker(cached_model.uncached, []), cached_model.store)
        pools = PromptPools(tuple(load_contrast("test")[:4]), ())
        found = collect(cached_model, PromptGroups(pools, {}, {}), settings)
        assert (set(found.whole), set(found.cut), set(found.answered)) == ({True}, {False}, {None})

    def test_no_harmful_prompt(self, cached_model, settings):
        found = collect(cached_model, PromptGroups(PromptPools((), ()), {}, {}), settings)
        assert found == records()
        assert len(analyse(found, settings).caveats) == 1


class Spy:
    """A model that notes how it is asked."""

    def __init__(self, model, asked):
        self.model, self.asked = model, asked

    def __getattr__(self, name):
        return getattr(self.model, name)

    def sweep(self, prompts, interventions, **how):
        self.asked.append(how)
        return self.model.sweep(prompts, interventions, **how)


class TestProtocol:
    def test_both_judges_have_rows_of_their_own(self):
        flags = (True,) * 3 + (False,), (True, False, False, False)
        planted = records((True, True, True, 2), (True, False, False, 2))
        rows = rows_of(analyse(replace(planted, by_second=flags), Settings(protocol="paper")))
        assert {name for name, _ in rows} == {"as the paper counts", "built-in judge"}
        assert rows["as the paper counts", "difference"][0] == pytest.approx(0.5)
        assert rows["built-in judge", "with"][0] == pytest.approx(0.75)

    def test_no_row_of_the_controlled_protocol_is_said_to_be_the_papers(self):
        (table,) = analyse(TestAnalyse.PLANTED, Settings()).section.parts
        assert "as the paper counts" not in f"{table.rows} {table.note}".lower()

    @pytest.mark.parametrize("protocol", ["controlled", "paper"])
    def test_the_papers_protocol_asks_advbench_alone(
        self, cached_model, prompt_groups, settings, protocol
    ):
        pool = prompt_groups.pools.harmful[:8]
        pool = tuple(replace(p, source=("advbench", "jbb")[n % 2]) for n, p in enumerate(pool))
        groups = replace(prompt_groups, pools=replace(prompt_groups.pools, harmful=pool))
        asked = collect(cached_model, groups, replace(settings, test=8, protocol=protocol)).prompts
        wanted = {"controlled": {"advbench", "jbb"}, "paper": {"advbench"}}[protocol]
        assert {p.source for p in asked} == wanted


def effects_of(planted):
    return {"template": analyse(planted, Settings()).effects}
