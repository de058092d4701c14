"""Plan, score, combine: what is read of a prompt, in which order, and what is made of it."""

from dataclasses import replace
from functools import partial

import pytest

from fake_backend import FakeBackend, labelled
from latentguard.errors import GuardError
from latentguard.guard.chunking import Chunking
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import ScoredPlan, VariantScore, score_plans
from latentguard.prompts import Message, Prompt

SHORT = Prompt("Please do the good item", id="short")
HIDDEN = Prompt("Please do the b\u200bad item", id="hidden")
LONG = Prompt("A good start of it. " * 4 + "Then a bad one.", id="long")
CHAT = Prompt("go on", id="chat", history=(Message("user", "bad day"), Message("assistant", "?")))
HIDDEN_CHAT = Prompt("g\u200bo on", id="both", history=CHAT.history)
ASKED = [SHORT, HIDDEN, LONG, CHAT, HIDDEN_CHAT]


@pytest.fixture(scope="module")
def backend():
    return FakeBackend(signal=1.0)


@pytest.fixture(scope="module")
def guard(backend):
    chunking = Chunking(threshold=0.5, max_chars=20, longer_than=60)
    return replace(LatentGuard.fit(backend, labelled(40)), chunking=chunking)


class Engine:
    """Lets no states out, as vLLM: scores texts for a guard, each in a batch of its own."""

    def __init__(self, backend):
        self.backend, self.fingerprint, self.calls, self.texts = backend, backend.fingerprint, 0, []

    def scores(self, guard, texts):
        self.calls += 1
        for text in texts:
            self.texts.append(text.text)
            layers = guard.probe.layers
            states = next(self.backend.capture([text], positions=guard.positions, layers=layers))
            (score,) = guard.measure(states)
            yield VariantScore(score.score, score.beliefs)


class TestPlan:
    def test_a_short_plain_prompt_is_read_once_as_it_is(self, guard):
        (variant,) = guard.plan(SHORT)
        assert variant.prompt is SHORT
        assert (variant.version, variant.obfuscations, variant.chunk) == (0, (), None)

    def test_each_version_comes_whole_and_before_its_chunks(self, guard):
        variants = guard.plan(HIDDEN_CHAT)
        assert [(v.version, v.chunk is None) for v in variants] == [
            (0, True),
            (0, False),
            (0, False),
            (1, True),
            (1, False),
            (1, False),
        ]
        assert {v.obfuscations for v in variants if v.version == 1} == {("unseen characters",)}
        assert [v.prompt.text for v in variants[3:]] == ["go on", "bad day", "go on"]
        assert [bool(v.prompt.history) for v in variants] == [True, False, False] * 2

    def test_texts_are_prepared_as_the_reading_wants_them(self, backend):
        sealed = LatentGuard.fit(backend, labelled(40), reading="sealed")
        assert [v.prompt.text for v in sealed.plan(Prompt("Really?!"))] == ["Really."]

    def test_the_papers_guard_plans_one_text(self, backend):
        paper = LatentGuard.fit(backend, labelled(40), reading="t_inst", probe="centroid")
        assert all(len(paper.plan(prompt)) == 1 for prompt in ASKED)


class TestScore:
    def test_every_text_of_every_prompt_goes_in_one_flat_call(self, guard, backend):
        engine = Engine(backend)
        verdicts = list(guard.scan(engine, ASKED))
        assert engine.calls == 1
        assert engine.texts == [v.prompt.text for p in ASKED for v in guard.plan(p)]
        assert [v.id for v in verdicts] == [p.id for p in ASKED]

    def test_whoever_scores_the_verdicts_are_the_same(self, guard, backend):
        inside, outside = guard.scan(Engine(backend), ASKED), guard.scan(backend, ASKED)
        for one, other in zip(inside, outside, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-6)
            assert (one.decision, one.obfuscations) == (other.decision, other.obfuscations)
            assert [(e.message, e.start, e.end) for e in one.evidence] == [
                (e.message, e.start, e.end) for e in other.evidence
            ]

    def test_prompts_are_planned_as_they_are_needed(self, guard, backend):
        taken = []
        prompts = (taken.append(p) or p for p in ASKED * 10)
        next(score_plans(prompts, guard.plan, partial(guard.score, FakeBackend(batch=2))))
        assert len(taken) <= 2


class TestCombine:
    def scored(self, guard, prompt, scores):
        values = [VariantScore(score, {"harmful": 0.0}) for score in scores]
        return guard.combine(ScoredPlan(prompt, guard.plan(prompt), values))

    def test_the_most_severe_version_decides_and_is_what_was_measured(self, guard):
        low, high = self.scored(guard, HIDDEN, [5.0, 1.0]), self.scored(guard, HIDDEN, [1.0, 5.0])
        assert (low.verdict.score, low.verdict.obfuscations) == (5.0, ())
        assert (high.verdict.score, high.verdict.obfuscations) == (5.0, ("unseen characters",))
        assert (low.whole.score, high.whole.score) == (5.0, 5.0)

    def test_of_versions_that_are_alike_the_first_decides(self, guard):
        assert self.scored(guard, HIDDEN, [1.0, 1.0]).verdict.obfuscations == ()
        near = self.scored(guard, HIDDEN, [1.0, 1.0 + 1e-6 * guard.spread])
        assert near.verdict.obfuscations == ()

    def test_a_prefix_of_the_plan_can_be_combined(self, guard):
        """Who stops at the first version that is flagged has read no more."""
        plan = guard.plan(HIDDEN)
        scored = ScoredPlan(HIDDEN, plan[:1], [VariantScore(3.0, {"harmful": 0.0})])
        assert guard.combine(scored).verdict.score == 3.0

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_number_that_is_not_finite_gives_no_verdict(self, guard, value):
        for prompt in ASKED:
            count = len(guard.plan(prompt))
            for at in range(count):
                scores = [1.0] * count
                scores[at] = value
                with pytest.raises(GuardError, match="not a finite number"):
                    self.scored(guard, prompt, scores)
