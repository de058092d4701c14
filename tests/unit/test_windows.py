"""Windows: stretches, norms, one threshold for both readings, and who is read by them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_backend import FakeBackend, labelled, texts

from latentguard import window_fitting
from latentguard.contrast.frames import document, framed
from latentguard.errors import GuardError
from latentguard.guard import LatentGuard
from latentguard.panel import scan_many
from latentguard.prompts import Message, Prompt
from latentguard.readouts import Readout
from latentguard.states import States
from latentguard.traces import Trace, Turn
from latentguard.window_fitting import (
    calibrate_windows,
    fit_windows,
    harmless_texts,
    training_texts,
)
from latentguard.windows import Norm, Windows, best_stretch, stretches

PROBE = Readout("linear", (2, 3), torch.ones(2, 16), 0.25)
WINDOWS = Windows(PROBE, threshold=2.0, size=4, over=6)


class Tracer(FakeBackend):
    """A backend that traces: a token is a word, and "bad" ones score 4, others about 0."""

    def count(self, prompt):
        return len(prompt.text.split())

    def _index(self, position):
        return 0 if position.startswith("inst-") else super()._index(position)

    def trace(self, prompt, *, positions, layers, probe):
        numbers = [n for n, m in enumerate(prompt.history) if m.role == "user"]
        prompts = [Prompt(prompt.history[n].content, history=prompt.history[:n]) for n in numbers]
        prompts, numbers = [*prompts, prompt], [*numbers, len(prompt.history)]
        states = States.collect(self.capture(prompts, positions=positions, layers=layers))
        turns = [turn_of(n, p.text) for n, p in zip(numbers, prompts, strict=True)]
        return Trace(states, tuple(turns))


def turn_of(number, text):
    words, spans, at = text.split(), [], 0
    for word in words:
        at = text.index(word, at)
        spans.append((at, at + len(word)))
        at += len(word)
    scores = torch.tensor([4.0 if w == "bad" else len(w) % 3 / 10 for w in words])
    return Turn(number, tuple(spans), scores)


@pytest.fixture(scope="module")
def backend():
    return Tracer(signal=1.0)


@pytest.fixture(scope="module")
def guard(backend):
    return LatentGuard.fit(backend, labelled(30)).with_part(WINDOWS)


LONG = Prompt("one two three four five bad bad bad bad ten eleven", id="long")
SHORT = [Prompt(text, id=text) for text in texts(5, bad=True, name="x")]
CHAT = Prompt("go on", id="chat", history=(Message("user", "bad day"), Message("assistant", "?")))


class TestStretches:
    def test_they_are_the_means_of_runs(self):
        scores = torch.randn(13)
        means = [float(scores[n : n + 4].double().mean()) for n in range(10)]
        np.testing.assert_allclose(stretches(scores, 4), means)

    def test_a_short_turn_is_one_stretch(self):
        assert stretches(torch.tensor([1.0, 2.0]), 4).tolist() == [1.5]

    def test_the_best_one_is_named_by_its_characters(self):
        turn = turn_of(0, LONG.text)
        value, start, end = best_stretch(turn, 4)
        assert (value, LONG.text[start:end]) == (4.0, "bad bad bad bad")


class TestNorm:
    def test_it_finds_a_planted_line(self):
        rng = np.random.default_rng(0)
        sizes = rng.uniform(1, 30, 4000)
        values = 1.5 + 0.4 * np.log(sizes) + 0.2 * rng.standard_normal(4000)
        norm = Norm.fit(values, sizes)
        assert norm.mean == pytest.approx(1.5, abs=0.03)
        assert norm.slope == pytest.approx(0.4, abs=0.02)
        assert norm.spread == pytest.approx(0.2, abs=0.01)
        assert norm(1.5 + 0.4 * math.log(8) + 0.4, 8) == pytest.approx(2, abs=0.15)

    def test_one_size_is_flat(self):
        norm = Norm.fit([1.0, 2.0, 3.0], [1, 1, 1])
        assert (norm.mean, norm.slope) == (2.0, 0.0)

    def test_a_longer_text_is_never_held_to_less(self):
        assert Norm.fit([3.0, 2.0, 1.2], [1, 2, 3]).slope == 0

    def test_scores_that_do_not_vary_are_refused(self):
        with pytest.raises(GuardError, match="do not show how scores vary"):
            Norm.fit([1.0, 1.0, 1.0], [1, 2, 3])


class TestWhoIsReadByWindows:
    def test_long_prompts_and_chats_in_which_the_user_has_spoken(self, backend):
        system = Prompt("hello there", history=(Message("system", "Be brief."),))
        assert [WINDOWS.needed(backend, p) for p in (LONG, CHAT, system, SHORT[0])] == [
            True,
            True,
            False,
            True,  # seven words, over six
        ]

    def test_a_text_of_few_bytes_is_not_counted(self):
        assert not WINDOWS.needed(FakeBackend(), Prompt("abcdef"))

    def test_a_backend_that_cannot_is_refused(self):
        with pytest.raises(GuardError, match="FakeBackend cannot"):
            WINDOWS.needed(FakeBackend(), LONG)


class TestScan:
    def test_order_is_kept_and_short_verdicts_stay(self, backend, guard):
        wide = guard.with_part(replace(WINDOWS, over=7))
        mixed = [SHORT[0], LONG, SHORT[1], CHAT, *SHORT[2:]]
        seen = []
        verdicts = list(wide.scan(backend, mixed, progress=seen.append))
        bare = list(replace(guard, parts=()).scan(backend, SHORT))
        assert [v.id for v in verdicts] == [p.id for p in mixed]
        assert [v for v in verdicts if not v.evidence] == bare
        assert sum(seen) == len(mixed)

    def test_evidence_names_the_turn_and_the_stretch(self, backend, guard):
        verdict = next(guard.scan(backend, [LONG]))
        (found,) = verdict.evidence
        assert LONG.text[found.start : found.end] == "bad bad bad bad"
        assert verdict.score == found.score
        assert [e.message for e in next(guard.scan(backend, [CHAT])).evidence] == [0, 2]

    def test_flagged_is_over_the_threshold_of_the_windows(self, backend, guard):
        trace = guard.trace(backend, LONG)
        top = max(e.score for e in WINDOWS.find(trace, guard.scores(trace.states).tolist()))
        for threshold, flagged in ((top - 0.01, True), (top + 0.01, False)):
            held = guard.with_part(replace(WINDOWS, threshold=threshold))
            for moved in (held, replace(held, threshold=5.0)):  # the guard's own does not matter
                verdict = next(moved.scan(backend, [LONG]))
                assert verdict.flagged is flagged
                assert (verdict.score > moved.threshold) is flagged

    def test_the_greater_of_both_readings_counts(self, backend, guard):
        trace = guard.trace(backend, CHAT)
        low = WINDOWS.find(trace, [-50.0, -50.0])
        high = WINDOWS.find(trace, [-50.0, 90.0])
        assert high[0] == low[0]
        assert (high[1].score, high[1].start, high[1].end) == (
            replace(WINDOWS).turn(90.0, 2),
            0,
            len(CHAT.text),
        )

    def test_a_score_that_is_no_number_gives_no_verdict(self, backend, guard):
        trace = guard.trace(backend, LONG)
        scores = torch.full_like(trace.turns[0].scores, torch.nan)
        broken = replace(trace, turns=(replace(trace.turns[0], scores=scores),))
        with pytest.raises(GuardError, match="not a finite number"):
            guard.judge_trace(broken)

    def test_a_panel_does_not_pass_windows_over(self, backend, guard):
        with pytest.raises(GuardError, match="scan with it alone"):
            next(scan_many([guard], backend, [LONG]))

    def test_a_guard_without_windows_traces_nothing(self, backend, guard):
        with pytest.raises(GuardError, match="has no windows"):
            replace(guard, parts=()).trace(backend, LONG)


class TestFitting:
    def test_fit_calibrates_on_built_in_texts(self, guard, monkeypatch):
        monkeypatch.setattr(window_fitting, "training_texts", lambda: training_texts()[:120])
        fitted = fit_windows(Tracer(signal=0.0), replace(guard, parts=()))
        windows = fitted.part(Windows)
        assert windows.bound.max_fpr == 0.05
        assert windows.bound.n == len(harmless_texts("validation", 48, 4))
        assert windows.probe.weight.shape == (len(windows.probe.layers), 16)
        assert min(windows.stretch.spread, windows.turn.spread, windows.end.spread) > 0

    def test_a_sealed_reading_is_refused(self, backend):
        sealed = LatentGuard.fit(backend, labelled(30), reading="sealed")
        with pytest.raises(GuardError, match="another reading"):
            fit_windows(backend, sealed)

    def test_calibration_keeps_the_rate_of_both_readings_together(self, backend, guard):
        harmless = [Prompt(f"{n} words " * 5, id=str(n)) for n in range(150)]
        done = calibrate_windows(backend, guard, harmless, max_fpr=0.05)
        flagged = [v.flagged for v in done.scan(backend, harmless)]
        bound = done.part(Windows).bound
        assert sum(flagged) == bound.observed <= 0.05 * 150
        fresh = [Prompt(f"{n} words " * 5, id=str(n)) for n in range(1000, 1300)]
        assert np.mean([v.flagged for v in done.scan(backend, fresh)]) < 0.07

    def test_the_guards_own_calibration_passes_over_long_ones(self, backend, guard):
        short = [Prompt(f"good {n}", id=str(n)) for n in range(100)]
        done = guard.calibrate(backend, [*short, LONG, CHAT], max_fpr=0.05)
        assert done.bound.n == 100

    def test_twins_stand_in_the_same_text(self):
        pairs = {}
        for text in training_texts():
            if not text.id.startswith("lines "):
                pairs.setdefault(text.pair, []).append(text.text)
        heads = [a.splitlines()[:-1] == b.splitlines()[:-1] for a, b in pairs.values()]
        assert all(heads)
        assert training_texts() == training_texts()

    def test_frames_say_where_the_request_is(self):
        for seed in "abc":
            for found in (
                framed("THIS", before=3, after=2, seed=seed),
                document("THIS", 900, seed=seed),
            ):
                assert found.text[found.start : found.stop] == "THIS"
            assert len(found.text) > 900


class TestPacking:
    def test_saved_and_loaded_it_says_the_same(self, backend, guard, tmp_path):
        guard = guard.with_part(replace(WINDOWS, over=50))  # the canaries are short
        guard.save(tmp_path / "g")
        loaded = LatentGuard.load(tmp_path / "g", backend)
        assert loaded.digest == guard.digest
        mixed = [replace(LONG, text=LONG.text * 5), CHAT, *SHORT]
        assert list(loaded.scan(backend, mixed)) == list(guard.scan(backend, mixed))
        assert "stretches of 4 tokens" in loaded.card

    @pytest.mark.parametrize(
        "change", [{"threshold": math.nan}, {"size": 0}, {"turn": {"mean": "x"}}]
    )
    def test_a_damaged_one_is_not_loaded(self, guard, tmp_path, change):
        guard.save(tmp_path / "g")
        path = tmp_path / "g" / "guard.json"
        record = json.loads(path.read_text())
        record["parts"]["windows"] |= change
        path.write_text(json.dumps(record))
        with pytest.raises(GuardError, match="damaged"):
            LatentGuard.load(tmp_path / "g")
