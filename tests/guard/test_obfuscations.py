"""A guard reads what looks obfuscated as it stands and decoded; the most severe counts."""

import base64
from dataclasses import replace

import pytest

from fake_backend import FakeBackend, labelled, texts
from latentguard.guard.chunking import Chunking, LengthNorm
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import decoded_variants
from latentguard.prompts import Message, Prompt

HIDDEN = "Please do the b\u200bad item number 3"
PLAIN = "Please do the bad item number 3"
OPEN = "Please do the bad \uff49\uff54\uff45\uff4d of goo\u200bd"


@pytest.fixture(scope="module")
def guard():
    return LatentGuard.fit(FakeBackend(), labelled(60))


def without_decoding(guard):
    return replace(guard, deobfuscate=False)


def scores(guard, prompts):
    return [verdict.score for verdict in guard.scan(FakeBackend(), prompts)]


def test_the_decoded_text_is_judged_too(guard):
    (verdict,) = guard.scan(FakeBackend(), [Prompt(HIDDEN, id="h")])
    assert (verdict.id, verdict.obfuscations) == ("h", ("unseen characters",))
    (open_,) = guard.scan(FakeBackend(), [PLAIN])
    assert verdict.score == open_.score
    assert verdict.flagged
    assert not next(without_decoding(guard).scan(FakeBackend(), [HIDDEN])).flagged


def test_the_more_harmful_reading_counts(guard):
    ((other, _),) = decoded_variants(Prompt(OPEN))
    as_it_stands, decoded = scores(without_decoding(guard), [OPEN, other])
    (verdict,) = guard.scan(FakeBackend(), [OPEN])
    assert verdict.score == max(as_it_stands, decoded)
    assert bool(verdict.obfuscations) == (decoded > as_it_stands)


def test_plain_prompts_are_read_once_and_score_as_ever(guard):
    asked, backend = texts(9, bad=True) + texts(9, bad=False), FakeBackend()
    found = list(guard.scan(backend, asked))
    assert backend.captured == asked
    assert found == list(without_decoding(guard).scan(FakeBackend(), asked))
    assert not any(verdict.obfuscations for verdict in found)


def test_verdicts_come_in_order_and_lazily(guard):
    asked = [p for pair in zip(texts(20, bad=False), [HIDDEN] * 20, strict=True) for p in pair]
    found = list(guard.scan(FakeBackend(batch=7), asked))
    assert [bool(v.obfuscations) for v in found] == [False, True] * 20
    drawn = []
    rows = guard.scan(FakeBackend(batch=4), (drawn.append(t) or t for t in asked))
    next(rows)
    assert 0 < len(drawn) <= 8


def test_earlier_turns_of_the_user_are_decoded(guard):
    turns = (Message("user", "h\u200bi"), Message("assistant", "h\u200bi"))
    ((found, names),) = decoded_variants(Prompt("good", history=turns))
    assert [turn.content for turn in found.history] == ["hi", "h\u200bi"]
    assert names == ("unseen characters",)


def test_a_prompt_that_decodes_to_nothing_is_read_as_it_stands():
    assert decoded_variants(Prompt(" \u200b")) == []


def test_the_papers_guard_reads_what_is_served(guard):
    paper = LatentGuard.fit(FakeBackend(), labelled(60), reading="t_inst", probe="centroid")
    assert not paper.deobfuscate
    assert guard.deobfuscate
    assert len(scores(paper, [HIDDEN])) == 1


def test_saved_and_loaded_and_named_on_the_card(guard, tmp_path):
    guard.save(tmp_path)
    again = LatentGuard.load(tmp_path)
    assert again.digest == guard.digest != without_decoding(guard).digest
    assert scores(again, [HIDDEN]) == scores(guard, [HIDDEN])
    assert "look-alikes" in again.card


def test_calibration_counts_prompts_not_readings(guard):
    calm = [Prompt(text.replace("good", "g\u200bood")) for text in texts(70, bad=False, start=90)]
    seen = []
    found = guard.calibrate(FakeBackend(), calm, max_fpr=0.1, progress=seen.append)
    assert found.bound.n == sum(seen) == 70


def test_evidence_of_a_decoded_text_names_the_whole_turn(guard):
    norm = LengthNorm(0, 0, 1)
    chunking = Chunking(norm, norm, threshold=0.0, max_chars=20, longer_than=10)
    long = replace(guard, chunking=chunking)
    (verdict,) = long.scan(FakeBackend(), [Prompt(HIDDEN)])
    assert verdict.obfuscations
    assert [(e.message, e.start, e.end) for e in verdict.evidence] == [(0, 0, len(HIDDEN))]


def test_embedded_codes_are_read_as_versions_of_their_own(guard):
    code = base64.b64encode(b"what a good day it is").decode()
    backend = FakeBackend()
    (verdict,) = guard.scan(backend, [f"{HIDDEN} {code}"])
    assert len(backend.captured) == 3
    assert verdict.flagged


def test_turns_are_decoded_together():
    turns = (Message("user", "h\u200bi"), Message("assistant", "Hello."))
    code = base64.b64encode(b"what a good day it is").decode()
    found = decoded_variants(Prompt(f"b\u200bad {code}", history=turns))
    assert [(p.history[0].content, p.text[:4]) for p, _ in found] == [
        ("hi", "bad "),
        ("hi", "what"),
    ]


def test_a_flag_beats_a_higher_score(guard):
    calm, alarmed = (next(guard.scan(FakeBackend(), texts(1, bad=bad))) for bad in (False, True))
    high = replace(calm, score=alarmed.score + 1)
    assert alarmed.is_more_severe_than(high)
    review = replace(calm, decision="review")
    assert review.is_more_severe_than(high)


def test_rounding_does_not_choose_between_versions_of_a_prompt(guard):
    calm = next(guard.scan(FakeBackend(), texts(1, bad=False)))
    near = replace(calm, score=calm.score + 1e-6)
    assert near.is_more_severe_than(calm)
    assert not near.is_more_severe_than(calm, tie=1e-4)
