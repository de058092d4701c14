"""The rules of the claims, against every point of an interval."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from latentguard.stats.estimate import Estimate
from latentguard.study.claims import CLAIMS, Claim, Condition
from latentguard.study.claims_report import claims_section, count_outcomes

NAN = float("nan")


def effect(low, high, n=(20, 0)):
    return Estimate((low + high) / 2, low, high, n)


def claim(*conditions):
    return Claim("c", "3.1", "template", "1.0", conditions)


class TestCondition:
    @pytest.mark.parametrize(
        ("above", "below"),
        [
            (above, below)
            for above, below in product([None, -1, 0, 1], [None, 0, 1, 2])
            if None in (above, below) or above < below
        ],
    )
    def test_by_the_points_of_the_interval(self, above, below):
        """Quarter steps hit every case: inside, outside, across either bound, or touching it."""
        condition = Condition("e", above=above, below=below)
        for low, high in product(np.arange(-2, 3.25, 0.25), repeat=2):
            if low > high:
                continue
            points = np.arange(low, high + 0.01, 0.25)
            right = [
                (above is None or point > above) and (below is None or point < below)
                for point in points
            ]
            too_low = above is not None and all(point < above for point in points)
            too_high = below is not None and all(point > below for point in points)
            wanted = "replicated" if all(right) else "cannot tell"
            wanted = "not replicated" if too_low or too_high else wanted
            assert condition.verdict(effect(low, high)) == wanted, (low, high)

    @pytest.mark.parametrize(
        ("low", "high", "wanted"),
        [
            (0, 1, "cannot tell"),
            (-1, 0, "cannot tell"),
            (0, 0, "cannot tell"),
            (1e-12, 1, "replicated"),
            (-1, -1e-12, "not replicated"),
        ],
    )
    def test_touching_decides_nothing(self, low, high, wanted):
        assert Condition("e", above=0).verdict(effect(low, high)) == wanted
        assert Condition("e", below=0).verdict(effect(-high, -low)) == wanted

    def test_wider_than_both_bounds(self):
        assert Condition("e", above=-1, below=1).verdict(effect(-2, 2)) == "cannot tell"

    @pytest.mark.parametrize("found", [None, effect(NAN, NAN), effect(1, NAN), effect(NAN, 1)])
    def test_nothing_measured(self, found):
        assert Condition("e", above=0, below=0.5).verdict(found) == "cannot tell"

    @given(
        *[st.floats(-5, 5)] * 2,
        st.floats(0, 2),
        st.floats(0, 2),
        st.sampled_from(["above", "below"]),
    )
    def test_a_narrower_interval_never_turns_a_verdict(self, middle, bound, left, right, side):
        condition = Condition("e", **{side: bound})
        wide = condition.verdict(effect(middle - left, middle + right))
        narrow = condition.verdict(effect(middle - left / 2, middle + right / 2))
        assert wide in ("cannot tell", narrow)

    @pytest.mark.parametrize("value", [-0.7, -0.2, 0.01, 0.3, 0.6, 1.4])
    @pytest.mark.parametrize(("above", "below"), [(0, None), (None, 0.5), (-0.5, 0.5)])
    def test_the_prompts_that_would_decide_it(self, value, above, below):
        """With as many the shrunk interval decides, with a tenth fewer it does not."""
        condition = Condition("e", above=above, below=below)
        found = Estimate(value, value - 2, value + 3, (30, 10))
        needed = condition.prompts_needed(found)
        for n, is_decided in ((needed, True), (round(0.9 * needed), False)):
            root = (40 / n) ** 0.5
            shrunk = replace(found, low=value - 2 * root, high=value + 3 * root)
            assert (condition.verdict(shrunk) != "cannot tell") is is_decided
        assert condition.prompts_needed(found, tests=4) >= needed

    @pytest.mark.parametrize("found", [None, effect(NAN, 1), effect(-1, 1), effect(1, 2)])
    def test_no_number_of_prompts_where_it_is_decided_or_on_its_bound(self, found):
        assert Condition("e", above=0).prompts_needed(found) is None

    def test_in_words(self):
        assert str(Condition("e", above=0)) == "e > 0"
        assert str(Condition("e", below=0.05)) == "e < 0.05"
        assert str(Condition("e", above=-0.25, below=0.25)) == "e > -0.25 and e < 0.25"


class TestUnions:
    def test_a_failure_among_many_conditions_must_be_surer(self):
        """At 0.05 / 4 an interval of 20 rows is 1.31 times as wide."""
        condition = Condition("e", above=0)
        near = Estimate(-1.0, -1.9, -0.1, (20, 0))
        assert condition.verdict(near) == "not replicated"
        assert condition.verdict(near, tests=4) == "cannot tell"
        assert condition.verdict(Estimate(-1.0, -1.7, -0.3, (20, 0)), tests=4) == "not replicated"

    def test_success_needs_no_correction_as_all_must_hold(self):
        barely = Estimate(1.0, 1e-9, 2.0, (20, 0))
        assert Condition("e", above=0).verdict(barely, tests=9) == "replicated"

    def test_four_conditions_at_their_bound_fail_together_as_often_as_one(self):
        """Each effect is truly 0; one of four intervals fails in 0.1, uncorrected."""
        rng = np.random.default_rng(0)
        one = Claim("c", "w", "x", "", tuple(Condition(f"e{k}", above=0) for k in range(4)))
        failed = 0
        for _ in range(2000):
            rows = rng.normal(size=(4, 9))
            halves = t.ppf(0.975, 8) * rows.std(1, ddof=1) / 3
            effects = {
                f"e{k}": Estimate(m, m - half, m + half, (9, 0))
                for k, (m, half) in enumerate(zip(rows.mean(1), halves, strict=True))
            }
            failed += one.verdict({"x": effects}) == "not replicated"
        assert failed / 2000 == pytest.approx(0.025, abs=0.008)


class TestClaim:
    def test_every_mix_of_verdicts(self):
        of = {"replicated": effect(1, 2), "not replicated": effect(-9, -8), "cannot tell": None}
        for mix in product(of, repeat=3):
            conditions = [Condition(f"e{n}", above=0) for n in range(3)]
            effects = {f"e{n}": of[v] for n, v in enumerate(mix) if of[v]}
            wanted = (
                "not replicated"
                if "not replicated" in mix
                else "replicated"
                if all(v == "replicated" for v in mix)
                else "cannot tell"
            )
            assert claim(*conditions).verdict({"template": effects}) == wanted

    def test_without_conditions_nothing_is_told(self):
        assert claim().verdict({"template": {"e": effect(1, 2)}}) == "cannot tell"

    def test_other_effects_do_not_matter(self):
        effects = {"template": {"e": effect(1, 2), "other": effect(-2, -1)}}
        assert claim(Condition("e", above=0)).verdict(effects) == "replicated"

    def test_each_kind_must_hold(self):
        one = claim(Condition("e", above=0, each=True))
        good = {"e: a": effect(1, 2), "e: b": effect(1, 2), "e, c": effect(-9, -8)}
        assert one.verdict({"template": good}) == "replicated"
        assert one.verdict({"template": good | {"e: b": effect(-9, -8)}}) == "not replicated"
        assert one.verdict({"template": good | {"e: b": effect(-1, 2)}}) == "cannot tell"
        assert one.verdict({"template": {"e, c": effect(1, 2)}}) == "cannot tell"


class TestForm:
    """The fourth verdict: replicated, but form explains it."""

    def verdict(self, main, form):
        conditions = (Condition("f", above=0), Condition("g", above=0, experiment="confound"))
        one = replace(claim(Condition("e", above=0)), form=conditions)
        here = {"e": main} | ({"f": form[0]} if form[0] else {})
        there = {"g": form[1]} if form[1] else {}
        return one.verdict({"template": here, "confound": there})

    @pytest.mark.parametrize(
        ("form", "wanted"),
        [
            ((effect(1, 2), effect(1, 2)), "replicated"),
            ((effect(1, 2), effect(-2, -1)), "replicated, but form explains it"),
            ((effect(-1, 2), effect(1, 2)), "replicated, but form explains it"),
            ((effect(-2, -1), effect(-2, -1)), "replicated, but form explains it"),
            ((effect(1, 2), None), "cannot tell"),
            ((None, effect(-2, -1)), "cannot tell"),
        ],
    )
    def test_all_form_conditions_must_hold(self, form, wanted):
        assert self.verdict(effect(1, 2), form) == wanted

    @pytest.mark.parametrize("main", [effect(-2, -1), effect(-1, 1)])
    def test_form_explains_nothing_that_is_not_replicated(self, main):
        wanted = "not replicated" if main.high < 0 else "cannot tell"
        assert self.verdict(main, (effect(-2, -1), effect(-2, -1))) == wanted

    def test_claims_about_what_is_read_at_t_inst_have_them(self):
        assert [n for n, one in enumerate(CLAIMS, 1) if one.form] == [2, 3, 7, 8, 9]


class TestTheClaims:
    def test_nine_and_four_findings(self):
        assert len(CLAIMS) == 13

    def test_each_can_be_decided_both_ways(self):
        for one in CLAIMS:
            good = all_good(one)
            assert one.verdict(good) == "replicated"
            for c in one.conditions:
                bad = with_effect(good, one, c, effect(*outside(c)))
                assert one.verdict(bad) == "not replicated"
                assert one.verdict(with_effect(good, one, c, None)) == "cannot tell"
            for c in one.form:
                bad = with_effect(good, one, c, effect(*outside(c)))
                assert one.verdict(bad) == "replicated, but form explains it"

    def test_each_is_measured_by_experiments_of_the_study(self):
        from latentguard.study.run import EXPERIMENTS

        for one in CLAIMS:
            every = (*one.conditions, *one.form)
            assert {c.experiment or one.experiment for c in every} <= set(EXPERIMENTS)
            names = [c.effect for c in every]
            assert len(set(names)) == len(names)
            assert all(c.above is not None or c.below is not None for c in every)


class TestSection:
    def test_nothing_has_run(self):
        claims, conditions = claims_section({}).parts
        assert [row[0] for row in claims.rows] == list(range(1, 14))
        assert {row[2] for row in claims.rows} == {"not run"}
        assert conditions.rows == ()

    def test_nothing_was_measured(self):
        claims, conditions = claims_section({one.experiment: {} for one in CLAIMS}).parts
        assert {row[2] for row in claims.rows} == {"cannot tell"}
        assert len(conditions.rows) == sum(len(one.conditions) + len(one.form) for one in CLAIMS)
        assert {row[3:] for row in conditions.rows} == {(*[None] * 5, "cannot tell")}

    def test_each_effect_beside_its_claim(self):
        first = CLAIMS[0]
        name = first.conditions[0].effect
        measured = replace(effect(0.1, 0.3), value=0.17, n=(30, 4))
        claims, conditions = claims_section({first.experiment: {name: measured}}).parts
        rule = f"{name} > 0"
        assert claims.rows[0][:8] == (1, first.name, "replicated", rule, 0.17, 0.1, 0.3, 34)
        rest = (None, "none", None, None, None, f"{first.where}: {first.paper}")
        assert claims.rows[0][8:] == rest
        row = (1, "the claim", f"{name} > 0", 0.17, 0.1, 0.3, 34, None, "replicated")
        assert conditions.rows[0] == row
        assert {row[2] for row in claims.rows[1:]} == {"not run"}

    def test_conditions_of_form_are_named_so(self):
        effects = merged(all_good(one) for one in CLAIMS)
        asks = [(row[0], row[1]) for row in claims_section(effects).parts[1].rows]
        assert ("form" in {what for n, what in asks if n == 2}) and (1, "form") not in asks

    def test_claims_about_refused_prompts_need_such(self):
        effects = merged(all_good(one) for one in CLAIMS)
        whole, few = (claims_section(effects, refused=refused) for refused in (True, False))
        assert {row[2] for row in whole.parts[0].rows} == {"replicated"}
        told = {row[0] for row in few.parts[0].rows if row[2] != "cannot tell"}
        assert told == {1, 6, 8, 11}
        assert told == {row[0] for row in few.parts[1].rows if row[-1] == "replicated"}
        assert "claims 2, 3, 4, 5, 7, 9, 10, 12, 13" in few.text
        assert "Too few" not in whole.text

    def test_an_effect_of_another_experiment_is_not_taken(self):
        name = CLAIMS[0].conditions[0].effect
        claims, _ = claims_section({"clusters": {name: effect(1, 2)}}).parts
        assert claims.rows[0][2] == "not run"

    def test_the_failing_condition_stands_beside_a_claim_that_fails(self):
        claim = CLAIMS[1]
        effects = merged([all_good(claim)])
        failing = claim.conditions[2].effect
        effects[claim.experiment] = {**effects[claim.experiment], failing: effect(0.4, 0.6)}
        row = claims_section(effects).parts[0].rows[1]
        assert row[2:4] == ("not replicated", f"{failing} < 0")
        assert row[5:7] == (0.4, 0.6)

    def test_form_that_explains_stands_beside_its_verdict(self):
        claim = CLAIMS[1]
        effects = merged([all_good(claim)])
        control = claim.form[1].effect
        effects["confound"] = {**effects["confound"], control: effect(-0.2, -0.1)}
        row = claims_section(effects).parts[0].rows[1]
        assert row[2] == "replicated, but form explains it"
        assert row[9].startswith(control) and row[11:13] == (-0.2, -0.1)

    def test_a_sentence_counts_the_verdicts(self):
        outcomes = {1: "replicated", 2: "not replicated", 3: "cannot tell", 4: "cannot tell"}
        assert count_outcomes(outcomes) == (
            "Of 4 claims, 1 is replicated (1), 1 is not replicated (2) and 2 cannot be told (3, 4)."
        )
        assert claims_section({}, about="It is small.").text == (
            f"Of {len(CLAIMS)} claims, {len(CLAIMS)} were not run "
            f"({', '.join(str(n + 1) for n in range(len(CLAIMS)))}). It is small."
        )

    def test_rows_fit_their_heads(self):
        for table in claims_section({one.experiment: {} for one in CLAIMS}).parts:
            assert {len(row) for row in table.rows} == {len(table.columns)}


def name_of(condition):
    return f"{condition.effect}: a kind" if condition.each else condition.effect


def all_good(one):
    """Effects with which a claim is replicated."""
    effects = {}
    for c in (*one.conditions, *one.form):
        of = effects.setdefault(c.experiment or one.experiment, {})
        of[name_of(c)] = effect(*inside(c))
    return effects


def with_effect(effects, one, condition, found):
    """The same with another effect, or without it."""
    at = condition.experiment or one.experiment
    of = {name: e for name, e in effects[at].items() if name != name_of(condition)}
    return effects | {at: of | ({name_of(condition): found} if found else {})}


def merged(every):
    found = {}
    for effects in every:
        for experiment, of in effects.items():
            found.setdefault(experiment, {}).update(of)
    return found


def inside(condition):
    if condition.above is not None and condition.below is not None:
        span = condition.below - condition.above
        return condition.above + span / 4, condition.below - span / 4
    if condition.above is not None:
        return condition.above + 0.01, condition.above + 0.02
    return condition.below - 0.02, condition.below - 0.01


def outside(condition):
    if condition.above is not None:
        return condition.above - 0.5, condition.above - 0.4
    return condition.below + 0.4, condition.below + 0.5
