"""Thresholds by segment, the band to review, probabilities; saved and loaded."""

from dataclasses import replace

import numpy as np
import pytest

from fake_backend import FakeBackend, labelled, texts
from guard_files import edit_guard
from latentguard.errors import GuardError
from latentguard.guard.artifact import CARD_FILE
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.probabilities import IsotonicMap
from latentguard.guard.reading_plan import Version
from latentguard.guard.thresholds import MAX_SCORES, Rates, SegmentThresholds
from latentguard.prompts import Prompt

LADDER = IsotonicMap((-1.0, 0.0, 1.0), (0.1, 0.5, 0.9))
LANGUAGES = {"en": 300, "de": 120, "fr": 20}


def traffic(counts, *, start=5000):
    """Harmless prompts of some segments; German ones score higher: half of them say "bad"."""
    found = []
    for name, count in counts.items():
        for n, text in enumerate(texts(count, bad=False, start=start, name=name or "item")):
            worse = text.replace("good", "bad") if name == "de" and n % 2 else text
            found.append(Prompt(worse, id=f"{name}-{n}", harmful=False, segment=name))
    return found


@pytest.fixture(scope="module")
def backend():
    return FakeBackend(signal=0.6)


@pytest.fixture(scope="module")
def plain(backend):
    return LatentGuard.fit(backend, labelled(80))


@pytest.fixture(scope="module")
def guard(backend, plain):
    return plain.calibrate(
        backend, traffic(LANGUAGES), max_fpr=0.05, review_fpr=0.2, segment_column="language"
    )


class TestSegments:
    def test_each_that_has_enough_gets_its_own(self, guard):
        part = guard.thresholds
        assert set(part.segments) == {"en", "de"}
        assert part.small == {"fr": 20}
        assert part.column == "language"
        assert part.common.block == guard.bound
        assert part.common.block.n == 440
        assert part.segments["de"].block.n == 120
        assert part.segments["de"].block.threshold > part.segments["en"].block.threshold
        assert part.for_segment("fr") is part.for_segment(None) is part.common
        assert part.for_segment("nl") is part.common

    def test_the_rate_is_kept_in_each(self, backend, guard):
        fresh = traffic({"en": 400, "de": 400}, start=90_000)
        found = list(guard.scan(backend, fresh))
        for name in ("en", "de"):
            own = [v.flagged for v, p in zip(found, fresh, strict=True) if p.segment == name]
            assert np.mean(own) < 0.07

    def test_a_prompt_of_a_segment_is_judged_by_it(self, backend, guard):
        part = guard.thresholds
        between = (part.segments["en"].block.threshold + part.segments["de"].block.threshold) / 2
        assert [part.decide(name, between) for name in ("en", "de")] == ["block", "allow"]
        (score,) = guard.score(backend, iter([Prompt("x")]))
        version = Version((), replace(score, score=between), ())
        prompts = [Prompt("x", segment=name) for name in ("en", "de")]
        assert [guard.decide(p, version).flagged for p in prompts] == [True, False]

    def test_without_segments(self, backend, plain):
        found = plain.calibrate(backend, traffic({None: 100}), max_fpr=0.05).thresholds
        assert (found.segments, found.small) == ({}, {})


class TestDecisions:
    def test_allow_review_block(self, backend, guard):
        fresh = traffic({None: 600}, start=200_000) + labelled(200, start=300_000)
        found = list(guard.scan(backend, fresh))
        limits = guard.thresholds.common
        for verdict in found:
            if verdict.score > limits.block.threshold:
                assert (verdict.decision, verdict.flagged) == ("block", True)
            elif verdict.score > limits.review.threshold:
                assert (verdict.decision, verdict.flagged) == ("review", False)
            else:
                assert (verdict.decision, verdict.flagged) == ("allow", False)
        assert {v.decision for v in found} == {"allow", "review", "block"}

    def test_without_a_band_there_is_no_review(self, backend, plain):
        guard = plain.calibrate(backend, traffic({None: 100}), max_fpr=0.05)
        found = {v.decision for v in guard.scan(backend, labelled(100))}
        assert found == {"allow", "block"}

    def test_both_rates_are_promised(self, guard):
        limits = guard.thresholds.common
        assert limits.block.upper <= 0.05
        assert 0.05 < limits.review.upper <= 0.2
        assert limits.review.threshold < limits.block.threshold

    @pytest.mark.parametrize("review", [0.05, 0.01, 1.0, -1])
    def test_a_band_upside_down(self, backend, plain, review):
        with pytest.raises(GuardError, match="between the rate to flag at"):
            plain.calibrate(backend, traffic({None: 100}), max_fpr=0.05, review_fpr=review)

    def test_the_guards_own_threshold_decides_where_no_segment_does(self, backend, guard):
        """It can be changed by hand; the part must not bring the old one back."""
        there = replace(guard, threshold=1e9)
        assert not any(v.flagged for v in there.scan(backend, texts(20, bad=True)))


class TestProbabilities:
    @pytest.fixture(scope="class")
    def likely(self, backend, plain):
        prompts = [p for p in labelled(300, start=40_000) if p.harmful or p.id.endswith("False")]
        return plain.calibrate(backend, prompts, max_fpr=0.05)

    def test_harmful_prompts_set_no_threshold(self, backend, plain, likely):
        assert likely.bound.n == 300
        harmless = [p for p in labelled(300, start=40_000) if not p.harmful]
        alone = plain.calibrate(backend, harmless, max_fpr=0.05)
        assert alone.threshold == pytest.approx(likely.threshold, abs=1e-6)

    def test_they_fit(self, likely, plain):
        found = likely.thresholds.reliability
        assert found.n == (300, 300)
        assert found.after.low < 0.05
        assert likely.platt != plain.platt

    def test_an_isotonic_map_is_used(self, backend, likely):
        part = likely.thresholds
        there = replace(likely, thresholds=replace(part, isotonic=LADDER))
        found = [v.probability for v in there.scan(backend, texts(5, bad=True))]
        scores = [v.score for v in likely.scan(backend, texts(5, bad=True))]
        assert found == pytest.approx(
            np.interp(scores, LADDER.scores, LADDER.probabilities).tolist()
        )

    def test_they_outlive_another_calibration_of_the_threshold(self, backend, likely):
        again = likely.calibrate(backend, traffic({None: 100}), max_fpr=0.05)
        assert again.thresholds.reliability == likely.thresholds.reliability
        assert again.platt == likely.platt


class TestKept:
    def test_bit_for_bit(self, backend, guard, tmp_path):
        there = replace(guard, thresholds=replace(guard.thresholds, isotonic=LADDER))
        there.save(tmp_path)
        loaded = LatentGuard.load(tmp_path, backend)
        fresh = traffic({"en": 20, "de": 20, "fr": 20})
        assert loaded.digest == there.digest
        assert list(loaded.scan(backend, fresh)) == list(there.scan(backend, fresh))

    def test_the_card(self, guard, tmp_path):
        guard.save(tmp_path)
        card = (tmp_path / CARD_FILE).read_text()
        assert "| all | 440 |" in card
        assert "| fr | 20 | as all |" in card
        assert "too few prompts" in card

    @pytest.mark.parametrize(
        "damage",
        [
            lambda c: c["bounds"].pop(),
            lambda c: c.pop("segments"),
            lambda c: c["bounds"][0]["block"].update(threshold=float("nan")),
            lambda c: c["bounds"][0].update(block=None),
            lambda c: c.update(isotonic={"scores": [1]}),
            lambda c: c.update(reliability={}),
            lambda c: c.update(reliability=3),
        ],
    )
    def test_damage(self, guard, tmp_path, damage):
        guard.save(tmp_path)
        edit_guard(tmp_path, lambda record: damage(record["thresholds"]))
        with pytest.raises(GuardError, match="damaged"):
            LatentGuard.load(tmp_path)

    def test_scores_are_sorted_and_not_too_many(self):
        scores = np.random.default_rng(0).normal(size=3 * MAX_SCORES)
        kept = SegmentThresholds.of(scores, Rates(0.05)).scores
        assert (len(kept), kept.dtype) == (MAX_SCORES, np.float32)
        assert (np.diff(kept) >= 0).all()
        assert (kept[0], kept[-1]) == pytest.approx((scores.min(), scores.max()))
        assert np.median(kept) == pytest.approx(np.median(scores), abs=1e-3)
