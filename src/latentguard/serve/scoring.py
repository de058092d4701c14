"""What the service says of a prompt: the guard's verdict, with its beliefs by layer and token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentguard.errors import LatentGuardError, PromptError, TemplateError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import Outcome
from latentguard.guard.verdict import Verdict
from latentguard.models.chat_model import ChatModel
from latentguard.models.conversation import capture_instruction
from latentguard.prompts import Prompt
from latentguard.serve.errors import ApiError, BadRequest, Unavailable

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

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it, with its threshold and the number of readings."""
        return self.verdict.to_dict() | dict(threshold=self.threshold, readings=self.readings)


@dataclass(frozen=True)
class TokenBelief:
    """One token of an instruction."""

    text: str
    """The characters that it stands for."""

    belief: float
    """Delta_harmful after it."""


def score_prompts(
    guard: LatentGuard, model: ChatModel, prompts: Sequence[Prompt]
) -> list[ScoredPrompt]:
    """Judge prompts in as few passes as they fit in; each verdict is that of ``guard.scan``.

    Raises:
        PromptError: if a prompt is empty or too long.
        GuardError: if a state is not finite.
    """
    outcomes = guard.read(model, prompts)
    return [scored_prompt(guard, p, one) for p, one in zip(prompts, outcomes, strict=True)]


def scored_prompt(guard: LatentGuard, prompt: Prompt, outcome: Outcome) -> ScoredPrompt:
    """What the service says of a prompt that was read."""
    verdict = outcome.verdict
    layers = {name: own.tolist() for name, own in outcome.whole.layer_beliefs.items()}
    return ScoredPrompt(verdict, layers, threshold_of(guard, prompt, verdict))


def threshold_of(guard: LatentGuard, prompt: Prompt, verdict: Verdict) -> float:
    """What a verdict's score was compared with: its segment's threshold, if that has its own."""
    return guard.threshold_for(prompt.segment, has_evidence=bool(verdict.evidence))


def score_each(
    guard: LatentGuard, model: ChatModel, prompts: Sequence[Prompt]
) -> list[ScoredPrompt | ApiError]:
    """Judge prompts together; one that cannot be judged does no harm to the others."""
    try:
        return [*score_prompts(guard, model, prompts)]
    except LatentGuardError as error:
        if len(prompts) == 1:
            return [to_api_error(error)]
    faults = [_unreadable(guard, model, prompt) for prompt in prompts]
    sound = [p for p, fault in zip(prompts, faults, strict=True) if fault is None]
    if len(sound) == len(prompts):
        return [score_each(guard, model, [prompt])[0] for prompt in prompts]
    found = iter(score_each(guard, model, sound) if sound else ())
    return [fault or next(found) for fault in faults]


def to_api_error(error: LatentGuardError) -> ApiError:
    """What a client is told: of its own text all, of the service nothing."""
    if isinstance(error, (PromptError, TemplateError)):
        return BadRequest(str(error))
    log.error("No verdict: %s", error)
    return Unavailable("The guard cannot give a verdict on this prompt.")


def _unreadable(guard: LatentGuard, model: ChatModel, prompt: Prompt) -> ApiError | None:
    """Why a prompt cannot be read, without a pass of the model."""
    try:
        layout = model.chat([guard.reading.prepare(prompt)])[0]
        model.check_length(len(layout.ids), prompt)
    except LatentGuardError as error:
        return to_api_error(error)
    return None


def token_beliefs(guard: LatentGuard, model: ChatModel, prompt: Prompt) -> list[TokenBelief]:
    """The harmful belief after each token of the instruction, in a pass of its own."""
    axis = next(axis for axis in guard.axes if axis.name == "harmful")
    layout, states = capture_instruction(model, prompt, axis.layers)
    beliefs = axis.belief(states).tolist()
    starts = [start for start, _ in layout.spans]
    ends = [*starts[1:], len(prompt.text)]  # so that the tokens together are the text
    return [
        TokenBelief(prompt.text[start:end], belief)
        for start, end, belief in zip(starts, ends, beliefs, strict=True)
    ]
