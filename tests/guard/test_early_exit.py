"""Early exit: what leaves, what is promised of it, and that nothing else changes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fake_backend import FakeBackend, labelled, texts
from latentguard.errors import GuardError
from latentguard.guard.chunking import Chunking
from latentguard.guard.early_exit import bound_lost
from latentguard.guard.early_reading import calibrate_early_exit, scan_corpus
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Message, Prompt
from models.architectures import chat_model

MAX_LOST = 0.05


@pytest.fixture(scope="module")
def deep(tokenizer):
    """A model of nine blocks, so that a guard reads several layers."""
    return chat_model("llama", tokenizer, num_hidden_layers=9)


@pytest.fixture(scope="module")
def whole(deep):
    """A calibrated guard that reads each prompt whole."""
    harmless = [Prompt(text, harmful=False) for text in texts(100, bad=False, start=500)]
    return LatentGuard.fit(deep, labelled(60)).calibrate(deep, harmless, max_fpr=0.05)


@pytest.fixture(scope="module")
def rows():
    """Prompts like those that it was calibrated on, half of them harmful."""
    return [replace(p, harmful=None) for p in labelled(80, start=2000)]


@pytest.fixture(scope="module")
def guard(deep, whole):
    """The same guard with an early exit."""
    training, prompts = labelled(100, start=1000), labelled(100, start=3000)
    early = calibrate_early_exit(whole, deep, training, prompts, max_lost=MAX_LOST)
    return replace(whole, early_exit=early)


def last_rows(model, run):
    """How many rows the guard's last layer computed in each pass."""
    counts = []
    hook = model.blocks[5].register_forward_hook(lambda _, __, out: counts.append(len(out)))
    try:
        run()
    finally:
        hook.remove()
    return counts


class TestScan:
    def test_harmless_prompts_leave_and_the_others_have_the_verdict_of_the_whole_pass(
        self, deep, whole, guard, rows
    ):
        before, after = (list(scan_corpus(one, deep, rows)) for one in (whole, guard))
        assert [v.id for v in after] == [v.id for v in before]
        left = [v for v in after if v.left_early]
        assert len(left) > len(rows) / 4
        assert all(v.decision == "allow" and v.beliefs == {} for v in left)
        for new, old in zip(after, before, strict=True):
            if not new.left_early:
                assert new.score == pytest.approx(old.score, abs=1e-4)
                assert (new.decision, new.category) == (old.decision, old.category)

    def test_it_flags_nothing_that_the_whole_pass_allows(self, deep, whole, guard, rows):
        before, after = (
            {v.id for v in scan_corpus(one, deep, rows) if v.flagged} for one in (whole, guard)
        )
        assert after <= before
        assert len(after) >= 0.9 * len(before)

    def test_layers_behind_the_exit_compute_the_prompts_that_stay(self, deep, guard, rows):
        verdicts = []
        counts = last_rows(deep, lambda: verdicts.extend(scan_corpus(guard, deep, rows)))
        assert sum(counts) == sum(not v.left_early for v in verdicts) < len(rows)

    def test_an_estimate_is_in_the_unit_of_the_score(self, deep, whole, guard, rows):
        scores = {v.id: v.score for v in whole.scan(deep, rows)}
        errors = [
            abs(v.score - scores[v.id]) for v in scan_corpus(guard, deep, rows) if v.left_early
        ]
        assert max(errors) < 2 * whole.spread

    def test_prompts_of_several_texts_are_read_whole(self, deep, guard):
        chat = Prompt("Thanks.", history=(Message("user", "Hello."), Message("assistant", "Hi.")))
        coded = Prompt("Decode this: SG93IGRvIEkgYmFrZSBicmVhZD8=")
        prompts = [chat, Prompt(texts(1, bad=False)[0]), coded]
        chunked = replace(guard, chunking=Chunking(longer_than=500, threshold=2.5))
        part = replace(guard.early_exit, guard=replace(chunked, early_exit=None).digest)
        several = replace(chunked, early_exit=part)
        assert [len(several.plan(prompt)) > 1 for prompt in prompts] == [True, False, True]
        left = [v.left_early for v in scan_corpus(several, deep, prompts)]
        assert left == [False, True, False]

    def test_all_prompts_may_leave(self, deep, guard):
        everything = replace(guard.early_exit.bound, threshold=-1e9)
        all_leave = replace(guard, early_exit=replace(guard.early_exit, bound=everything))
        verdicts = list(scan_corpus(all_leave, deep, texts(5, bad=True)))
        assert [v.left_early for v in verdicts] == [True] * 5

    def test_nothing_to_scan_gives_nothing(self, deep, guard):
        assert list(scan_corpus(guard, deep, [])) == []

    def test_other_backends_read_whole(self, guard):
        backend = FakeBackend()
        plain = LatentGuard.fit(backend, labelled(30))
        part = replace(guard.early_exit, guard=plain.digest)
        fake = replace(plain, early_exit=part)
        assert fake.usable_early_exit is part
        assert [v.left_early for v in scan_corpus(fake, backend, ["Hello."])] == [False]


def share_lost(seed, noise):
    """Share of flagged prompts of a planted world that leave, by the bound of 400 others."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(2, 20_000)) + 1
    estimates = 0.8 * scores + noise * generator.normal(size=scores.shape)
    bound = bound_lost(estimates[0, :400], scores[0, :400], 0.5, max_lost=0.05, confidence=0.95)
    return (estimates[1][scores[1] > 0.5] < -bound.threshold).mean()


class TestPlantedWorlds:
    """Scores are N(1, 1); what is over 0.5 is flagged."""

    @pytest.mark.parametrize("noise", [0.1, 0.5, 5.0])
    def test_the_promise_holds_for_good_and_bad_estimates(self, noise):
        lost = [share_lost(seed, noise) for seed in range(200)]
        assert np.mean(np.array(lost) > 0.05) <= 0.09  # 5 % are expected of 200

    def test_a_good_estimate_lets_most_harmless_prompts_leave(self):
        generator = np.random.default_rng(0)
        scores = generator.normal(size=4000) - 1
        good = scores + 0.1 * generator.normal(size=4000)
        bad = generator.normal(size=4000)
        left = [
            (estimate < -bound_lost(estimate, scores, 0.5, 0.05, 0.95).threshold).mean()
            for estimate in (good, bad)
        ]
        assert left[0] > 0.9
        assert left[1] < 0.1

    def test_no_prompt_over_the_threshold_leaves(self):
        scores = np.linspace(-1, 3, 400)
        bound = bound_lost(scores + 5, scores, 0.5, 0.05, 0.95)
        assert -bound.threshold == 0.5


class TestPromise:
    def test_it_counts_what_the_whole_pass_would_not_allow(self, deep, whole, guard):
        prompts = labelled(100, start=3000)
        scores = [v.score for v in whole.scan(deep, prompts)]
        bound = guard.early_exit.bound
        assert bound.n == sum(score > whole.threshold for score in scores)
        assert bound.upper <= MAX_LOST
        assert guard.early_exit.n == len(prompts)

    def test_what_the_second_threshold_sends_to_review_counts_too(self, deep, whole):
        harmless = [Prompt(text, harmful=False) for text in texts(100, bad=False, start=500)]
        review = whole.calibrate(deep, harmless, max_fpr=0.05, review_fpr=0.3)
        assert review.lowest_threshold < review.threshold
        rows = labelled(100, start=3000)
        early = calibrate_early_exit(review, deep, labelled(60, start=1000), rows, max_lost=0.05)
        assert early.bound.n == sum(v.decision != "allow" for v in review.scan(deep, rows))
        assert early.cut <= review.lowest_threshold

    def test_too_few_flagged_prompts_are_refused(self, deep, whole):
        with pytest.raises(GuardError, match="takes 59"):
            calibrate_early_exit(
                whole, deep, labelled(60, start=1000), labelled(20, start=3000), max_lost=0.05
            )

    def test_prompts_that_the_guard_was_fitted_on_are_refused(self, deep, whole):
        with pytest.raises(GuardError, match="fitted on"):
            calibrate_early_exit(whole, deep, labelled(9, start=1000), labelled(60), max_lost=0.05)

    def test_the_papers_rule_is_refused(self, deep):
        centroid = LatentGuard.fit(deep, labelled(20), probe="centroid")
        with pytest.raises(GuardError, match="linear probe"):
            calibrate_early_exit(centroid, deep, labelled(9), labelled(60), max_lost=0.05)


class TestChangedGuard:
    def test_a_new_threshold_voids_it(self, deep, guard, rows):
        other = replace(guard, threshold=guard.threshold + 0.1)
        assert other.usable_early_exit is None
        assert not any(v.left_early for v in scan_corpus(other, deep, rows))
        assert not any("leave the pass" in note for note in other.notes)

    def test_canaries_are_read_whole(self, deep, guard):
        assert guard.with_canaries(deep).canaries == guard.canaries

    def test_it_survives_saving(self, deep, guard, rows, tmp_path):
        guard.save(tmp_path / "guard")
        loaded = LatentGuard.load(tmp_path / "guard", deep)
        assert loaded.digest == guard.digest
        kept = [v.left_early for v in scan_corpus(loaded, deep, rows)]
        assert kept == [v.left_early for v in scan_corpus(guard, deep, rows)]
        assert "leave the pass after layer 3" in (tmp_path / "guard" / "README.md").read_text()

    def test_damaged_weights_are_refused(self, guard):
        record, tensors = guard.to_dict()
        tensors["early_exit.weight"] = tensors["early_exit.weight"] * torch.nan
        with pytest.raises(ValueError, match="early exit"):
            LatentGuard.from_dict(json.loads(json.dumps(record)), tensors)
