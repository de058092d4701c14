"""Replies: fitted, calibrated per reply, judged at every prefix, stored with the guard."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fake_backend import labelled
from latentguard.errors import GuardError, ModelError, ModelMismatch
from latentguard.guard.artifact import JSON_FILE, content_digest
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.replies import (
    LENGTH_CLASSES,
    WINDOW,
    ReplyProbe,
    ReplyVerdict,
    RunningScore,
    running_scores,
)
from latentguard.guard.reply_fitting import calibrate_replies, fit_replies
from latentguard.models.reply_reading import lay_out_reply
from latentguard.probes.probe import Probe
from latentguard.prompts import Prompt, Reply
from latentguard.stats.detection import auroc

WORDS = "river garden window teacher engine letter school winter music paper city doctor".split()


def replies(count, start=0, labels=(True, False)):
    """Replies of a few words to a few prompts; harmful ones hold the word "bad" throughout."""
    rng = np.random.default_rng(start)
    rows = []
    for n in range(start, start + count):
        harmful = labels[n % len(labels)]
        words = list(rng.choice(WORDS, size=int(rng.integers(4, 12))))
        text = " bad ".join(words) if harmful else " and ".join(words)
        rows.append(Reply(Prompt(f"Question {n // 2}?", id=str(n)), text, harmful=harmful))
    return rows


@pytest.fixture(scope="module")
def prompts_only(model):
    return LatentGuard.fit(model, labelled(20))


@pytest.fixture(scope="module")
def guard(model, prompts_only):
    return fit_replies(model, prompts_only, replies(80))


def probe(**changes):
    weight = torch.zeros(1, 4)
    base = ReplyProbe(Probe("linear", (1,), weight, 0.0), (1.0, 0.0), 1.0, {})
    return replace(base, **changes)


class TestRunningScore:
    def test_it_is_the_mean_of_the_last_tokens(self):
        scores = torch.randn(3 * WINDOW, dtype=torch.float64)
        wanted = [
            scores[max(0, n + 1 - WINDOW) : n + 1].sum().item() / WINDOW for n in range(3 * WINDOW)
        ]
        assert running_scores(scores.tolist()).tolist() == pytest.approx(wanted)

    def test_a_stream_gives_the_same(self):
        scores = torch.randn(50)
        running = RunningScore()
        assert [running.push(s) for s in scores.tolist()] == running_scores(
            scores.tolist()
        ).tolist()


class TestVerdict:
    def test_the_highest_running_score_counts_and_the_first_token_above_is_named(self):
        verdict = probe(threshold=0.5).decide("a", np.array([0.1, 0.6, 0.9, 0.2]))
        assert (verdict.score, verdict.flagged, verdict.flagged_at) == (0.9, True, 2)
        assert (verdict.tokens, verdict.decision) == (4, "block")

    def test_at_the_threshold_nothing_is_flagged(self):
        verdict = probe(threshold=0.5).decide("a", np.array([0.5, 0.1]))
        assert (verdict.flagged, verdict.flagged_at, verdict.decision) == (False, None, "allow")

    def test_the_bias_counts_at_every_token(self):
        judge = probe(probe=Probe("linear", (1,), torch.zeros(1, 4), 3.0))
        found = judge.verdict("a", torch.zeros(2))
        assert found.score == pytest.approx(6 / WINDOW)

    def test_a_number_that_is_not_finite_is_an_error(self):
        with pytest.raises(GuardError, match="not a finite number"):
            probe().verdict("a", torch.tensor([0.0, float("nan"), 1.0]))

    def test_json_has_the_decision(self):
        record = json.loads(json.dumps(ReplyVerdict("1", 0.5, 0.6, True, 3, 9).to_dict()))
        assert (record["decision"], record["flagged_at"]) == ("block", 3)


class TestCalibration:
    def verdicts(self, lengths, scores):
        return [
            ReplyVerdict(str(n), score, 0.5, False, None, length)
            for n, (length, score) in enumerate(zip(lengths, scores, strict=True))
        ]

    def test_the_rate_holds_in_each_length_class(self):
        """Long replies score higher; one common threshold for all would flag too many of them."""
        rng = np.random.default_rng(0)
        lengths = rng.choice([10, 60, 300], p=[0.6, 0.3, 0.1], size=3000)
        scores = rng.normal(size=3000) + (lengths > 128) * 2.0
        found = probe().calibrate(self.verdicts(lengths, scores), max_fpr=0.05, confidence=0.95)
        fresh = rng.normal(size=100_000) + 2.0
        assert (fresh > found.threshold).mean() <= 0.05
        assert [one.longest for one in found.classes] == [*LENGTH_CLASSES, None]
        assert all(one.bound.upper <= 0.05 for one in found.classes)
        assert sum(one.n for one in found.classes) == 3000

    def test_a_class_with_few_replies_has_no_promise_of_its_own(self):
        lengths = [10] * 100 + [300] * 5
        found = probe().calibrate(
            self.verdicts(lengths, list(range(105))), max_fpr=0.1, confidence=0.9
        )
        assert [one.bound is None for one in found.classes] == [False, True, True]
        assert "too few" in found.notes()[1]

    def test_too_few_replies_are_an_error(self):
        with pytest.raises(GuardError, match="too few"):
            probe().calibrate(self.verdicts([10] * 5, [0.0] * 5), max_fpr=0.01, confidence=0.95)

    def test_what_it_was_fitted_on_does_not_calibrate(self, model, guard):
        harmless = [reply for reply in replies(80) if not reply.harmful]
        with pytest.raises(GuardError, match="fitted on"):
            calibrate_replies(model, guard, harmless, max_fpr=0.2)

    def test_harmful_replies_are_left_out(self, model, guard):
        calibrated = calibrate_replies(model, guard, replies(200, start=1000), max_fpr=0.05)
        assert calibrated.replies.bound.n == 100
        assert "harmless replies" in calibrated.replies.promise
        assert calibrated.threshold == guard.threshold  # that of prompts is another


class TestGuard:
    def test_it_tells_replies_apart(self, model, guard):
        fresh = replies(60, start=2000)
        scores = np.array([verdict.score for verdict in guard.scan_replies(model, fresh)])
        assert auroc(np.array([reply.harmful for reply in fresh]), scores) > 0.95

    def test_a_verdict_on_a_prefix_is_that_of_the_stream_so_far(self, model, guard):
        """What is read at a token does not depend on what comes after it."""
        reply = replies(1, start=3000)[0]
        ids = lay_out_reply(model, reply).ids[-len(lay_out_reply(model, reply).reply) :]
        parts = [replace(reply, ids=ids[: n + 1]) for n in range(len(ids))]
        verdicts = list(guard.scan_replies(model, parts))
        best = np.maximum.accumulate([v.score for v in verdicts])
        assert [v.score for v in verdicts] == pytest.approx(best.tolist(), abs=1e-5)
        assert [v.tokens for v in verdicts] == [n + 1 for n in range(len(ids))]

    def test_it_is_stored(self, model, guard, tmp_path):
        calibrated = calibrate_replies(model, guard, replies(200, start=1000), max_fpr=0.05)
        calibrated.save(tmp_path / "g")
        again = LatentGuard.load(tmp_path / "g", model)
        assert again.digest == calibrated.digest != guard.digest
        fresh = replies(10, start=4000)
        assert list(again.scan_replies(model, fresh)) == list(calibrated.scan_replies(model, fresh))
        assert "Replies are judged token by token" in again.card
        assert "says nothing of the model's replies" not in again.card

    def test_a_guard_of_prompts_alone_is_stored_as_before(self, model, prompts_only, tmp_path):
        prompts_only.save(tmp_path / "g")
        assert "replies" not in json.loads((tmp_path / "g" / JSON_FILE).read_text())
        assert LatentGuard.load(tmp_path / "g").replies is None
        with pytest.raises(GuardError, match="does not judge replies"):
            list(prompts_only.scan_replies(model, replies(2)))

    @pytest.mark.parametrize("change", [{"bias": float("nan")}, {"layers": [1, 2]}, {"platt": [1]}])
    def test_a_damaged_probe_is_refused(self, guard, tmp_path, change):
        guard.save(tmp_path / "g")
        path = tmp_path / "g" / JSON_FILE
        record = json.loads(path.read_text())
        record["replies"] |= change
        record["content_sha256"] = content_digest(record)
        path.write_text(json.dumps(record))
        with pytest.raises(GuardError, match="damaged"):
            LatentGuard.load(tmp_path / "g")

    def test_another_model_is_refused(self, guard, tokenizer):
        from models.architectures import chat_model

        with pytest.raises(ModelMismatch):
            list(guard.scan_replies(chat_model("qwen2", tokenizer), replies(2)))

    def test_an_engine_that_lets_no_states_out_is_refused(self, guard):
        class Engine:
            fingerprint = guard.fingerprint

        with pytest.raises(ModelError, match="found a Engine"):
            list(guard.scan_replies(Engine(), replies(2)))

    def test_bound_to_another_model_it_promises_nothing(self, model, guard):
        calibrated = calibrate_replies(model, guard, replies(200, start=1000), max_fpr=0.05)
        there = calibrated.rebind(model)
        assert there.replies.bound is None
        assert there.replies.threshold == calibrated.replies.threshold

    def test_of_many_replies_some_are_drawn_in_order(self, monkeypatch):
        from latentguard.guard import reply_fitting

        rows = replies(40)
        assert reply_fitting.draw_training_replies(rows) == rows
        monkeypatch.setattr(reply_fitting, "MAX_REPLIES", 10)
        drawn = reply_fitting.draw_training_replies(rows)
        numbers = [int(reply.prompt.id) for reply in drawn]
        assert len(set(numbers)) == 10
        assert numbers == sorted(numbers)
        assert max(numbers) > 20  # not the first ones
        assert drawn == reply_fitting.draw_training_replies(rows)

    def test_replies_without_a_label_do_not_train(self, model, prompts_only):
        rows = [replace(reply, harmful=None) for reply in replies(30)]
        with pytest.raises(GuardError, match="have no label"):
            fit_replies(model, prompts_only, rows)
