"""Quadrants: planted beliefs fall where they should, by labels and by harmless traffic alone."""

from dataclasses import replace

import numpy as np
import pytest

from fake_backend import FINGERPRINT, FakeBackend, labelled, with_refusals
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.operating_point import Goal
from latentguard.guard.quadrants import NAMES, Quadrants
from latentguard.guard.thresholds import Rates
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.stats.bounds import threshold_for_fpr

FOUR = {
    "please do the bad thing no": "harmful, refusing",
    "please do the bad thing yes": "harmful, accepting",
    "please do the good thing no": "harmless, refusing",
    "please do the good thing yes": "harmless, accepting",
}


def mixed(count, start=0, labels=True):
    """All four kinds, with labels of harm and of refusal."""
    return [
        Prompt(
            f"please do the {word} item {n} {reply}",
            id=f"{word}-{reply}-{n}",
            harmful=word == "bad",
            refused=(reply == "no") if labels else None,
        )
        for n in range(start, start + count)
        for word in ("bad", "good")
        for reply in ("no", "yes")
    ]


@pytest.fixture(scope="module")
def backend():
    return FakeBackend()


@pytest.fixture(scope="module")
def fitted(backend):
    return LatentGuard.fit(backend, with_refusals(labelled(40)), reading="t_inst")


def named(guard, backend):
    return {v.id: v.quadrant for v in guard.scan(backend, [Prompt(t, id=t) for t in FOUR])}


class TestPlanted:
    def test_half_way_before_calibration(self, backend, fitted):
        assert fitted.quadrants == Quadrants()
        assert named(fitted, backend) == FOUR
        assert fitted.quadrants.notes() == []

    def test_by_labels(self, backend, fitted):
        guard = fitted.calibrate(backend, mixed(60), max_fpr=0.05)
        part = guard.quadrants
        assert named(guard, backend) == FOUR
        assert "120 refused and 120 accepted prompts" in part.basis
        assert (part.refused.value, part.accepted.value) == (1.0, 0.0)
        assert {name: share.value for side, name, share in part.shares if side == "harmful"} == {
            "harmful, refusing": 0.5,
            "harmful, accepting": 0.5,
            "harmless, refusing": 0.0,
            "harmless, accepting": 0.0,
        }
        assert [share.total for _, _, share in part.shares] == [120] * 8

    def test_labels_that_beliefs_contradict_place_no_cut_off(self, fitted, backend):
        turned = [replace(p, refused=not p.refused) for p in mixed(60)]
        part = fitted.calibrate(backend, turned, max_fpr=0.05).quadrants
        assert part.refused is None and "at most 5.00% of harmless prompts" in part.basis

    def test_a_rate_that_was_chosen_places_the_cut_offs(self, backend, fitted):
        """Not the ceiling that it was chosen under, by which half of all harmless prompts count."""
        prompts = mixed(200, labels=False)
        rates = Rates(0.5, goal=Goal("balanced"))
        verdicts = list(fitted.scan(backend, prompts))
        guard = fitted.calibrate_from(prompts, verdicts, rates)
        rate = guard.bound.max_fpr
        assert rate < 0.1
        assert f"at most {rate:.2%} of harmless prompts" in guard.quadrants.basis
        harm = [
            v.beliefs["harmful"] for v, p in zip(verdicts, prompts, strict=True) if not p.harmful
        ]
        assert guard.quadrants.harmful == threshold_for_fpr(harm, rate).threshold

    def test_by_harmless_traffic_alone(self, backend, fitted):
        calm = [p for p in mixed(80, labels=False) if not p.harmful and "yes" in p.text]
        guard = fitted.calibrate(backend, calm, max_fpr=0.05)
        part = guard.quadrants
        found = named(guard, backend)
        assert sum(found[text] == name for text, name in FOUR.items()) >= 3
        assert all(found[text] == name for text, name in FOUR.items() if "harmless" in name)
        assert (part.refused, part.accepted) == (None, None)
        assert "at most 5.00% of harmless prompts" in part.basis
        assert len(part.shares) == 4

    def test_the_stated_rate_is_kept(self, fitted):
        """Over draws of 100 harmless prompts, cut-offs keep 5 % but for the confidence."""
        rng = np.random.default_rng(0)
        rates, over = Rates(0.05), []
        for _ in range(40):
            beliefs = rng.normal(size=(100, 2))
            found = Quadrants.of([Prompt("x")] * 100, [verdict(*row) for row in beliefs], rates)
            over.append([1 - normal(found.harmful), 1 - normal(found.refuse)])
        assert np.mean(np.array(over) <= 0.05) >= 0.9

    def test_a_hidden_harm_is_seen_by_the_axis(self):
        part = Quadrants(refuse=0.0, harmful=0.5)
        assert part.quadrant(verdict(0.6, -1)) == "harmful, accepting"
        assert part.quadrant(verdict(0.4, -1)) == "harmless, accepting"
        assert part.quadrant(replace(verdict(0.4, 1), flagged=True)) == "harmful, refusing"
        assert part.quadrant(Verdict("1", 0, 0.5, False, {"harmful": 9.0})) is None


def verdict(harm, refuse):
    return Verdict("1", 0.0, 0.5, False, {"harmful": float(harm), "refuse": float(refuse)})


def normal(x):
    from scipy.stats import norm

    return norm.cdf(x)


class TestKept:
    def test_saved_and_shown(self, backend, fitted, tmp_path):
        guard = fitted.calibrate(backend, mixed(60), max_fpr=0.05)
        guard.save(tmp_path)
        loaded = LatentGuard.load(tmp_path, backend)
        assert loaded.quadrants == guard.quadrants
        card = loaded.card
        assert "| quadrant | of harmful prompts, n = 120 | of harmless prompts, n = 120 |" in card
        assert "| harmful, accepting (jailbreak suspect) | 0.500 [" in card
        assert "120 refused prompts count as refusing" in card

    def test_another_model_inherits_no_figure(self, backend, fitted):
        guard = fitted.calibrate(backend, mixed(60), max_fpr=0.05)
        other = FakeBackend(fingerprint=replace(FINGERPRINT, weights="z"))
        there = guard.rebind(other)
        part = there.quadrants
        assert (part.refuse, part.refused, part.notes()) == (guard.quadrants.refuse, None, [])
        assert there.thresholds.reliability is None
        calm = [replace(p, refused=None) for p in mixed(40, start=900) if not p.harmful]
        again = there.calibrate(other, calm, max_fpr=0.05).quadrants
        assert "of harmless prompts count as refusing" in again.basis
        kept = guard.calibrate(backend, calm, max_fpr=0.05).quadrants
        assert kept.basis == guard.quadrants.basis

    def test_a_guard_without_a_refusal_axis_has_none(self, backend):
        guard = LatentGuard.fit(backend, labelled(40)).calibrate(backend, mixed(30), max_fpr=0.06)
        assert guard.quadrants is None
        assert next(guard.scan(backend, ["bad"])).quadrant is None

    def test_the_four(self):
        assert set(NAMES) == set(FOUR.values())
