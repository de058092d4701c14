"""What a verdict is made of: the text that decided, and what each of its tokens and layers adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import Variant
from latentguard.guard.verdict import Verdict
from latentguard.models.chat_model import ChatModel
from latentguard.models.conversation import capture_tokens
from latentguard.models.layout import Layout, position_spans
from latentguard.models.segments import Segments
from latentguard.probes.contributions import Contributions, explain_score, slot_terms
from latentguard.probes.fitting import slots
from latentguard.prompts import Prompt
from latentguard.states import States, attended_slots, no_progress


@dataclass(frozen=True)
class ExplainedToken:
    """One token of the text that decided, or of the template after it."""

    text: str
    """The characters that it stands for."""

    contribution: float
    """What it adds to the score."""

    belief: float | None
    """The paper's Delta_harmful after it; None after the instruction, where it is not read."""


@dataclass(frozen=True)
class Explanation:
    """The probe's score of the text that decided, as a sum."""

    score: float
    """``baseline`` and the contributions of all tokens, or of all layers. It is the verdict's
    score, except where a pack decided, or a long prompt, which has a scale of its own."""

    baseline: float
    """The mean score of the guard's canary prompts."""

    tokens: list[ExplainedToken]
    """Of the instruction, then of the template after it."""

    layers: list[float]
    """What each of the probe's layers adds."""

    is_chunk: bool
    """Whether it is one chunk of a long prompt."""


class Explainer:
    """Explains verdicts; belongs to the scoring thread."""

    def __init__(self) -> None:
        """Keep what the canaries of each guard show."""
        self._references = WeakKeyDictionary[LatentGuard, Float[Tensor, "s"]]()

    def explain(
        self,
        guard: LatentGuard,
        model: ChatModel,
        prompt: Prompt,
        verdict: Verdict,
        *,
        segments: Segments | None = None,
    ) -> Explanation:
        """Read the text that decided once more, each of its tokens.

        Args:
            guard: The guard.
            model: Its model.
            prompt: What was asked; of a chat, the reading that decided.
            verdict: What the guard says of it.
            segments: How a long text is read while others wait; None reads it in one pass.
        """
        variant = deciding_variant(guard.plan(prompt), verdict)
        layers = guard.probe.layers
        layout, states = capture_tokens(model, variant.prompt, layers, segments)
        shares = token_shares(guard, layout, states)
        parts = explain_score(guard.probe, states, shares, self._reference(guard, model))
        return Explanation(
            score=parts.score,
            baseline=parts.baseline,
            tokens=_tokens(guard, model, variant.prompt, layout, states, parts),
            layers=parts.by_layer.tolist(),
            is_chunk=variant.chunk is not None,
        )

    def _reference(self, guard: LatentGuard, model: ChatModel) -> Float[Tensor, "s"]:
        """What each slot adds on the guard's canaries, on average."""
        if guard not in self._references:
            texts = [guard.plan(Prompt(canary.text))[0].prompt for canary in guard.canaries]
            batches = model.capture(
                texts,
                positions=guard.reading.positions,
                layers=guard.probe.layers,
                queries=guard.reading.queries,
                progress=no_progress,
            )
            values = slots(States.collect(batches), guard.reading.positions)
            self._references[guard] = slot_terms(guard.probe, values).mean(0)
        return self._references[guard]


def token_shares(
    guard: LatentGuard, layout: Layout, states: Float[Tensor, "t l d"]
) -> Float[Tensor, "p t"]:
    """What each token weighs in each of the guard's positions; a position's shares sum to 1.

    Args:
        guard: The guard.
        layout: Of the text.
        states: Of each token from the instruction on, at the probe's layers.
    """
    first, positions = layout.instruction.start, guard.reading.positions
    shares = torch.zeros(len(positions), len(states), dtype=torch.float64)
    for share, (start, last) in zip(shares, position_spans(layout, positions), strict=True):
        share[start - first : last + 1 - first] = 1 / (last + 1 - start)
    layers = guard.probe.layers
    attended = attended_slots(positions, layers, guard.reading.queries)
    if attended is not None:
        instruction = states[: len(layout.instruction), layers.index(min(layers))]
        logits = attended.vectors @ instruction.float().T
        shares[list(attended.slots), : len(instruction)] = logits.softmax(-1).double()
    return shares


def deciding_variant(variants: Sequence[Variant], verdict: Verdict) -> Variant:
    """The text that a verdict's score was read from: a version of the prompt, or a chunk of it."""
    same = [one for one in variants if one.obfuscations == verdict.obfuscations]
    if not verdict.evidence:
        return same[0]
    best = max(verdict.evidence, key=lambda one: one.score)
    place = (best.message, best.start, best.end)
    chunks = (v for v in same if v.chunk is not None and _place(v) == place)
    return next(chunks, same[0])


def _place(variant: Variant) -> tuple[int, int, int] | None:
    chunk = variant.chunk
    return None if chunk is None else (chunk.message, chunk.start, chunk.end)


def _tokens(
    guard: LatentGuard,
    model: ChatModel,
    prompt: Prompt,
    layout: Layout,
    states: Float[Tensor, "t l d"],
    parts: Contributions,
) -> list[ExplainedToken]:
    """Each token with its text; those of the instruction together are the text."""
    count = len(layout.instruction)
    starts = [start for start, _ in layout.spans]
    ends = [*starts[1:], len(prompt.text)]
    texts = [prompt.text[start:end] for start, end in zip(starts, ends, strict=True)]
    texts += [str(model.tokenizer.decode([token])) for token in layout.ids[layout.t_inst + 1 :]]
    axis = next(axis for axis in guard.axes if axis.name == "harmful")
    beliefs: list[float | None] = [*axis.belief(states[:count]).tolist()]
    beliefs += [None] * (len(texts) - count)
    return [
        ExplainedToken(text, contribution, belief)
        for text, contribution, belief in zip(texts, parts.by_token.tolist(), beliefs, strict=True)
    ]
