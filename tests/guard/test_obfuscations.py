"""A guard reads what is disguised as it stands and undone, and the worst reading counts."""

import base64
from dataclasses import replace

import pytest

from fake_backend import FakeBackend, labelled, texts
from latentguard.guard.chunking import Norm, Windows
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.obfuscations import Obfuscations, beneath, worse
from latentguard.guard.panel import scan_many
from latentguard.prompts import Message, Prompt

HIDDEN = "Please do the b\u200bad item number 3"
PLAIN = "Please do the bad item number 3"
OPEN = "Please do the bad \uff49\uff54\uff45\uff4d of goo\u200bd"


@pytest.fixture(scope="module")
def guard():
    return LatentGuard.fit(FakeBackend(), labelled(60))


def bare(guard):
    return replace(guard, parts=tuple(p for p in guard.parts if not isinstance(p, Obfuscations)))


def scores(guard, prompts):
    return [verdict.score for verdict in guard.scan(FakeBackend(), prompts)]


def test_the_text_beneath_is_judged_too(guard):
    (verdict,) = guard.scan(FakeBackend(), [Prompt(HIDDEN, id="h")])
    assert (verdict.id, verdict.obfuscations) == ("h", ("unseen characters",))
    (open_,) = guard.scan(FakeBackend(), [PLAIN])
    assert verdict.score == open_.score
    assert verdict.flagged
    assert not next(bare(guard).scan(FakeBackend(), [HIDDEN])).flagged


def test_the_more_harmful_reading_counts(guard):
    ((other, _),) = beneath(Prompt(OPEN))
    as_it_stands, under = scores(bare(guard), [OPEN, other])
    (verdict,) = guard.scan(FakeBackend(), [OPEN])
    assert verdict.score == max(as_it_stands, under)
    assert bool(verdict.obfuscations) == (under > as_it_stands)


def test_plain_prompts_are_read_once_and_score_as_ever(guard):
    asked, backend = texts(9, bad=True) + texts(9, bad=False), FakeBackend()
    found = list(guard.scan(backend, asked))
    assert backend.captured == asked
    assert found == list(bare(guard).scan(FakeBackend(), asked))
    assert not any(verdict.obfuscations for verdict in found)


def test_verdicts_come_in_order_and_lazily(guard):
    asked = [p for pair in zip(texts(20, bad=False), [HIDDEN] * 20, strict=True) for p in pair]
    found = list(guard.scan(FakeBackend(batch=7), asked))
    assert [bool(v.obfuscations) for v in found] == [False, True] * 20
    drawn = []
    rows = guard.scan(FakeBackend(batch=4), (drawn.append(t) or t for t in asked))
    next(rows)
    assert 0 < len(drawn) <= 8


def test_earlier_turns_of_the_user_are_undone(guard):
    turns = (Message("user", "h\u200bi"), Message("assistant", "h\u200bi"))
    ((found, names),) = beneath(Prompt("good", history=turns))
    assert [turn.content for turn in found.history] == ["hi", "h\u200bi"]
    assert names == ("unseen characters",)


def test_one_that_says_nothing_beneath_is_read_as_it_stands():
    assert beneath(Prompt(" \u200b")) == []


def test_the_papers_guard_reads_what_is_served(guard):
    paper = LatentGuard.fit(FakeBackend(), labelled(60), reading="t_inst", probe="centroid")
    assert paper.part(Obfuscations) is None
    assert guard.part(Obfuscations) is not None
    assert len(scores(paper, [HIDDEN])) == 1


def test_saved_and_loaded_told_on_the_card(guard, tmp_path):
    guard.save(tmp_path)
    again = LatentGuard.load(tmp_path)
    assert again.digest == guard.digest != bare(guard).digest
    assert scores(again, [HIDDEN]) == scores(guard, [HIDDEN])
    assert "look-alikes" in again.card


def test_calibration_counts_prompts_not_readings(guard):
    calm = [Prompt(text.replace("good", "g\u200bood")) for text in texts(70, bad=False, start=90)]
    seen = []
    found = guard.calibrate(FakeBackend(), calm, max_fpr=0.1, progress=seen.append)
    assert found.bound.n == sum(seen) == 70


def test_a_panel_says_what_each_guard_says(guard):
    panel, asked = [guard, bare(guard)], [HIDDEN, PLAIN, OPEN, *texts(5, bad=False)]
    alone = zip(*(one.scan(FakeBackend(), asked) for one in panel), strict=True)
    for found, wanted in zip(scan_many(panel, FakeBackend(), asked), alone, strict=True):
        assert [v.obfuscations for v in found] == [v.obfuscations for v in wanted]
        assert [v.score for v in found] == pytest.approx([v.score for v in wanted])


def test_evidence_beneath_names_the_turn(guard):
    windows = Windows(Norm(0, 0, 1), Norm(0, 0, 1), threshold=0.0, size=20, over=10)
    long = guard.with_part(windows)
    (verdict,) = long.scan(FakeBackend(), [Prompt(HIDDEN)])
    assert verdict.obfuscations
    assert [(e.message, e.start, e.end) for e in verdict.evidence] == [(0, 0, len(HIDDEN))]


def test_codes_are_read_apart_from_what_is_undone_in_place(guard):
    code = base64.b64encode(b"what a good day it is").decode()
    backend = FakeBackend()
    (verdict,) = guard.scan(backend, [f"{HIDDEN} {code}"])
    assert len(backend.captured) == 3
    assert verdict.flagged


def test_turns_are_undone_together():
    turns = (Message("user", "h\u200bi"), Message("assistant", "Hello."))
    code = base64.b64encode(b"what a good day it is").decode()
    found = beneath(Prompt(f"b\u200bad {code}", history=turns))
    assert [(p.history[0].content, p.text[:4]) for p, _ in found] == [
        ("hi", "bad "),
        ("hi", "what"),
    ]


def test_a_flag_beats_a_higher_score(guard):
    calm, alarmed = (next(guard.scan(FakeBackend(), texts(1, bad=bad))) for bad in (False, True))
    high = replace(calm, score=alarmed.score + 1)
    assert worse(high, alarmed, lambda verdict: verdict) is alarmed
    assert worse(alarmed, high, lambda verdict: verdict) is alarmed
    review = replace(calm, decision="review")
    assert worse(high, review, lambda verdict: verdict) is review
