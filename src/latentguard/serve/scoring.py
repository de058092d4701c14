"""What the service says of a prompt: the guard's verdict, with its beliefs by layer and token."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from latentguard.errors import LatentGuardError, PromptError, TemplateError
from latentguard.guard.chunking import Windows, read_apart
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.obfuscations import Obfuscations, Told, read_through, worse
from latentguard.guard.thresholds import Calibration
from latentguard.guard.verdict import Evidence, Verdict
from latentguard.models.chat_model import ChatModel
from latentguard.models.conversation import capture_instruction
from latentguard.prompts import Prompt
from latentguard.serve.errors import ApiError, BadRequest, Unavailable
from latentguard.states import States

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
    known, read = guard.part(Obfuscations) is not None, partial(_judge_all, guard, model)
    return list(read_through(known, prompts, read, _worse))


def _judge_all(
    guard: LatentGuard, model: ChatModel, prompts: Iterator[Prompt]
) -> Iterator[ScoredPrompt]:
    """Judge prompts as they stand; the beliefs by layer of a long one are those of the whole."""

    def short(rows: Iterator[Prompt]) -> Iterator[ScoredPrompt]:
        ready = map(guard.reading.prepare, rows)
        how = dict(positions=guard.positions, layers=guard.probe.layers)
        for states in model.capture(ready, **how):  # type: ignore[arg-type]
            yield from score_states(guard, states)

    def long(prompt: Prompt) -> ScoredPrompt:
        return score_states(guard, *guard.examine(model, prompt))[0]

    return read_apart(guard.part(Windows), prompts, short, long)


def _worse(one: ScoredPrompt, other: ScoredPrompt, named: Told) -> ScoredPrompt:
    verdict = worse(one.verdict, other.verdict, named)
    return one if verdict is one.verdict else replace(other, verdict=verdict)


def score_each(
    guard: LatentGuard, model: ChatModel, prompts: Sequence[Prompt]
) -> list[ScoredPrompt | ApiError]:
    """Judge prompts together; one that cannot be judged does no harm to the others."""
    try:
        return list(score_prompts(guard, model, prompts))
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


def score_states(
    guard: LatentGuard, states: States, evidence: Sequence[Evidence] = ()
) -> list[ScoredPrompt]:
    """Judge states that were captured already."""
    verdicts = list(guard.judge(states, evidence))
    part = states.select(guard.probe.layers)
    layers = {axis.name: axis.layer_beliefs(part.at(axis.position)).tolist() for axis in guard.axes}
    return [
        ScoredPrompt(
            verdict,
            {name: rows[i] for name, rows in layers.items()},
            threshold_of(guard, prompt, verdict),
        )
        for i, (prompt, verdict) in enumerate(zip(states.prompts, verdicts, strict=True))
    ]


def threshold_of(guard: LatentGuard, prompt: Prompt, verdict: Verdict) -> float:
    """What a verdict's score was held against: its segment's threshold, if that has its own."""
    known = guard.part(Calibration)
    if known is None or verdict.evidence:  # windows have one threshold, told on the guard's scale
        return guard.threshold
    limits = known.limits(prompt.segment)
    return guard.threshold if limits is known.common else limits.block.threshold


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
