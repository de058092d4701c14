"""What the service says of a prompt: the guard's verdict, with its beliefs by layer and token."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from scipy.special import expit

from latentguard.errors import LatentGuardError, PromptError, TemplateError
from latentguard.guard.cascade import joint_verdict, opinion_of
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import Outcome, ScoredPlan, Variant, VariantScore
from latentguard.guard.verdict import Verdict
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.serve.errors import ApiError, BadRequest, Unavailable
from latentguard.serve.served_guards import ServedGuard
from latentguard.serve.shadow import ShadowDecision, attempt
from latentguard.serve.text_cache import TextCache
from latentguard.states import States

log = logging.getLogger("latentguard.serve")

ScorePair = tuple[VariantScore, VariantScore | None]
"""What a guard and its shadow measure on one text; None without a shadow, or if it failed."""


@dataclass(frozen=True)
class ScoredPrompt:
    """A verdict, and the belief of each axis by layer."""

    verdict: Verdict
    """The same as offline."""

    by_layer: dict[str, list[float]]
    """Equation 2 for each axis, over the guard's layers."""

    threshold: float
    """What the score was compared with: that of the prompt's segment, if it has its own."""

    readings: int = 1
    """How many texts of a chat were read; this is the most severe."""

    index: int = 0
    """Which of them it is."""

    source: str | None = None
    """Whose text it is, if it is of a chat."""

    is_whole: bool = True
    """Whether all texts of a chat were read; reading ends once a chat is blocked."""

    shadow: ScoredPrompt | None = None
    """What the shadow guard says of it; None without one, or if it failed."""

    @property
    def shadow_decision(self) -> ShadowDecision:
        """What the shadow guard would have decided, if there is one."""
        if self.shadow is None:
            return "failed"
        decision = self.shadow.verdict.decision
        return decision if self.shadow.is_whole or decision == "block" else "unread"

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it, with its threshold, the number of readings, its source."""
        source = {} if self.source is None else {"source": self.source}
        own = dict(threshold=self.threshold, readings=self.readings)
        return self.verdict.to_dict() | own | source


class PromptScorer:
    """Scores prompts with one guard, its shadow and its model; belongs to the scoring thread."""

    def __init__(
        self, served: ServedGuard, model: ChatModel, cache: TextCache[ScorePair] | None = None
    ) -> None:
        """Prepare.

        Args:
            served: The guard, and its shadow if it has one.
            model: Its model.
            cache: Scores of texts without a history, such as chunks of a chat's earlier turns;
                those of one guard and shadow are kept apart from those of others.
        """
        self._served, self.model, self._cache = served, model, cache
        self.guard = served.guard

    def score(self, prompts: Sequence[Prompt], accounts: Sequence[str]) -> list[ScoredPrompt]:
        """Score prompts in as few passes as they fit in; each verdict is that of ``guard.scan``.

        Args:
            prompts: What is scored.
            accounts: Whose each prompt is; what is cached for one is not used for another.

        Raises:
            PromptError: if a prompt is empty or too long.
            GuardError: if a state is not finite.
        """
        plans = [self.guard.plan(prompt) for prompt in prompts]
        rows = [
            (account, variant.prompt)
            for account, variants in zip(accounts, plans, strict=True)
            for variant in variants
        ]
        scores = iter(self._score_rows(rows))
        results = [
            judge(self._served, prompt, variants, list(islice(scores, len(variants))))
            for prompt, variants in zip(prompts, plans, strict=True)
        ]
        return self.with_second_pass(prompts, accounts, results)

    def with_second_pass(
        self, prompts: Sequence[Prompt], accounts: Sequence[str], results: Sequence[ScoredPrompt]
    ) -> list[ScoredPrompt]:
        """The results, with those of a shadow guard that needs a pass of its own."""
        shadow = self._served.shadow
        if shadow is None or self._served.shares_pass:
            return [*results]
        scorer = PromptScorer(shadow, self.model, self._cache)
        others = attempt(lambda: scorer.score_each(prompts, accounts))
        if others is None:
            return [*results]
        return [
            replace(own, shadow=other if isinstance(other, ScoredPrompt) else None)
            for own, other in zip(results, others, strict=True)
        ]

    def _score_rows(self, rows: Sequence[tuple[str, Prompt]]) -> list[ScorePair]:
        """The scores of each text, in order; those that are cached are not read."""
        cached_scores = [self._cached(account, text) for account, text in rows]
        missing = [row for row, score in zip(rows, cached_scores, strict=True) if score is None]
        fresh = list(self._read(iter([text for _, text in missing])))
        for (account, text), score in zip(missing, fresh, strict=True):
            if self._cache is not None and not text.history:
                self._cache.put(score, self._served.cache_key, account, text.text)
        scores = iter(fresh)
        return [next(scores) if score is None else score for score in cached_scores]

    def _read(self, texts: Iterator[Prompt]) -> Iterator[ScorePair]:
        for states in self.guard.capture(self.model, texts):
            yield from measure(self._served, states)

    def _cached(self, account: str, text: Prompt) -> ScorePair | None:
        if self._cache is None or text.history:
            return None
        return self._cache.get(self._served.cache_key, account, text.text)

    def score_each(
        self, prompts: Sequence[Prompt], accounts: Sequence[str]
    ) -> list[ScoredPrompt | ApiError]:
        """Score prompts together; one that cannot be scored does no harm to the others."""
        try:
            return [*self.score(prompts, accounts)]
        except LatentGuardError as error:
            if len(prompts) == 1:
                return [to_api_error(error)]
        errors = [self._why_unreadable(prompt) for prompt in prompts]
        sound = [n for n, error in enumerate(errors) if error is None]
        if len(sound) == len(prompts):
            pairs = zip(prompts, accounts, strict=True)
            return [self.score_each([prompt], [account])[0] for prompt, account in pairs]
        readable = [prompts[n] for n in sound], [accounts[n] for n in sound]
        scored = iter(self.score_each(*readable) if sound else ())
        return [error or next(scored) for error in errors]

    def _why_unreadable(self, prompt: Prompt) -> ApiError | None:
        """Why a prompt cannot be read, without a pass of the model."""
        try:
            layout = self.model.chat([self.guard.reading.prepare(prompt)])[0]
            self.model.check_length(len(layout.ids), prompt)
        except LatentGuardError as error:
            return to_api_error(error)
        return None


def score_prompts(
    served: ServedGuard, model: ChatModel, prompts: Sequence[Prompt]
) -> list[ScoredPrompt]:
    """Score prompts in as few passes as they fit in, without a cache (``PromptScorer.score``)."""
    return PromptScorer(served, model).score(prompts, [""] * len(prompts))


def measure(served: ServedGuard, states: States) -> list[ScorePair]:
    """What a guard measures on states, and its shadow if that reads the same.

    Raises:
        GuardError: if a number of the guard's is not finite; nothing that the shadow does.
    """
    own = served.guard.measure(states)
    shadow = served.shadow if served.shares_pass else None
    others = attempt(lambda: shadow.guard.measure(states)) if shadow else None
    if others is None:
        return [(score, None) for score in own]
    return list(zip(own, others, strict=True))


def judge(
    served: ServedGuard, prompt: Prompt, variants: Sequence[Variant], scores: Sequence[ScorePair]
) -> ScoredPrompt:
    """What the service says of a prompt from all that was read for it, with its shadow.

    Raises:
        GuardError: if a number of the guard's is not finite.
    """
    scored = _judge_alone(served.guard, prompt, variants, [own for own, _ in scores])
    shadow = served.shadow
    others = [other for _, other in scores if other is not None]
    if shadow is None or len(others) < len(scores):
        return scored
    guard = shadow.guard
    return replace(scored, shadow=attempt(lambda: _judge_alone(guard, prompt, variants, others)))


def _judge_alone(
    guard: LatentGuard, prompt: Prompt, variants: Sequence[Variant], scores: Sequence[VariantScore]
) -> ScoredPrompt:
    return scored_prompt(guard, prompt, guard.combine(ScoredPlan(prompt, variants, scores)))


def scored_prompt(guard: LatentGuard, prompt: Prompt, outcome: Outcome) -> ScoredPrompt:
    """What the service says of a prompt that was read."""
    verdict = outcome.verdict
    layers = {name: own.tolist() for name, own in outcome.whole.layer_beliefs.items()}
    return ScoredPrompt(verdict, layers, threshold_of(guard, prompt, verdict))


def threshold_of(guard: LatentGuard, prompt: Prompt, verdict: Verdict) -> float:
    """What a verdict's score was compared with.

    That is the threshold of its segment, if that has its own; the review threshold, if a second
    opinion blocks the prompt.
    """
    if verdict.flagged and verdict.second_opinion == "block":
        return review_threshold(guard, prompt.segment)
    return guard.threshold_for(prompt.segment, has_evidence=bool(verdict.evidence))


def review_threshold(guard: LatentGuard, segment: str | None) -> float:
    """Above which a second opinion is asked; for guards that have a review band."""
    assert guard.thresholds is not None
    band = guard.thresholds.for_segment(segment).review
    assert band is not None
    return band.threshold


def with_opinion(
    served: ServedGuard, prompt: Prompt, scored: ScoredPrompt, score: float | None
) -> ScoredPrompt:
    """A verdict in the review band, with the opinion of a second opinion's score.

    The shadow is given the same opinion, unless it allows the prompt by itself.
    """
    verdict = joint_verdict(scored.verdict, opinion_of(score, served.guard))
    threshold = threshold_of(served.guard, prompt, verdict)
    result = replace(scored, verdict=verdict, threshold=threshold)
    own, beside = scored.shadow, served.shadow
    if own is None or beside is None or own.verdict.decision == "allow":
        return result
    return replace(result, shadow=attempt(lambda: with_opinion(beside, prompt, own, score)))


def moved_probability(platt: tuple[float, float], score: float, threshold: float) -> float:
    """The probability, moved so that it is over 0.5 exactly if the score is above the threshold.

    Args:
        platt: Slope and intercept of the probability in the score.
        score: Of a prompt or a reply.
        threshold: What it is compared with.
    """
    return float(expit(abs(platt[0]) * (score - threshold)))


def to_api_error(error: LatentGuardError) -> ApiError:
    """What a client is told: of its own text all, of the service nothing."""
    if isinstance(error, (PromptError, TemplateError)):
        return BadRequest(str(error))
    log.error("No verdict: %s", error)
    return Unavailable("The guard cannot give a verdict on this prompt.")
