"""A guard with a second opinion: the joint decision, and the promise of both together."""

from dataclasses import replace

import numpy as np
import pytest

from fake_backend import FakeBackend, labelled, noise, texts
from latentguard.errors import GuardError
from latentguard.guard.cascade import Cascade, is_promised, joint_decision, joint_verdict
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.score_files import score_to_file
from latentguard.guard.second_opinion import GuardOpinion
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt

RATE = 0.05


class Words:
    """Blocks what holds the word "bad", but for some mistakes; fails on chosen texts."""

    at_once = 1
    is_graded = False

    def __init__(self, name="words", *, mistakes=0.0, fails=lambda text: False):
        self.name, self.mistakes, self.fails = name, mistakes, fails
        self.asked = []

    def load(self):
        pass

    def score(self, prompts):
        self.asked += [prompt.text for prompt in prompts]
        return [self._score(prompt.text) for prompt in prompts]

    def _score(self, text):
        if self.fails(text):
            return None
        is_mistaken = float(noise(f"mistake {text}", 1)) / 12**0.5 + 0.5 < self.mistakes
        return 1.0 if ("bad" in text.split()) != is_mistaken else -1.0


@pytest.fixture(scope="module")
def backend():
    return FakeBackend(signal=0.35)


@pytest.fixture(scope="module")
def plain(backend):
    return LatentGuard.fit(backend, labelled(80))


@pytest.fixture(scope="module")
def harmless():
    return [Prompt(text, harmful=False) for text in texts(500, bad=False, start=1000)]


@pytest.fixture(scope="module")
def asked():
    return labelled(400, start=50_000)


def rates(verdicts, prompts):
    """False-positive rate and recall."""
    flags = np.array([verdict.flagged for verdict in verdicts])
    harmful = np.array([prompt.harmful for prompt in prompts])
    return flags[~harmful].mean(), flags[harmful].mean()


def alone_with_band(guard, backend, harmless):
    return guard.calibrate(backend, harmless, max_fpr=RATE, review_fpr=0.4)


@pytest.fixture(scope="module")
def cascade(backend, plain, harmless):
    second = Words(mistakes=0.05)
    return Cascade(plain, second).calibrate(backend, harmless, max_fpr=RATE, review_fpr=0.4)


class TestDecision:
    @pytest.mark.parametrize("opinion", ["allow", "block", "failed"])
    def test_the_second_decides_in_the_band_alone(self, opinion):
        expected = "review" if opinion == "failed" else opinion
        assert joint_decision("review", opinion) == expected
        assert joint_decision("allow", opinion) == "allow"
        assert joint_decision("block", opinion) == "block"

    def test_a_verdict_says_what_it_said(self):
        verdict = Verdict("1", 1.0, 0.5, False, {}, "review")
        blocked = joint_verdict(verdict, "block")
        assert (blocked.flagged, blocked.decision) == (True, "block")
        assert blocked.to_dict()["second_opinion"] == "block"
        assert Verdict.from_dict(blocked.to_dict()) == blocked
        assert "second_opinion='block'" in repr(blocked)
        failed = joint_verdict(verdict, "failed")
        assert (failed.flagged, failed.decision) == (False, "review")

    def test_only_prompts_of_the_band_are_asked(self, backend, cascade, asked):
        second = Words("words")
        there = Cascade.of(cascade.guard, second)
        alone = list(cascade.guard.scan(backend, asked))
        joint = list(there.scan(backend, asked))
        band = [p.text for p, v in zip(asked, alone, strict=True) if v.decision == "review"]
        assert second.asked == band
        assert {v.decision for v in alone} == {"allow", "review", "block"}
        for first, both in zip(alone, joint, strict=True):
            if first.decision == "review":
                assert both.decision == both.second_opinion in ("allow", "block")
            else:
                assert both == first
                assert both.second_opinion is None

    def test_after_a_failure_the_prompt_stays_in_review(self, backend, cascade, asked):
        second = Words("words", fails=lambda text: True)
        alone = [v.decision for v in cascade.guard.scan(backend, asked)]
        joint = list(Cascade.of(cascade.guard, second).scan(backend, asked))
        assert [v.decision for v in joint] == alone
        assert {v.second_opinion for v in joint if v.decision == "review"} == {"failed"}

    def test_a_guard_without_a_band(self, backend, plain, harmless):
        for guard in (plain, plain.calibrate(backend, harmless, max_fpr=RATE)):
            with pytest.raises(GuardError, match="no review band"):
                Cascade.of(guard, Words())

    def test_a_second_guard_answers_in_its_own_words(self, backend, cascade, asked):
        better = FakeBackend(signal=3.0, salt="better")
        second = GuardOpinion(LatentGuard.fit(better, labelled(40)))
        joint = list(Cascade.of(cascade.guard, second).scan(backend, asked))
        opinions = {v.second_opinion for v in joint} - {None}
        assert opinions == {"allow", "block"}

    def test_it_is_called_like_a_guard(self, cascade):
        one = cascade("Please do the good item")
        assert [one] == cascade(["Please do the good item"])


class TestPromise:
    def test_the_rate_of_both_together_is_kept_and_more_is_caught(
        self, backend, plain, harmless, cascade, asked
    ):
        alone = plain.calibrate(backend, harmless, max_fpr=RATE)
        fpr, recall = rates(cascade.scan(backend, asked), asked)
        fpr_alone, recall_alone = rates(alone.scan(backend, asked), asked)
        assert max(fpr, fpr_alone) < RATE + 0.03
        assert recall > recall_alone + 0.1

    def test_a_useless_second_opinion_does_not_break_it(self, backend, plain, harmless, asked):
        for mistakes in (0.5, 1.0):  # by chance; whatever is harmless
            made = Cascade(plain, Words(mistakes=mistakes))
            made = made.calibrate(backend, harmless, max_fpr=RATE, review_fpr=0.4)
            assert made.guard.bound.upper <= RATE
            assert rates(made.scan(backend, asked), asked)[0] < RATE + 0.03

    def test_a_graded_one_that_blocks_too_much_is_made_strict(
        self, backend, plain, harmless, asked
    ):
        lenient = LatentGuard.fit(FakeBackend(signal=1.0, salt="second"), labelled(80))
        lenient = replace(lenient, threshold=lenient.threshold - 2 * lenient.spread)
        second = GuardOpinion(lenient)
        made = Cascade(plain, second).calibrate(backend, harmless, max_fpr=RATE, review_fpr=0.4)
        record = made.guard.thresholds.second_opinion
        assert record.cut > 0
        assert record.blocked == record.asked
        assert made.has_band
        alone = plain.calibrate(backend, harmless, max_fpr=RATE)
        fpr, recall = rates(made.scan(backend, asked), asked)
        assert fpr < RATE + 0.03
        assert recall > rates(alone.scan(backend, asked), asked)[1] + 0.1
        foreign = Cascade.of(alone_with_band(plain, backend, harmless), second)
        assert rates(foreign.scan(backend, asked), asked)[0] > RATE + 0.03

    def test_it_is_kept_with_the_guard(self, cascade, tmp_path):
        cascade.guard.save(tmp_path)
        loaded = LatentGuard.load(tmp_path)
        record = loaded.thresholds.second_opinion
        assert record == cascade.guard.thresholds.second_opinion
        assert record.name == "words"
        assert 0 < record.blocked <= record.asked <= 0.4 * loaded.bound.n
        assert is_promised(loaded, Words())
        assert "with the second opinion words" in loaded.promise
        assert "Calibrated with the second opinion `words`" in loaded.card

    def test_of_another_second_opinion_nothing_is_promised(self, backend, cascade, asked):
        own = list(Cascade.of(cascade.guard, cascade.second).scan(backend, asked[:20]))
        other = list(Cascade.of(cascade.guard, Words("others")).scan(backend, asked[:20]))
        assert all(v.calibrated and v.operating_point for v in own)
        assert not any(v.calibrated or v.operating_point for v in other)

    def test_nor_of_a_guard_that_was_calibrated_alone(self, backend, plain, harmless):
        alone = alone_with_band(plain, backend, harmless)
        assert not is_promised(alone, Words())
        assert Cascade.of(alone, Words()).guard.bound is None

    def test_another_calibration_ends_it(self, backend, cascade, harmless):
        again = cascade.guard.calibrate(backend, harmless, max_fpr=RATE)
        assert again.thresholds.second_opinion is None

    def test_nor_does_another_model_keep_it(self, cascade):
        assert cascade.guard.rebind(FakeBackend(shift=0.1)).thresholds.second_opinion is None

    def test_an_opinion_that_fails_ends_the_calibration(self, backend, plain, harmless):
        broken = Words("broken", fails=lambda text: text.endswith("7"))
        with pytest.raises(GuardError, match=r"broken failed on \d+ of \d+ harmless prompts"):
            Cascade(plain, broken).calibrate(backend, harmless, max_fpr=RATE)

    def test_so_do_too_few_prompts(self, backend, plain, harmless):
        with pytest.raises(GuardError, match=r"60 .* with a second opinion; give at least 93"):
            Cascade(plain, Words()).calibrate(backend, harmless[:60], max_fpr=RATE)


def test_a_file_of_another_second_opinion_is_begun_anew(backend, cascade, asked, tmp_path):
    out = tmp_path / "verdicts.jsonl"

    class Broken(Words):
        def score(self, prompts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_to_file(Cascade.of(cascade.guard, Broken("first")), backend, asked, out)
    there = Cascade.of(cascade.guard, Words("second"))
    assert score_to_file(there, backend, asked, out) == 0
    assert len(out.read_text().splitlines()) == len(asked)
    assert there.digest != cascade.digest


def test_segments_are_left_out(backend, plain, harmless):
    marked = [replace(p, segment="de") for p in harmless]
    made = Cascade(plain, Words()).calibrate(backend, marked, max_fpr=RATE)
    assert made.guard.thresholds.segments == {}
