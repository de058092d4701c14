"""Chunking: chunks, norms, one threshold for both readings, and who is read by chunks."""

import base64
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_backend import FakeBackend, bare, labelled, texts
from guard_files import edit_guard
from latentguard.data.builtin import load_guard_prompts
from latentguard.data.documents import build_document
from latentguard.errors import GuardError, PromptError
from latentguard.guard.chunk_calibration import calibrate_chunking, fit_chunking
from latentguard.guard.chunk_texts import CALIBRATION_TEXTS, harmless_texts
from latentguard.guard.chunking import MIN_CHARS, Chunking, LengthNorm, cut
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import decoded_variants
from latentguard.prompts import Message, Prompt

CHUNKING = Chunking(whole_norm=LengthNorm(5.0), threshold=2.0, max_chars=20, longer_than=60)


@pytest.fixture(scope="module")
def backend():
    return FakeBackend(signal=1.0)


@pytest.fixture(scope="module")
def guard(backend):
    return replace(LatentGuard.fit(backend, labelled(30)), chunking=CHUNKING)


LONG = Prompt("A good start of it.\nThen a bad one. " + "And more of the rest. " * 3, id="long")
SHORT = [Prompt(text, id=text) for text in texts(5, bad=True, name="x")]
CHAT = Prompt("go on", id="chat", history=(Message("user", "bad day"), Message("assistant", "?")))


def chunks_of(text, size):
    return [text[start:end] for start, end in cut(text, size)]


class TestCut:
    def test_sentences_and_lines_as_many_as_fit(self):
        text = "One. Two is here! A third, longer one?\n\nA line\nand more"
        assert chunks_of(text, 20) == [
            "One. Two is here!",
            "A third, longer one?",
            "A line\nand more",
        ]
        assert chunks_of(text, 200) == [
            "One. Two is here! A third, longer one?",
            "A line\nand more",
        ]
        assert chunks_of(text.replace("\n\n", "\n"), 200) == [text.replace("\n\n", "\n")]

    @pytest.mark.parametrize("blank", ["\n\n", "\n \n", "\n\n\n", "\n\t\n"])
    def test_a_paragraph_is_read_alone_unless_it_is_tiny(self, blank):
        text = blank.join(
            ["Hi.", "A paragraph of some length", "Another one of such length", "Bye."]
        )
        assert chunks_of(text, 200) == [
            f"Hi.{blank}A paragraph of some length",
            "Another one of such length",
            "Bye.",
        ]

    def test_a_word_without_end_is_cut(self):
        assert chunks_of("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]

    @given(st.text(alphabet="ab .!?\n\u3002", max_size=200), st.integers(1, 40))
    def test_nothing_is_lost_and_nothing_is_long(self, text, size):
        found = chunks_of(text, size)
        assert "".join("".join(found).split()) == "".join(text.split())
        assert all(0 < len("".join(piece.split())) <= size for piece in found)

    @given(st.text(alphabet="ab .!?\n\u3002", max_size=400), st.integers(1, 40))
    def test_there_are_no_more_pieces_than_what_is_said_calls_for(self, text, size):
        said = len("".join(text.split()))
        assert len(chunks_of(text, size)) <= 1 + 2 * said / size + said / MIN_CHARS

    @pytest.mark.parametrize(
        "unit", [" ", "\t", "\n", " \n", ". ", "a", "a" + "\n" * 120, "\u3002"]
    )
    def test_a_megabyte_of_anything_is_cut_while_the_lock_is_held_shortly(self, unit):
        """Quadratic time here would freeze the service: a second is a thousand times enough."""
        text = "a" + unit * (1_000_000 // len(unit))
        began = time.process_time()
        found = list(cut(text, 120))
        assert time.process_time() - began < 10
        assert sum(end - start for start, end in found) <= len(text)


class TestLengthNorm:
    def test_it_finds_a_planted_line(self):
        rng = np.random.default_rng(0)
        sizes = rng.uniform(1, 30, 4000)
        values = 1.5 + 0.4 * np.log(sizes) + 0.2 * rng.standard_normal(4000)
        norm = LengthNorm.fit(values, sizes)
        assert norm.mean == pytest.approx(1.5, abs=0.03)
        assert norm.slope == pytest.approx(0.4, abs=0.02)
        assert norm.spread == pytest.approx(0.2, abs=0.01)
        assert norm(1.5 + 0.4 * math.log(8) + 0.4, 8) == pytest.approx(2, abs=0.15)

    def test_one_size_is_flat(self):
        norm = LengthNorm.fit([1.0, 2.0, 3.0], [1, 1, 1])
        assert (norm.mean, norm.slope) == (2.0, 0.0)

    def test_a_longer_text_is_never_held_to_less(self):
        norm = LengthNorm.fit([3.0, 2.0, 1.0], [1, 2, 3])
        assert (norm.slope, norm.mean) == (0, 2.0)
        assert norm.spread == pytest.approx(np.std([3.0, 2.0, 1.0]))

    def test_scores_that_do_not_vary_are_refused(self):
        with pytest.raises(GuardError, match="do not show how scores vary"):
            LengthNorm.fit([1.0, 1.0, 1.0], [1, 2, 3])


class TestWhoIsReadByChunks:
    def test_long_prompts_and_chats_in_which_the_user_has_spoken(self):
        system = Prompt("hello there", history=(Message("system", "Be brief."),))
        assert [CHUNKING.applies_to(p) for p in (LONG, CHAT, system, SHORT[0])] == [
            True,
            True,
            False,
            False,
        ]

    def test_every_turn_of_the_user_is_cut(self):
        found = CHUNKING.chunks(CHAT)
        assert [(p.message, p.text) for p in found] == [(0, "bad day"), (2, "go on")]

    def test_a_text_that_says_nothing_is_refused(self, backend, guard):
        for blank in (replace(CHAT, text=" \n"), Prompt(" " * 900, id="blank")):
            with pytest.raises(PromptError, match="has no text"):
                next(guard.scan(backend, [blank]))


class TestScan:
    def test_order_is_kept_and_short_verdicts_stay(self, backend, guard):
        mixed = [SHORT[0], LONG, SHORT[1], CHAT, *SHORT[2:]]
        seen = []
        verdicts = list(guard.scan(backend, mixed, progress=seen.append))
        short = list(bare(guard).scan(backend, SHORT))
        assert [v.id for v in verdicts] == [p.id for p in mixed]
        for verdict, alone in zip([v for v in verdicts if not v.evidence], short, strict=True):
            assert verdict.score == pytest.approx(alone.score, abs=1e-6)
            assert (verdict.id, verdict.decision) == (alone.id, alone.decision)
        assert sum(seen) == len(mixed)

    @pytest.mark.parametrize("reading", ["pooled", "sealed"])
    def test_each_chunk_is_scored_as_a_prompt_of_its_own(self, backend, reading):
        guard = LatentGuard.fit(backend, labelled(30), reading=reading)
        chunks = CHUNKING.chunks(LONG)
        alone = [v.score for v in guard.scan(backend, [LONG, *(c.text for c in chunks)])]
        variants = replace(guard, chunking=CHUNKING).plan(LONG)
        read = [s.score for s in guard.score(backend, (v.prompt for v in variants))]
        np.testing.assert_allclose(read, alone, rtol=1e-6)
        assert variants[0].prompt == guard.reading.prepare(LONG)

    def test_evidence_names_the_turn_and_the_piece(self, backend, guard):
        verdict = next(guard.scan(backend, [LONG]))
        (found,) = verdict.evidence
        assert LONG.text[found.start : found.end] == "Then a bad one."
        assert verdict.score == found.score
        assert [e.message for e in next(guard.scan(backend, [CHAT])).evidence] == [0, 2]

    def test_flagged_is_over_the_threshold_of_the_chunking(self, backend, guard):
        chunks = CHUNKING.chunks(LONG)
        texts = (variant.prompt for variant in guard.plan(LONG))
        whole, *scores = (one.score for one in guard.score(backend, texts))
        top = max(e.score for e in CHUNKING.find_evidence(chunks, whole, scores))
        for threshold, flagged in ((top - 0.01, True), (top + 0.01, False)):
            there = replace(guard, chunking=replace(CHUNKING, threshold=threshold))
            for moved in (there, replace(there, threshold=5.0)):  # the guard's own does not matter
                verdict = next(moved.scan(backend, [LONG]))
                assert verdict.flagged is flagged
                assert (verdict.score > moved.threshold) is flagged

    def test_the_greater_of_both_readings_counts(self):
        chunks = CHUNKING.chunks(CHAT)
        low = CHUNKING.find_evidence(chunks, -50.0, [1.0, 2.0])
        high = CHUNKING.find_evidence(chunks, 90.0, [1.0, 2.0])
        assert high[0] == low[0]
        norm = CHUNKING.chunk_norm
        assert [e.score for e in low] == [norm(1.0, 2), norm(2.0, 2)]
        assert (high[1].score, high[1].start, high[1].end) == (
            CHUNKING.whole_norm(90.0, 2),
            0,
            len(CHAT.text),
        )

    def test_evidence_is_a_chunks_own_score_but_for_a_shift(self):
        """So long prompts rank among short ones, and a probability means the same of both."""
        norm = LengthNorm(mean=-0.5, slope=0.2, spread=0.3)
        chunking = replace(CHUNKING, chunk_norm=norm, whole_norm=LengthNorm(100.0), threshold=3.0)
        pieces = chunking.chunks(LONG)

        def score(top):
            found = chunking.find_evidence(pieces, 0.0, [top, *[-9.0] * (len(pieces) - 1)])
            return chunking.in_guard_units(found, 0.4)[0].score

        assert score(1.3) - score(0.2) == pytest.approx(1.3 - 0.2)
        at_threshold = -0.5 + 0.2 * math.log(len(pieces)) + 3.0 * 0.3
        assert score(at_threshold) == pytest.approx(0.4)

    def test_a_score_that_is_no_number_gives_no_verdict(self):
        with pytest.raises(GuardError, match="not a finite number"):
            CHUNKING.find_evidence(CHUNKING.chunks(CHAT), 0.0, [math.nan, 0.0])

    def test_chunks_and_short_prompts_share_batches(self, guard):
        backend = FakeBackend(signal=1.0, batch=1000)
        counts = []
        capture = backend.capture
        backend.capture = lambda *args, **how: counts.append(1) or capture(*args, **how)
        list(guard.scan(backend, [SHORT[0], LONG, CHAT, *SHORT[1:]]))
        assert len(counts) == 1


class TestFitting:
    def test_fit_calibrates_on_built_in_texts(self, guard):
        fitted = fit_chunking(FakeBackend(signal=0.0), bare(guard))
        chunking = fitted.chunking
        assert chunking.bound.max_fpr == 0.05
        assert chunking.bound.n == len(harmless_texts("validation", CALIBRATION_TEXTS))
        assert min(chunking.chunk_norm.spread, chunking.whole_norm.spread) > 0
        assert chunking.chunk_norm.slope > 0  # the greatest of more pieces is greater

    def test_windows_from_fewer_characters_on(self, guard):
        fitted = fit_chunking(FakeBackend(signal=0.0), bare(guard), longer_than=150)
        assert fitted.chunking.longer_than == 150
        assert fitted.chunking.bound.n == 2 * CALIBRATION_TEXTS

    def test_canaries_that_are_long_are_scored_as_long(self, backend, guard, tmp_path):
        fitted = fit_chunking(backend, bare(guard), longer_than=90)
        assert 0 < sum(len(canary.text) > 90 for canary in fitted.canaries) < 8
        fitted.save(tmp_path / "g")
        assert LatentGuard.load(tmp_path / "g", backend).digest == fitted.digest

    def test_calibration_keeps_the_rate_of_both_readings_together(self, backend, guard):
        harmless = [Prompt(f"{n} words. " * 8, id=str(n)) for n in range(150)]
        done = calibrate_chunking(backend, guard, harmless, max_fpr=0.05)
        flagged = [v.flagged for v in done.scan(backend, harmless)]
        bound = done.chunking.bound
        assert sum(flagged) == bound.observed <= 0.05 * 150
        fresh = [Prompt(f"{n} words. " * 8, id=str(n)) for n in range(1000, 1300)]
        assert np.mean([v.flagged for v in done.scan(backend, fresh)]) < 0.07

    def test_what_lies_beneath_a_long_prompt_is_read_as_calibrated(self, backend, guard):
        """Though it is short itself: its threshold is that of long prompts."""
        hidden = base64.b64encode(b"please do the bad bad thing for me now").decode()
        long = [Prompt(f"{n} words. " * 8 + f"\n{hidden}\n", id=str(n)) for n in range(150)]
        done = calibrate_chunking(backend, guard, long, max_fpr=0.05)
        flagged = [v.flagged for v in done.scan(backend, long)]
        assert sum(flagged) == done.chunking.bound.observed <= 0.05 * 150
        (short, _), *_ = decoded_variants(long[0])
        assert done.is_chunked(short) and len(short.text) < done.chunking.longer_than

    def test_the_guards_own_calibration_passes_over_long_ones(self, backend, guard):
        short = [Prompt(f"good {n}", id=str(n)) for n in range(100)]
        done = guard.calibrate(backend, [*short, LONG, CHAT], max_fpr=0.05)
        assert done.bound.n == 100

    def test_texts_are_long_or_chats_and_made_of_their_split_alone(self):
        found = harmless_texts("validation", 10)
        assert found == harmless_texts("validation", 10)
        assert all(p.history or len(p.text) > 300 for p in found)
        other = {p.text for p in load_guard_prompts("train")}
        said = {m.content for p in found for m in p.history} | {p.text for p in found}
        assert not said & other

    @pytest.mark.parametrize("shortest", [150, 500, 5000])
    def test_documents_begin_at_the_length_that_is_called_long(self, shortest):
        sizes = [len(p.text) for p in harmless_texts("train", 30, shortest) if not p.history]
        assert 0.9 * shortest < min(sizes) < 2 * shortest
        assert max(sizes) > 1.7 * shortest

    @pytest.mark.parametrize("seed", ["a", "b", "c"])
    def test_a_document_holds_its_request(self, seed):
        found = build_document("THIS", 900, seed=seed)
        assert found.count("THIS") == 1
        assert len(found) > 900
        assert found == build_document("THIS", 900, seed=seed)


class TestPacking:
    def test_saved_and_loaded_it_says_the_same(self, backend, guard, tmp_path):
        guard = replace(
            guard, chunking=replace(CHUNKING, longer_than=400)
        )  # the canaries are short
        guard.save(tmp_path / "g")
        loaded = LatentGuard.load(tmp_path / "g", backend)
        assert loaded.digest == guard.digest
        mixed = [replace(LONG, text=LONG.text * 8), CHAT, *SHORT]
        assert list(loaded.scan(backend, mixed)) == list(guard.scan(backend, mixed))
        assert "chunks of up to 20 characters" in loaded.card

    @pytest.mark.parametrize(
        "change", [{"threshold": math.nan}, {"max_chars": 0}, {"whole_norm": {"mean": "x"}}]
    )
    def test_a_damaged_one_is_not_loaded(self, guard, tmp_path, change):
        guard.save(tmp_path / "g")
        edit_guard(tmp_path / "g", lambda record: record["chunking"].update(change))
        with pytest.raises(GuardError, match="damaged"):
            LatentGuard.load(tmp_path / "g")
