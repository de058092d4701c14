"""Cascade: a guard that asks a second opinion of the prompts in its review band.

- Above the threshold the guard blocks, below the review threshold it allows.
- Between them the second opinion decides.
- If it gives none, the decision stays ``review``, and the policy says what happens to the prompt.

The promise is that of both together (``stats.bounds.joint_thresholds``). It is kept in the guard
with the name of the second opinion; with another one nothing is promised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from latentguard.errors import GuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.loading import load_guard
from latentguard.guard.second_opinion import SecondOpinion, open_second_opinion
from latentguard.guard.thresholds import Rates, SecondOpinionRecord
from latentguard.guard.verdict import Decision, Opinion, Verdict
from latentguard.prompts import Prompt, PromptLike, as_prompts, is_one_prompt
from latentguard.states import Backend, Progress, no_progress, progress_bar
from latentguard.stats.bounds import joint_thresholds, require_enough_for_two

REVIEW_FPR = 0.2
"""Share of harmless prompts of which the second opinion is asked, unless another is chosen."""

AT_ONCE = 32
"""Prompts that are read before the second opinion is asked of those in the band."""


@dataclass(frozen=True, eq=False)
class Cascade:
    """A guard with a second opinion.

    Examples:
        >>> cascade = lg.Cascade.load("guards/small", "guards/large")  # doctest: +SKIP
        >>> cascade("How do I kill a Python process?")  # doctest: +SKIP
        Verdict(allow, probability=0.61, score=1.2, second_opinion='allow', id='1')
    """

    guard: LatentGuard
    """Is asked first."""

    second: SecondOpinion
    """Decides in the review band of the guard."""

    @staticmethod
    def load(guard: str, second_opinion: str) -> Cascade:
        """Load a guard and a second opinion, each with its model.

        Args:
            guard: A folder, a Hub id, or ``default``.
            second_opinion: As ``open_second_opinion`` takes it.

        Raises:
            LatentGuardError: if one of them is not there, or the guard has no review band.
        """
        second = open_second_opinion(second_opinion)
        cascade = Cascade.of(load_guard(guard), second)
        second.load()
        return cascade

    @staticmethod
    def of(guard: LatentGuard, second: SecondOpinion) -> Cascade:
        """A guard with a second opinion; without its promise, if it was calibrated with another.

        Raises:
            GuardError: if the guard has no review band.
        """
        if guard.thresholds is None or guard.thresholds.common.review is None:
            raise GuardError(
                "This guard has no review band, so a second opinion would never be asked. "
                "Calibrate it: latentguard calibrate GUARD --harmless FILE --second-opinion WHAT"
            )
        return Cascade(guard if is_promised(guard, second) else replace(guard, bound=None), second)

    @property
    def has_band(self) -> bool:
        """Whether scores can lie between the common thresholds."""
        common = self.guard.thresholds.common if self.guard.thresholds else None
        return bool(common and common.review and common.review.threshold < common.block.threshold)

    @property
    def digest(self) -> str:
        """Differs with the guard and with the second opinion."""
        return f"{self.guard.digest} {self.second.name}"

    def __call__(self, prompts: PromptLike | Iterable[PromptLike]) -> Verdict | list[Verdict]:
        """The verdict on one prompt, with the guard's own model; a list of them gives a list."""
        if is_one_prompt(prompts):
            return next(self.scan(self.guard.model, [prompts], progress=no_progress))
        return list(self.scan(self.guard.model, prompts))  # type: ignore[arg-type]  # several

    def scan(
        self,
        backend: Backend,
        prompts: Iterable[PromptLike],
        *,
        progress: Progress | None = None,
    ) -> Iterator[Verdict]:
        """Yield a verdict for each prompt, in order, in lazy batches; as ``LatentGuard.scan``."""
        with progress_bar("scan", prompts, progress) as advance:
            plans = self.guard.score_prompts(backend, as_prompts(prompts))
            while batch := list(islice(plans, AT_ONCE)):
                verdicts = [self.guard.combine(one).verdict for one in batch]
                for verdict in self.decide([one.prompt for one in batch], verdicts):
                    advance(1)
                    yield verdict

    def decide(self, prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The joint verdicts, from those of the guard alone."""
        band = [n for n, verdict in enumerate(verdicts) if verdict.decision == "review"]
        scores = self.second.score([prompts[n] for n in band]) if band else []
        joint = list(verdicts)
        for n, score in zip(band, scores, strict=True):
            joint[n] = joint_verdict(verdicts[n], opinion_of(score, self.guard))
        return joint

    def calibrate(
        self,
        backend: Backend,
        prompts: Iterable[PromptLike],
        *,
        max_fpr: float = 0.01,
        review_fpr: float = REVIEW_FPR,
        confidence: float = 0.95,
    ) -> Cascade:
        """A new cascade whose thresholds keep the false-positive rate of both together.

        Args:
            backend: The model of the guard.
            prompts: Harmless, like the traffic to come.
            max_fpr: Rate at which harmless prompts may be flagged, by either of both.
            review_fpr: Rate at which the second opinion may be asked of them.
            confidence: Of each bound.

        Raises:
            GuardError: if there are too few prompts, or the second opinion fails on one.
        """
        rates = Rates(max_fpr, review_fpr, confidence)
        used = self.guard.calibration_prompts(as_prompts(prompts), rates)
        verdicts = list(self.guard.scan(backend, used, progress=no_progress))
        calibrated = self.guard.calibrate_from(used, verdicts, rates)
        return calibrate_cascade(calibrated, self.second, used, verdicts)


def is_promised(guard: LatentGuard, second: SecondOpinion) -> bool:
    """Whether a guard was calibrated with this second opinion."""
    record = guard.thresholds.second_opinion if guard.thresholds else None
    return record is not None and record.name == second.name


def opinion_of(score: float | None, guard: LatentGuard) -> Opinion:
    """What a second opinion's score says, by the cut that a guard was calibrated with."""
    if score is None:
        return "failed"
    record = guard.thresholds.second_opinion if guard.thresholds and guard.bound else None
    return "block" if score > (record.cut if record else 0.0) else "allow"


def joint_decision(decision: Decision, opinion: Opinion | None) -> Decision:
    """The decision of a guard, or that of a second opinion where the guard is not sure."""
    if decision != "review" or opinion is None or opinion == "failed":
        return decision
    return opinion


def joint_verdict(verdict: Verdict, opinion: Opinion) -> Verdict:
    """A verdict in the review band, with what a second opinion says."""
    decision = joint_decision(verdict.decision, opinion)
    return replace(verdict, decision=decision, flagged=decision == "block", second_opinion=opinion)


def calibrate_cascade(
    guard: LatentGuard,
    second: SecondOpinion,
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    *,
    progress: Progress = no_progress,
) -> Cascade:
    """Move the thresholds of a guard so that both together keep its rate.

    Args:
        guard: Calibrated on these prompts, with a review band and without segments.
        second: Is asked of the harmless prompts above the review threshold.
        prompts: Harmless unless labelled harmful.
        verdicts: Of the guard, on each.
        progress: Called with the number of prompts of which it was asked.

    Raises:
        GuardError: if there are too few prompts, or the second opinion fails on one.
    """
    assert guard.thresholds is not None
    assert guard.bound is not None
    thresholds = guard.thresholds
    review = thresholds.common.review
    assert review is not None
    harmless = [n for n, prompt in enumerate(prompts) if not prompt.harmful]
    require_enough_for_two(len(harmless), guard.bound.max_fpr, review.confidence)
    scores = np.array([verdicts[n].score for n in harmless])
    band = np.flatnonzero(scores > review.threshold)
    asked = [prompts[harmless[n]] for n in band]
    opinions = _score_in_batches(second, asked, progress)
    if failed := opinions.count(None):
        raise GuardError(
            f"The second opinion {second.name} failed on {failed} of {len(asked)} harmless "
            "prompts, so nothing can be promised. Mend it, or leave out prompts that it cannot "
            "read, and calibrate again."
        )
    second_scores = np.full(len(scores), -np.inf)
    second_scores[band] = opinions
    rate = guard.bound.max_fpr
    joint = joint_thresholds(scores, second_scores, review, rate, is_graded=second.is_graded)
    blocked = int((second_scores > 0).sum())
    record = SecondOpinionRecord(second.name, asked=len(band), blocked=blocked, cut=joint.cut)
    moved = replace(
        thresholds,
        common=replace(thresholds.common, block=joint.block, review=joint.review),
        point=thresholds.point and replace(thresholds.point, recall=None),
        segments={},
        small={},
        second_opinion=record,
    )
    threshold = joint.block.threshold
    return Cascade(replace(guard, threshold=threshold, bound=joint.block, thresholds=moved), second)


def _score_in_batches(
    second: SecondOpinion, prompts: Sequence[Prompt], progress: Progress
) -> list[float | None]:
    scores: list[float | None] = []
    for start in range(0, len(prompts), AT_ONCE):
        batch = prompts[start : start + AT_ONCE]
        scores += second.score(batch)
        progress(len(batch))
    return scores
