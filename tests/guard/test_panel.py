"""Several guards on one capture give the verdicts that each gives alone."""

from dataclasses import replace

import pytest
import torch

import latentguard
from fake_backend import FINGERPRINT, FakeBackend, labelled, texts, with_refusals
from latentguard.errors import GuardError, ModelMismatch
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.panel import scan_many

READINGS = ("span", "t_inst", "sealed", "t_post", "post+1", "sealed")
ASKED = [text + end for n, end in enumerate("!?. ") for text in texts(5, bad=n % 2 > 0, start=n)]


@pytest.fixture(scope="module")
def guards():
    rows = with_refusals(labelled(60))
    kinds = ("linear", "centroid", "linear", "linear", "centroid", "centroid")
    return [
        LatentGuard.fit(FakeBackend(), rows, reading=reading, probe=kind)
        for reading, kind in zip(READINGS, kinds, strict=True)
    ]


def rows_of(guards, prompts, **how):
    return list(scan_many(guards, FakeBackend(**how), prompts))


def test_each_verdict_is_that_of_the_guard_alone(guards):
    alone = [list(guard.scan(FakeBackend(), ASKED)) for guard in guards]
    assert rows_of(guards, ASKED) == list(zip(*alone, strict=True))
    assert rows_of(guards[2:3], ASKED) == [(verdict,) for verdict in alone[2]]


def test_one_pass_serves_all_and_a_second_the_sealed(guards):
    backend, seen = FakeBackend(), []
    list(scan_many(guards, backend, ASKED, progress=seen.append))
    assert sum(seen) == len(ASKED)
    assert len(backend.captured) == 2 * len(ASKED)
    backend = FakeBackend()
    list(scan_many([guards[0], guards[1], guards[3], guards[4]] * 10, backend, ASKED))
    assert backend.captured == ASKED


def test_prompts_are_read_lazily(guards):
    drawn = []
    rows = scan_many(guards, FakeBackend(batch=4), (drawn.append(t) or t for t in ASKED))
    assert not drawn
    next(rows)
    assert 4 <= len(drawn) <= 8
    assert rows_of(guards, []) == []


def test_real_states_agree_with_one_guard_and_with_many(model):
    readings = ("span", "t_inst", "t_post")
    guards = [LatentGuard.fit(model, labelled(12), reading=reading) for reading in readings]
    rows = list(zip(*(guard.scan(model, ASKED) for guard in guards), strict=True))
    for together, alone in zip(scan_many(guards, model, ASKED), rows, strict=True):
        for ours, theirs, guard in zip(together, alone, guards, strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=1e-5 * guard.spread)
            assert (ours.id, ours.flagged) == (theirs.id, theirs.flagged)


def test_more_guards_cost_no_forward_pass(model, monkeypatch):
    guards = [LatentGuard.fit(model, labelled(12), reading=name) for name in ("span", "t_inst")]
    passes, run = [], model._run
    monkeypatch.setattr(model, "_run", lambda *args: passes.append(1) or run(*args))
    counts = []
    for copies in (1, 10):
        passes.clear()
        list(scan_many(guards * copies, model, ASKED))
        counts.append(len(passes))
    assert counts[0] == counts[1] > 0


def test_no_guard_is_refused():
    with pytest.raises(GuardError, match="at least one"):
        rows_of([], ASKED)


def test_one_guard_of_another_model_refuses_all(guards):
    other = replace(guards[0], fingerprint=replace(FINGERPRINT, weights="f" * 64))
    with pytest.raises(ModelMismatch, match="weights"):
        rows_of([*guards, other], ASKED)


def test_a_state_that_is_not_finite_gives_no_verdict(guards):
    with pytest.raises(GuardError, match="not a finite number"):
        rows_of(guards, ASKED, shift=torch.nan)


def test_it_is_a_public_name():
    assert latentguard.scan_many is scan_many
