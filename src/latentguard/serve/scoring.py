"""What the service says of a prompt: the guard's verdict, with its beliefs by layer and token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from scipy.special import expit

from latentguard.errors import LatentGuardError, PromptError, TemplateError
from latentguard.guard.cascade import joint_verdict
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import Outcome, ScoredPlan, VariantScore
from latentguard.guard.verdict import Opinion, Verdict
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.serve.errors import ApiError, BadRequest, Unavailable
from latentguard.serve.text_cache import TextCache

log = logging.getLogger("latentguard.serve")


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

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it, with its threshold, the number of readings, its source."""
        source = {} if self.source is None else {"source": self.source}
        own = dict(threshold=self.threshold, readings=self.readings)
        return self.verdict.to_dict() | own | source


class PromptScorer:
    """Scores prompts with one guard and its model; belongs to the scoring thread."""

    def __init__(
        self,
        guard: LatentGuard,
        model: ChatModel,
        cache: TextCache[VariantScore] | None = None,
        *,
        digest: str = "",
    ) -> None:
        """Prepare.

        Args:
            guard: The guard.
            model: Its model.
            cache: Scores of texts without a history, such as chunks of a chat's earlier turns.
            digest: Of the guard, whose scores are kept apart from those of others.
        """
        self.guard, self.model, self._cache = guard, model, cache
        self._guard_digest = digest

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
        results = []
        for prompt, variants in zip(prompts, plans, strict=True):
            scored = ScoredPlan(prompt, variants, list(islice(scores, len(variants))))
            results.append(scored_prompt(self.guard, prompt, self.guard.combine(scored)))
        return results

    def _score_rows(self, rows: Sequence[tuple[str, Prompt]]) -> list[VariantScore]:
        """The score of each text, in order; those that are cached are not read."""
        cached_scores = [self._cached(account, text) for account, text in rows]
        missing = [row for row, score in zip(rows, cached_scores, strict=True) if score is None]
        texts = iter([text for _, text in missing])
        fresh = list(self.guard.score(self.model, texts))
        for (account, text), score in zip(missing, fresh, strict=True):
            if self._cache is not None and not text.history:
                self._cache.put(score, self._guard_digest, account, text.text)
        scores = iter(fresh)
        return [next(scores) if score is None else score for score in cached_scores]

    def _cached(self, account: str, text: Prompt) -> VariantScore | None:
        if self._cache is None or text.history:
            return None
        return self._cache.get(self._guard_digest, account, text.text)

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
    guard: LatentGuard, model: ChatModel, prompts: Sequence[Prompt]
) -> list[ScoredPrompt]:
    """Score prompts in as few passes as they fit in, without a cache (``PromptScorer.score``)."""
    return PromptScorer(guard, model).score(prompts, [""] * len(prompts))


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
    guard: LatentGuard, prompt: Prompt, scored: ScoredPrompt, opinion: Opinion
) -> ScoredPrompt:
    """A verdict in the review band, with what a second opinion says."""
    verdict = joint_verdict(scored.verdict, opinion)
    return replace(scored, verdict=verdict, threshold=threshold_of(guard, prompt, verdict))


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
