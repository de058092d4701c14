"""Thresholds of chats: the stated rate is that of a chat, however many texts of it are read."""

from dataclasses import replace

import numpy as np
import pytest

from latentguard.errors import GuardError
from latentguard.guard.thresholds import MAX_SCORES, Rates, SegmentThresholds, thin_scores
from latentguard.guard.verdict import Verdict
from latentguard.serve.chat_thresholds import ChatThresholds, shares_of, threshold_at
from latentguard.serve.served_guards import ServedGuards
from serve.running import band_guard, tiny_guard

DISTRIBUTIONS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "logistic": lambda rng, size: rng.logistic(size=size),
    "exponential": lambda rng, size: rng.exponential(size=size),
    "uniform": lambda rng, size: rng.uniform(size=size),
}


@pytest.mark.parametrize("turns", [1, 2, 5, 20])
@pytest.mark.parametrize("n", [400, 3000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_of_harmless_chats_no_more_are_flagged_than_stated(name, n, turns):
    """Of chats of so many independent messages; with 400 prompts, most of it is extrapolated."""
    draw, rng, rates = DISTRIBUTIONS[name], np.random.default_rng(0), Rates(0.01)
    newest = [False] * (turns - 1) + [True]
    shares = shares_of(newest)
    flagged = []
    for _ in range(20):
        known = SegmentThresholds.of(draw(rng, n), rates)
        at = {share: threshold_at(known.scores, known.block, share) for share in set(shares)}
        chats = draw(rng, (2000, turns))
        flagged.append((chats > [at[share] for share in shares]).any(1).mean())
    assert np.mean(flagged) <= 0.01
    assert np.quantile(flagged, 0.9) <= 0.015


def test_shares_are_at_most_the_whole():
    for count in range(1, 60):
        for recent in range(1, count + 1):
            assert sum(shares_of([True] * recent + [False] * (count - recent))) <= 1


def test_a_long_history_raises_the_threshold_of_a_new_message_once():
    assert shares_of([True]) == [1.0]
    assert shares_of([True, False])[0] == shares_of([True] + [False] * 100)[0] == 0.5


def test_a_smaller_share_has_a_higher_threshold():
    known = SegmentThresholds.of(np.random.default_rng(0).normal(size=500), Rates(0.01))
    found = [threshold_at(known.scores, known.block, 2.0**-n) for n in range(10)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(known.block.threshold, abs=1e-6)


def verdict(score):
    return Verdict("a", score, 0.5, False, {"harmful": 0.0})


def test_the_most_severe_reading_decides_by_its_own_threshold():
    guard = band_guard()
    thresholds = ChatThresholds(guard)
    alone = thresholds.decide([verdict(guard.threshold + 0.01)], [True], [None])
    assert alone.threshold == guard.threshold
    several = [guard.threshold - 1, guard.threshold + 9, guard.threshold - 2]
    decided = thresholds.decide(list(map(verdict, several)), [False, False, True], [None] * 3)
    assert decided.index == 1
    assert decided.verdict.flagged
    assert decided.threshold > guard.threshold


@pytest.mark.parametrize("padding", [0, 1, 5, 100])
def test_with_a_rate_of_each_text_padding_gains_nothing(padding):
    thresholds, edge = ChatThresholds(band_guard()), band_guard().threshold
    blocked = replace(verdict(edge + 1e-6), decision="block", flagged=True)
    verdicts = [*[verdict(edge - 9)] * padding, blocked]
    readings = [False] * padding + [True], [None] * (padding + 1)
    by_text = thresholds.decide(verdicts, *readings, rate_of="text")
    assert (by_text.verdict.decision, by_text.threshold) == ("block", edge)
    by_chat = thresholds.decide(verdicts, *readings)
    assert by_chat.verdict.flagged is (padding == 0)


def test_readings_that_are_missing_are_passed_over():
    decided = ChatThresholds(tiny_guard()).decide([None, verdict(9.0)], [True, False], [None] * 2)
    assert (decided.index, decided.verdict.decision) == (1, "block")


def test_a_guard_without_calibration_has_one_threshold():
    guard = tiny_guard()
    decided = ChatThresholds(guard).decide([verdict(0.0)] * 3, [False, False, True], [None] * 3)
    assert decided.threshold == guard.threshold


def test_an_unknown_segment_has_the_common_thresholds():
    guard = replace(band_guard())
    scores = [verdict(guard.threshold)] * 2
    found = [
        ChatThresholds(guard).decide(scores, [False, True], [s] * 2).threshold for s in (None, "x")
    ]
    assert found[0] == found[1]


class TestSecondOpinions:
    """Of readings in the band that their chat's thresholds leave."""

    def decide(self, guard, opinion, readings):
        review = guard.thresholds.common.review.threshold
        inside = (review + guard.threshold) / 2 if readings == 1 else guard.threshold + 1e-6
        verdicts = [replace(verdict(inside), second_opinion=opinion)] * readings
        return ChatThresholds(guard).decide(verdicts, [True] * readings, [None] * readings)

    @pytest.mark.parametrize("readings", [1, 2])
    @pytest.mark.parametrize("opinion", ["allow", "block", "failed"])
    def test_one_decides(self, opinion, readings):
        guard = band_guard()
        decided = self.decide(guard, opinion, readings)
        expected = "review" if opinion == "failed" else opinion
        assert decided.verdict.decision == expected
        assert decided.verdict.flagged is (expected == "block")
        assert decided.verdict.second_opinion == opinion
        assert (decided.verdict.score > decided.threshold) is (expected == "block")

    def test_one_of_a_reading_outside_of_the_band_is_left_out(self):
        guard = band_guard()
        for score, decision in ((guard.threshold + 9, "block"), (-99.0, "allow")):
            opinion = replace(verdict(score), second_opinion="allow")
            decided = ChatThresholds(guard).decide([opinion], [True], [None])
            assert decided.verdict.decision == decision
            assert decided.verdict.second_opinion is None

    def test_a_share_never_lowers_a_review_threshold_that_a_calibration_raised(self):
        guard = band_guard()
        common = guard.thresholds.common
        raised = (common.review.threshold + guard.threshold) / 2
        common = replace(common, review=replace(common.review, max_fpr=0.9, threshold=raised))
        strict = ChatThresholds(replace(guard, thresholds=replace(guard.thresholds, common=common)))
        below = [verdict(raised - 1e-6)]
        for count in (1, 2, 8):
            decided = strict.decide(below * count, [True] * count, [None] * count)
            assert decided.verdict.decision == "allow"


def with_rate(guard, rate):
    """A guard whose rate was written over."""
    common = guard.thresholds.common
    common = replace(common, block=replace(common.block, max_fpr=rate))
    return replace(guard, thresholds=replace(guard.thresholds, common=common))


@pytest.mark.parametrize("rate", [1e-6, 0.0])
def test_a_threshold_that_cannot_be_had_is_found_at_load(rate):
    """Not at the first chat, which would be answered 500."""
    guard = with_rate(band_guard(), rate)
    with pytest.raises(GuardError, match=r"cannot judge chats.* Calibrate it again"):
        ServedGuards.meet(guard, None, bind=lambda one, _: one)
    with pytest.raises(GuardError, match="cannot judge chats"):
        ServedGuards.meet(
            tiny_guard(), None, named_guards={"strict": guard}, bind=lambda one, _: one
        )


def test_thinned_scores_do_for_a_rate_that_all_of_them_promised():
    scores = np.random.default_rng(0).normal(size=4 * MAX_SCORES)
    known = SegmentThresholds.of(scores, Rates(1e-4))
    thinned = replace(known, scores=thin_scores(scores, MAX_SCORES))
    half = threshold_at(thinned.scores, thinned.block, 0.5)
    assert half > threshold_at(thinned.scores, thinned.block, 1.0)
