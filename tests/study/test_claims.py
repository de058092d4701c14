"""The rules of the claims, against every point of an interval."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentguard.stats.estimate import Estimate
from latentguard.study.claims import CLAIMS, Claim, Condition, claims_section

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

    def test_in_words(self):
        assert str(Condition("e", above=0)) == "e > 0"
        assert str(Condition("e", below=0.05)) == "e < 0.05"
        assert str(Condition("e", above=-0.25, below=0.25)) == "e > -0.25 and e < 0.25"


class TestClaim:
    def test_every_mix_of_verdicts(self):
        of = {"replicated": effect(1, 2), "not replicated": effect(-2, -1), "cannot tell": None}
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
            assert claim(*conditions).verdict(effects) == wanted

    def test_without_conditions_nothing_is_told(self):
        assert claim().verdict({"e": effect(1, 2)}) == "cannot tell"

    def test_other_effects_do_not_matter(self):
        effects = {"e": effect(1, 2), "other": effect(-2, -1)}
        assert claim(Condition("e", above=0)).verdict(effects) == "replicated"


class TestTheNine:
    def test_each_can_be_decided_both_ways(self):
        assert len(CLAIMS) == 9
        for one in CLAIMS:
            good = {c.effect: effect(*inside(c)) for c in one.conditions}
            assert one.verdict(good) == "replicated"
            for c in one.conditions:
                assert one.verdict(good | {c.effect: effect(*outside(c))}) == "not replicated"
                assert one.verdict({k: v for k, v in good.items() if k != c.effect}) == (
                    "cannot tell"
                )

    def test_each_is_measured_by_one_experiment(self):
        from latentguard.study.run import EXPERIMENTS

        assert {one.experiment for one in CLAIMS} <= set(EXPERIMENTS)
        for one in CLAIMS:
            names = [c.effect for c in one.conditions]
            assert len(set(names)) == len(names)
            assert all(c.above is not None or c.below is not None for c in one.conditions)


class TestSection:
    def test_nothing_has_run(self):
        claims, conditions = claims_section({}).parts
        assert [row[0] for row in claims.rows] == list(range(1, 10))
        assert {row[3] for row in claims.rows} == {"not run"}
        assert conditions.rows == ()

    def test_nothing_was_measured(self):
        claims, conditions = claims_section({one.experiment: {} for one in CLAIMS}).parts
        assert {row[3] for row in claims.rows} == {"cannot tell"}
        assert len(conditions.rows) == sum(len(one.conditions) for one in CLAIMS)
        assert {row[2:] for row in conditions.rows} == {(None, None, None, None, "cannot tell")}

    def test_each_effect_beside_its_claim(self):
        first = CLAIMS[0]
        name = first.conditions[0].effect
        measured = replace(effect(0.1, 0.3), value=0.17, n=(30, 4))
        claims, conditions = claims_section({first.experiment: {name: measured}}).parts
        assert claims.rows[0] == (1, first.name, first.where, "replicated", first.paper)
        assert conditions.rows[0] == (1, f"{name} > 0", 0.17, 0.1, 0.3, 34, "replicated")
        assert {row[3] for row in claims.rows[1:]} == {"not run"}

    def test_claims_about_refused_prompts_need_such(self):
        effects = {
            one.experiment: {c.effect: effect(*inside(c)) for c in one.conditions} for one in CLAIMS
        }
        whole, few = (claims_section(effects, refused=refused) for refused in (True, False))
        assert {row[3] for row in whole.parts[0].rows} == {"replicated"}
        told = {row[0] for row in few.parts[0].rows if row[3] != "cannot tell"}
        assert told == {1, 6, 8} == {row[0] for row in few.parts[1].rows if row[-1] == "replicated"}
        assert "claims 2, 3, 4, 5, 7, 9" in few.text
        assert "Too few" not in whole.text

    def test_an_effect_of_another_experiment_is_not_taken(self):
        name = CLAIMS[0].conditions[0].effect
        claims, _ = claims_section({"clusters": {name: effect(1, 2)}}).parts
        assert claims.rows[0][3] == "not run"

    def test_rows_fit_their_heads(self):
        for table in claims_section({one.experiment: {} for one in CLAIMS}).parts:
            assert {len(row) for row in table.rows} == {len(table.columns)}


def inside(condition):
    if condition.above is not None and condition.below is not None:
        span = condition.below - condition.above
        return condition.above + span / 4, condition.below - span / 4
    if condition.above is not None:
        return condition.above + 0.01, condition.above + 0.02
    return condition.below - 0.02, condition.below - 0.01


def outside(condition):
    if condition.above is not None:
        return condition.above - 0.02, condition.above - 0.01
    return condition.below + 0.01, condition.below + 0.02
