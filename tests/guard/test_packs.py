"""Packs: a category from a few examples, the kept rate, and what is refused."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from guard.kinds import KINDS, Kinds, harmless, kinds, kinds_of, novel
from latentguard.data.builtin import load_contrast, load_guard_prompts
from latentguard.errors import GuardError
from latentguard.guard import packs
from latentguard.guard.chunk_calibration import calibrate_chunking, fit_chunking
from latentguard.guard.chunk_texts import harmless_texts
from latentguard.guard.chunking import Chunking
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.leakage import TrainingPrompts, exclude_training_prompts, prompt_digest
from latentguard.guard.score_scale import ScoreScale
from latentguard.guard.thresholds import Rates
from latentguard.guard.traffic import adapt_to_traffic
from latentguard.prompts import Message, Prompt


@pytest.fixture(scope="module")
def backend():
    return Kinds()


@pytest.fixture(scope="module")
def guard(backend):
    return LatentGuard.fit(backend, kinds(60))


@pytest.fixture(scope="module")
def calibrated(backend, guard):
    return guard.calibrate(backend, harmless(400), max_fpr=0.05)


@pytest.fixture(scope="module")
def packed(backend, calibrated):
    return packs.add(calibrated, backend, "novel", novel(30), harmless(400, 6000))


class TestPack:
    def test_it_finds_what_the_guard_missed(self, backend, calibrated, packed):
        test = novel(200, start=1000)
        before = [v.flagged for v in calibrated.scan(backend, test)]
        after = list(packed.scan(backend, test))
        assert np.mean(before) < 0.2
        assert np.mean([v.flagged for v in after]) > 0.9
        assert {v.category for v in after if v.flagged} == {"novel"}
        assert {tuple(v.category_scores) for v in after} == {(*KINDS, "novel")}

    def test_the_stated_rate_is_kept_for_the_union(self, backend, packed):
        """2,000 fresh harmless prompts: the bound of 5 % at 95 % confidence, and sampling error."""
        flags = [v.flagged for v in packed.scan(backend, harmless(2000, 20000))]
        assert packed.bound.max_fpr == 0.05
        assert np.mean(flags) < 0.05 + 3 * (0.05 * 0.95 / 2000) ** 0.5

    def test_without_recalibration_it_would_not_be(self, backend, calibrated, packed):
        loose = replace(packed, threshold=calibrated.threshold)
        fresh = harmless(2000, 20000)
        loosely, before, after = (
            sum(v.flagged for v in g.scan(backend, fresh)) for g in (loose, calibrated, packed)
        )
        assert loosely > 1.3 * before
        assert after < loosely

    def test_the_bound_holds_as_often_as_it_says(self, backend, packed):
        """Calibrate the union on many samples: the true rate is over the bound in at most 5 %."""
        pool = np.array([v.score for v in packed.scan(backend, harmless(4000, 40000))])
        from latentguard.stats.bounds import threshold_for_fpr

        rng = np.random.default_rng(0)
        over = 0
        for _ in range(400):
            rows = rng.permutation(len(pool))
            bound = threshold_for_fpr(pool[rows[:200]], 0.05)
            over += np.mean(pool[rows[200:]] > bound.threshold) > 0.05
        assert over / 400 < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5

    def test_what_the_guard_found_it_still_finds(self, backend, calibrated, packed):
        test = [p for p in kinds(100, start=300) if p.harmful]
        before, after = (
            np.mean([v.flagged for v in g.scan(backend, test)]) for g in (calibrated, packed)
        )
        assert after > before - 0.05

    def test_score_threshold_and_flag_agree(self, backend, packed):
        for v in packed.scan(backend, [*novel(20, 1000), *kinds(20), *harmless(20)]):
            assert v.flagged == (v.score > packed.threshold)
            if v.category == "novel" and v.flagged:
                cut = packed.categories.cut_off("novel", packed.threshold)
                assert v.category_scores["novel"] > cut

    def test_it_is_stored(self, backend, packed, tmp_path):
        packed.save(tmp_path)
        again = LatentGuard.load(tmp_path, backend)  # the canaries are those of the union
        assert again.digest == packed.digest
        assert list(again.scan(backend, novel(3))) == list(packed.scan(backend, novel(3)))
        assert "Category pack `novel`: fitted on 30 harmful" in again.card

    def test_removed_it_is_gone(self, backend, calibrated, packed):
        calm = harmless(400)
        gone = packs.remove(packed, backend, "novel", calm)
        test = [*novel(10), *kinds(10)]
        assert gone.threshold == calibrated.threshold
        assert list(gone.scan(backend, test)) == list(calibrated.scan(backend, test))

    def test_two_packs_and_a_known_name(self, backend, packed):
        examples = [p for p in kinds(60, start=700) if p.category == "arson"]
        two = packs.add(packed, backend, "arson", examples, harmless(400, 7000))
        (verdict,) = two.scan(backend, [novel(1, 900)[0]])
        assert tuple(verdict.category_scores) == (*KINDS, "novel")
        assert tuple(two.categories.packs) == ("novel", "arson")
        one = packs.remove(two, backend, "novel", harmless(400, 7000))
        (verdict,) = one.scan(backend, [examples[0]])
        assert verdict.category == "arson"


class TestRefused:
    @pytest.mark.parametrize("count", [0, 1, 9])
    def test_too_few_examples(self, backend, calibrated, count):
        with pytest.raises(GuardError, match=rf"at least 10 different .*found {count}\."):
            packs.add(calibrated, backend, "novel", novel(count), harmless(200))

    def test_one_example_many_times(self, backend, calibrated):
        with pytest.raises(GuardError, match=r"found 1\."):
            packs.add(calibrated, backend, "novel", novel(1) * 30, harmless(200))

    @pytest.mark.parametrize("name", ["", "Sexual", "two words", "../x", "a\n"])
    def test_an_odd_name(self, backend, calibrated, name):
        with pytest.raises(GuardError, match="is no name: expected"):
            packs.add(calibrated, backend, name, novel(30), harmless(200))

    def test_a_name_that_is_taken(self, backend, packed):
        with pytest.raises(GuardError, match="has a pack 'novel'; remove it first"):
            packs.add(packed, backend, "novel", novel(30), harmless(400))

    def test_a_guard_that_promises_nothing(self, backend, guard):
        with pytest.raises(GuardError, match="run 'latentguard calibrate' first"):
            packs.add(guard, backend, "novel", novel(30), harmless(400))

    def test_a_guard_without_categories(self, backend, calibrated):
        none = replace(calibrated, categories=None)
        with pytest.raises(GuardError, match="no categories to add a pack to"):
            packs.add(none, backend, "novel", novel(30), harmless(400))

    def test_a_promise_on_other_prompts_needs_prompts_like_them(self, backend, calibrated):
        with pytest.raises(GuardError, match="give harmless prompts like them"):
            packs.add(calibrated, backend, "novel", novel(30))

    def test_too_few_harmless_prompts_for_the_promise(self, backend, calibrated):
        said = r"needs 59 harmless prompts to calibrate on; found 50 \(half of those given\)"
        with pytest.raises(GuardError, match=said):
            packs.add(calibrated, backend, "novel", novel(30), harmless(100))

    def test_a_pack_that_is_not_there(self, backend, packed):
        with pytest.raises(GuardError, match="no pack 'other'; it has: novel"):
            packs.remove(packed, backend, "other", harmless(400))

    def test_scores_that_do_not_differ(self):
        with pytest.raises(GuardError, match="do not differ"):
            ScoreScale.of(np.ones(30))


def test_what_is_fitted_never_calibrates():
    like, calm = packs.halve(harmless(101))
    assert not {p.text for p in like} & {p.text for p in calm}
    assert (len(like), len(calm)) == (50, 51)
    assert packs.halve(harmless(101)[::-1]) == (like, calm)
    more = [*harmless(101), *harmless(60, 3000)]  # what was held stays on its side
    again, fresh = packs.halve(more, TrainingPrompts.of(like, calm))
    assert again[:50] == sorted(like, key=harmless(101).index) and len(again) == 80
    assert not {p.text for p in like} & {p.text for p in fresh}
    said = [(Message("user", f"Tell me {n}"), Message("assistant", "So.")) for n in range(10)]
    chats = [Prompt("Thanks, go on.", history=history) for history in said]
    assert list(map(len, packs.halve([*chats, *chats]))) == [10, 10]  # rows, not texts
    assert len(packs.built_in_harmless()) == packs.BUILT_IN_HARMLESS


class TestThePromise:
    """It is about the traffic: prompts as often as they are asked, none that was fitted on."""

    @pytest.fixture(scope="class")
    def traffic(self, backend, calibrated):
        """One prompt that scores high is a sixth of it."""
        calm = harmless(500, 20_000)
        scores = [v.score for v in calibrated.scan(backend, calm)]
        return [*calm, *[calm[int(np.argmax(scores))]] * 100]

    def rate(self, guard, backend, prompts):
        return np.mean([v.flagged for v in guard.scan(backend, prompts)])

    def test_what_is_asked_often_counts_as_often(self, backend, calibrated, traffic):
        packed = packs.add(calibrated, backend, "novel", novel(30), traffic)
        assert self.rate(packed, backend, traffic) <= 0.05

    def test_what_a_pack_is_held_against_never_calibrates_again(self, backend, calibrated):
        given = harmless(400, 30_000)
        packed = packs.add(calibrated, backend, "novel", novel(30), given)
        assert len(packed.categories.packs["novel"].harmless_alone) == 200
        assert packed.calibrate(backend, given, max_fpr=0.05).bound.n == 200
        two = packs.add(packed, backend, "arson", kinds_of("arson", 30), given)
        assert two.bound.n == 200 and two.pack_training_prompts == packed.pack_training_prompts
        one = packs.remove(two, backend, "novel", given)
        assert one.bound.n == 200
        assert packs.remove(one, backend, "arson", given).bound.n == 400

    def test_traffic_that_is_drawn_anew_is_as_it_is(self, backend, calibrated, traffic):
        """What is asked often is in every week's file, in the half of a pack too."""
        packed = packs.add(calibrated, backend, "novel", novel(30), traffic)
        often = traffic[-1]
        week = [*harmless(250, 50_000), *[often] * 50]
        again = packed.calibrate(backend, week, max_fpr=0.05)
        assert again.bound.n == 300
        assert not next(again.scan(backend, [often])).flagged
        two = packs.add(packed, backend, "arson", kinds_of("arson", 30), week)
        assert two.bound.n == pytest.approx(150, abs=3)
        assert not next(two.scan(backend, [often])).flagged

    def test_copies_are_held_in_every_segment(self, backend, calibrated, traffic):
        sliced = [replace(p, segment=s) for s in ("en", "de") for p in traffic]
        packed = packs.add(calibrated, backend, "novel", novel(30), sliced)
        rest = kept_of(sliced, packed)
        often = Counter(p.segment for p in rest if p.text == traffic[-1].text)
        assert sum(often.values()) == pytest.approx(100, abs=20) and min(often.values()) > 25

    def test_the_examples_of_a_pack_do_not_calibrate_probabilities(self, backend, calibrated):
        examples = novel(40)
        packed = packs.add(calibrated, backend, "novel", examples, harmless(400, 60_000))
        fresh = harmless(200, 70_000)
        with pytest.raises(GuardError, match="40 of the 40 different harmful prompts"):
            packed.calibrate(backend, [*fresh, *examples], max_fpr=0.05)
        assert packed.calibrate(backend, [*fresh, *novel(40, start=900)], max_fpr=0.05)

    def test_what_does_not_calibrate_does_not_dilute(self, backend, calibrated):
        """Three hundred chats, which windows read, beside prompts that were fitted on."""
        fitted = [p for p in kinds(90) if not p.harmful]
        turns = (Message("user", "Hello"), Message("assistant", "Hello."))
        chats = [replace(p, history=turns) for p in harmless(1500, 80_000)]
        guard = replace(calibrated, chunking=Chunking())
        with pytest.raises(GuardError, match="are among those"):
            guard.calibrate(backend, [*fitted, *chats], max_fpr=0.05)
        few = [replace(p, segment="de") for p in fitted]
        with pytest.raises(GuardError, match=r"\(segment 'de'\) prompts"):
            calibrated.calibrate(backend, [*few, *harmless(1500, 80_000)], max_fpr=0.05)

    def test_a_closed_set_of_questions_is_asked_again(self, backend, calibrated):
        """A hundred texts, some of them often: this week's file holds nearly all of last week's."""
        asked, rng = harmless(100, 95_000), np.random.default_rng(0)
        often = 1 / np.arange(1, 101)
        last, this = (
            [asked[k] for k in rng.choice(100, n, p=often / often.sum())] for n in (1000, 600)
        )
        packed = packs.add(calibrated, backend, "novel", novel(30), last)
        kept = kept_of(this, packed)
        assert len(kept) > 280
        shares = [
            np.mean([p.text in {q.text for q in asked[:10]} for p in rows]) for rows in (this, kept)
        ]
        assert shares[0] == pytest.approx(shares[1], abs=0.06)
        assert packed.calibrate(backend, this, max_fpr=0.05)

    def test_part_of_a_file_brings_back_nothing_that_was_learnt(self, backend, calibrated):
        given = [p for p in harmless(200, 97_000) for _ in range(2)]
        packed = packs.add(calibrated, backend, "novel", novel(30), given)
        alone = packed.pack_training_prompts.alone
        kept = kept_of(given[:150], packed)
        assert not {prompt_digest(p) for p in kept} & alone
        two = packs.add(packed, backend, "arson", kinds_of("arson", 30), given)
        assert two.pack_training_prompts.alone >= alone

    @pytest.mark.parametrize("seed", range(6))
    def test_a_pack_keeps_every_threshold_or_is_refused(self, backend, calibrated, seed):
        """Slices of the same texts, near the fewest that a threshold needs."""
        rng, texts_of = np.random.default_rng(seed), harmless(130, 98_000)
        given = [
            replace(texts_of[k], segment=("de", "en")[int(rng.random() < 0.5)])
            for k in rng.integers(130, size=250)
        ]
        sliced = calibrated.calibrate(backend, given, max_fpr=0.05)
        assert set(sliced.thresholds.segments) == {"de", "en"}
        try:
            packed = packs.add(sliced, backend, "novel", novel(30), given)
        except GuardError as error:
            assert "needs 59 harmless" in str(error)
        else:
            assert set(packed.thresholds.segments) == {"de", "en"}

    def test_a_segment_of_few_texts(self, backend, calibrated):
        known = next(p for p in kinds(90) if not p.harmful)
        kiosk = [
            replace(p, segment="kiosk") for p in [known, *harmless(7, 99_000)] for _ in range(50)
        ]
        given = [*harmless(300, 99_500), *kiosk]
        assert "kiosk" in calibrated.calibrate(backend, given, max_fpr=0.05).thresholds.segments

    def test_a_greeting_that_was_fitted_on_is_asked_again(self, backend, calibrated):
        known = next(p for p in kinds(90) if not p.harmful)
        given = [*harmless(200, 90_000), *[known] * 60]
        assert calibrated.calibrate(backend, given, max_fpr=0.05).bound.n == 260

    def test_the_guards_own_prompts_do_not_calibrate(self, backend, calibrated):
        with pytest.raises(
            GuardError, match="different harmless prompts to calibrate on are among"
        ):
            calibrated.calibrate(backend, [p for p in kinds(90) if not p.harmful], max_fpr=0.05)

    def test_a_segment_keeps_its_threshold_or_nothing_is_done(self, backend, calibrated):
        given = [
            replace(p, segment=("de", "en")[n % 2]) for n, p in enumerate(harmless(240, 40_000))
        ]
        sliced = calibrated.calibrate(backend, given, max_fpr=0.05)
        assert set(sliced.thresholds.segments) == {"de", "en"}
        packed = packs.add(sliced, backend, "novel", novel(30), [*given, *moved(given)])
        assert set(packed.thresholds.segments) == {"de", "en"}
        few = [p for p in given if p.segment == "de"] + given[:20]
        with pytest.raises(GuardError, match="'en' has a threshold of its own, which needs"):
            packs.add(sliced, backend, "novel", novel(30), few)


def kept_of(prompts, guard):
    """Those that may calibrate a guard."""
    return exclude_training_prompts(prompts, guard.pack_training_prompts)[1]


def moved(prompts):
    return [replace(p, text=f"{p.text} again") for p in prompts]


class TestLongPrompts:
    """A pack flags what windows read, too, and their threshold is picked again."""

    CALM = "We talked about the weather and the garden for a while. " * 12

    @pytest.fixture(scope="class")
    def long(self, backend, calibrated):
        return fit_chunking(backend, calibrated)

    def own(self, count):
        texts = (f"{self.CALM} {n}" for n in range(count))
        return [Prompt(text, id=str(n), harmful=False) for n, text in enumerate(texts)]

    def test_a_piece_of_the_new_category_is_found(self, backend, long):
        """Calibrated on texts of our own: the built-in ones speak of novels."""
        mine = calibrate_chunking(backend, long, self.own(100), max_fpr=0.05)
        mixed = [*harmless(400, 6000), *self.own(200)]
        pack = packs.add(mine, backend, "novel", novel(30), mixed)
        texts = [f"{self.CALM}\n\n{p.text}\n\n{self.CALM}" for p in novel(20, start=2000)]
        before, after = (list(g.scan(backend, texts)) for g in (mine, pack))
        assert sum(v.flagged for v in before) < 5
        assert sum(v.flagged for v in after) > 15
        for text, verdict in zip(texts, after, strict=True):
            found = max(verdict.evidence, key=lambda e: e.score)
            assert "novel" in text[found.start : found.end]

    def test_their_rate_is_kept_for_the_union(self, backend, long):
        pack = packs.add(long, backend, "novel", novel(30), harmless(400, 6000))
        old, new = (g.chunking for g in (long, pack))
        assert new.threshold >= old.threshold
        assert (new.bound.n, new.bound.max_fpr) == (old.bound.n, 0.05)
        calm = harmless_texts("test", 150)
        assert np.mean([v.flagged for v in pack.scan(backend, calm)]) < 0.1
        gone = packs.remove(pack, backend, "novel", harmless(400, 7000))
        assert gone.chunking.threshold == old.threshold

    def test_on_another_model_the_rates_are_those_of_before(self, backend, calibrated):
        strict = calibrated.calibrate(backend, harmless(400), max_fpr=0.01)
        other = Kinds(shift=0.01)
        moved = fit_chunking(backend, strict).rebind(other)
        assert moved.chunking.bound is None
        pack = packs.add(moved, other, "novel", novel(30), harmless(800, 6000))
        assert (pack.bound.max_fpr, pack.chunking.bound.max_fpr) == (0.01, 0.05)

    def test_long_prompts_of_ones_own(self, backend, long):
        mine = calibrate_chunking(backend, long, self.own(100), max_fpr=0.05)
        with pytest.raises(GuardError, match=r"needs 59 harmless ones like them .* found 0"):
            packs.add(mine, backend, "novel", novel(30), harmless(400, 6000))
        mixed = [*harmless(400, 6000), *self.own(150)]
        pack = packs.add(mine, backend, "novel", novel(30), mixed)
        assert 59 <= pack.chunking.bound.n < 100  # one half is what the pack is held against


@pytest.mark.parametrize("chunking", [None, Chunking()], ids=["plain", "chunks"])
@pytest.mark.parametrize("built_in", [load_contrast, load_guard_prompts])
def test_built_in_prompts_serve_a_guard_that_was_calibrated_on_them(
    backend, guard, built_in, chunking
):
    guard = replace(guard, chunking=chunking)
    calm = [p for p in built_in("validation") if not p.harmful]
    own = guard.calibrate(backend, calm, max_fpr=0.05)
    packed = packs.add(own, backend, "novel", novel(30))
    assert packed.fitted["calibration_sha256"] == own.fitted["calibration_sha256"]
    assert (
        packed.bound.n
        == own.bound.n
        == len([p for p in calm if not chunking or len(p.text) <= 500])
    )


def test_built_in_prompts_do_not_replace_unlabelled_traffic(backend, guard):
    """Its threshold was moved to prompts that are not kept, though built-in ones calibrated it."""
    calm = [p for p in load_guard_prompts("validation") if not p.harmful]
    own = guard.calibrate(backend, calm, max_fpr=0.05)
    sides = [[v.score for v in own.scan(backend, side)] for side in (calm, novel(60))]
    moved = adapt_to_traffic(own, *sides, sides[0], Rates(0.05))
    with pytest.raises(GuardError, match="moved to unlabelled traffic"):
        packs.add(moved, backend, "novel", novel(30))
    assert packs.add(moved, backend, "novel", novel(30), harmless(400, 6000)).bound is not None
