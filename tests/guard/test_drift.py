"""Drift: the arithmetic by brute force, quiet on the same traffic, loud on other."""

import json
from math import log

import numpy as np
import pytest
from scipy.stats import ks_2samp

from fake_backend import FakeBackend, bare, labelled, texts
from latentguard.errors import GuardError
from latentguard.guard.drift import (
    bin_edges,
    bin_shares,
    compare,
    holm,
    population_stability,
    round_to_steps,
)
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt


class TestArithmetic:
    def test_stability_by_brute_force(self):
        rng = np.random.default_rng(0)
        known, live = rng.normal(size=500), rng.normal(0.5, 1, 300)
        edges = bin_edges(known)
        parts = np.diff([0, *np.searchsorted(np.sort(known), edges), 500])
        assert len(edges) == 9 and 40 <= parts.min() <= parts.max() <= 60  # about ten equal parts
        total = 0.0
        for low, high in zip([-np.inf, *edges], [*edges, np.inf], strict=True):
            a = (((live > low) & (live <= high)).sum() + 0.5) / (300 + 5)
            e = (((known > low) & (known <= high)).sum() + 0.5) / (500 + 5)
            total += (a - e) * log(a / e)
        found = population_stability(bin_shares(live, edges), bin_shares(known, edges))
        assert found == pytest.approx(total)

    @pytest.mark.parametrize("at", [0.3, 0.25, 5.0, -5.0])
    @pytest.mark.parametrize("other", [1e-7, -1e-7, 1e-3])
    @pytest.mark.parametrize("known_twice", [False, True])
    def test_a_prompt_that_is_often_asked_has_not_moved_by_rounding(self, at, other, known_twice):
        """Its copies score alike in one batch, and a little otherwise in another."""
        rng = np.random.default_rng(0)
        known = np.concatenate([rng.normal(size=400), np.full(200, at)])
        known[-100:] += other * known_twice
        live = np.concatenate([rng.normal(size=400), np.full(200, at + other)])
        edges = bin_edges(known)
        assert population_stability(bin_shares(live, edges), bin_shares(known, edges)) < 0.1
        assert ks_2samp(*round_to_steps(live, known, 1.0)).pvalue > 0.1

    def test_what_has_moved_is_seen_in_steps(self):
        rng = np.random.default_rng(0)
        known, live = rng.normal(size=2000), rng.normal(0.2, 1, 2000)
        assert ks_2samp(*round_to_steps(live, known, 1.0)).pvalue < 1e-3
        assert ks_2samp(*round_to_steps(known[::2], known[1::2], 1.0)).pvalue > 0.05
        alike = round_to_steps(np.zeros(30), np.zeros(30), 0.5)
        assert not np.any(alike)

    def test_too_few_to_cut(self):
        assert bin_edges(range(19)) == []
        assert len(bin_edges(range(20))) == 9

    @pytest.mark.parametrize(
        ("chances", "corrected"),
        [
            ([0.01], [0.01]),
            ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
            ([0.5, 0.9], [1.0, 1.0]),
            ([], []),
        ],
    )
    def test_holm(self, chances, corrected):
        assert holm(chances) == pytest.approx(corrected)

    def test_holm_keeps_the_family_wise_rate(self):
        rng = np.random.default_rng(0)
        false = [min(holm(rng.random(5).tolist())) < 0.05 for _ in range(2000)]
        assert np.mean(false) < 0.06


@pytest.fixture(scope="module")
def guard():
    prompts = [
        Prompt(text, segment=name)
        for name, count in (("en", 300), ("de", 200))
        for text in texts(count, bad=False, start=5000, name=name)
    ]
    backend = FakeBackend(signal=0.6)
    fitted = LatentGuard.fit(backend, labelled(60))
    return fitted.calibrate(backend, prompts, max_fpr=0.05, segment_column="segment")


def live(guard, count, shift=0.0, seed=0, part="en"):
    """Verdicts drawn from the calibration's own scores, moved."""
    known = guard.thresholds.for_segment(part)
    drawn = np.random.default_rng(seed).choice(known.scores, count) + shift * guard.spread
    prompts = [Prompt("x", segment=part)] * count
    decide = guard.thresholds.decide
    return prompts, [Verdict("1", float(s), 0.5, decide(part, s) == "block", {}) for s in drawn]


class TestCompare:
    def test_the_same_traffic(self, guard):
        found = compare(guard, *live(guard, 400))
        assert [one.traffic for one in found] == ["all", "en"]
        assert all(one.holds and not one.has_moved for one in found)
        assert found[1].calibration_n == 300
        assert found[1].stability < 0.1

    def test_false_alarms_are_rare(self, guard):
        told = [all(o.holds for o in compare(guard, *live(guard, 100, seed=n))) for n in range(100)]
        assert sum(told) >= 93

    def test_another_traffic(self, guard):
        found = compare(guard, *live(guard, 200, shift=1.0))
        assert not found[0].holds
        assert found[0].has_moved
        assert found[0].stability > 0.25
        assert "the threshold no longer holds" in str(found[0])

    def test_scores_may_move_where_it_does_not_matter(self, guard):
        (found, _) = compare(guard, *live(guard, 200, shift=-1.0))
        assert (found.holds, found.has_moved) == (True, True)
        assert "the threshold holds" in str(found)
        assert "scores have moved" in str(found)

    def test_few_prompts_prove_nothing(self, guard):
        (found, _) = compare(guard, *live(guard, 5))
        assert found.stability is None
        assert "so few prompts cannot prove it" in str(found)

    def test_one_segment_among_several(self, guard):
        calm, moved = live(guard, 200), live(guard, 200, shift=1.0, part="de")
        found = compare(guard, calm[0] + moved[0], calm[1] + moved[1])
        by_name = {one.traffic: one.holds for one in found}
        assert (by_name["en"], by_name["de"]) == (True, False)

    def test_a_segment_without_limits_is_compared_with_the_rest_alone(self, guard):
        prompts, verdicts = live(guard, 50, part="nl")
        assert [one.traffic for one in compare(guard, prompts, verdicts)] == ["all"]

    def test_as_json(self, guard):
        row = json.loads(json.dumps(compare(guard, *live(guard, 200))[0].to_dict()))
        assert row["n"] == 200
        assert row["holds"] is True
        assert row["says"].startswith("all: ")

    def test_what_cannot_be_compared(self, guard):
        with pytest.raises(GuardError, match="no calibration"):
            compare(bare(guard), *live(guard, 5))
        with pytest.raises(GuardError, match="no prompt"):
            compare(guard, [], [])
