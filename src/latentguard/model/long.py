"""Reading long prompts and chats: each turn of the user and each token, chunk by chunk.

The states of an earlier turn are those of the chat that ended there: later tokens cannot change
them. So one pass reads every turn, as long as the shorter chat is how the longer one begins; where
a template writes it otherwise, that turn gets a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentguard.model.hooks import read_positions, score_tokens
from latentguard.model.layout import Layout, alike, spans_of
from latentguard.prompts import Prompt
from latentguard.readouts import Readout
from latentguard.states import States
from latentguard.traces import Trace, Turn

if TYPE_CHECKING:
    from latentguard.model.hf import ChatModel


@dataclass(eq=False)
class Kept:
    """What a pass leaves for the next one, if that begins alike."""

    ids: tuple[int, ...] = ()
    """The tokens that were read."""

    cache: Any = None
    """Their keys and values."""

    scores: Float[Tensor, "s"] | None = None
    """Their scores."""


def trace(
    model: ChatModel,
    prompt: Prompt,
    *,
    positions: Sequence[str],
    layers: Sequence[int],
    probe: Readout,
    kept: Kept | None = None,
) -> Trace:
    """See ``Tracer.trace``. Memory grows with the cache alone: a chunk at a time is computed.

    With ``kept``, texts that begin as the last one did are read on from where they part; it
    belongs to one model, one probe and one choice of layers.
    """
    kept = kept or Kept()
    numbers = turns_of(prompt)
    prompts = [_until(prompt, number) for number in numbers]
    layouts = model.chat(prompts)
    model.check_length(len(layouts[-1].ids), prompt)
    values = torch.empty(
        len(prompts), len(positions), len(layers), model.width, dtype=model.model.dtype
    )
    turns = list[Turn]()
    for head in _heads(layouts):
        rows = list(range(len(turns), head + 1))
        spans = [span for row in rows for span in spans_of(layouts[row], positions)]
        read, scores = _Pass(model, layers, probe, kept)(layouts[head].ids, spans)
        values[rows] = read.reshape(len(rows), *values.shape[1:])
        turns += [_turn(numbers[row], layouts[row], scores) for row in rows]
    states = States(values, tuple(prompts), tuple(positions), tuple(layers), model.fingerprint)
    return Trace(states, tuple(turns))


def turns_of(prompt: Prompt) -> list[int]:
    """Which messages are the user's and say something, the prompt's own text last."""
    history = enumerate(prompt.history)
    said = [number for number, turn in history if turn.role == "user" and turn.content.strip()]
    return [*said, len(prompt.history)]


def _until(prompt: Prompt, number: int) -> Prompt:
    """The chat that ends in one of its messages."""
    if number == len(prompt.history):
        return prompt
    return replace(prompt, text=prompt.history[number].content, history=prompt.history[:number])


def _heads(layouts: Sequence[Layout]) -> list[int]:
    """Which layouts need a pass; each earlier one is how the next of these begins."""
    heads = [len(layouts) - 1]
    for row in range(len(layouts) - 2, -1, -1):
        ids = layouts[row].ids
        if layouts[heads[0]].ids[: len(ids)] != ids:
            heads.insert(0, row)
    return heads


def _turn(number: int, layout: Layout, scores: Float[Tensor, "s"]) -> Turn:
    own = layout.instruction
    return Turn(number, layout.spans, scores[own.start : own.stop])


class _Pass:
    """Reads tokens in chunks; what they begin with may have been read before."""

    def __init__(self, model: ChatModel, layers: Sequence[int], probe: Readout, kept: Kept) -> None:
        self.model, self.layers, self.probe, self.kept = model, layers, probe, kept

    @torch.inference_mode()
    def __call__(
        self, ids: tuple[int, ...], spans: Sequence[tuple[int, int]]
    ) -> tuple[Float[Tensor, "p l d"], Float[Tensor, "s"]]:
        """Mean states of some spans of tokens and the score of each token, on the CPU."""
        start, scores = self._resume(ids, min(first for first, _ in spans))
        values = torch.zeros(len(spans), len(self.layers), self.model.width)
        while start < len(ids):
            stop = min(len(ids), start + self.model.tokens_per_batch)
            inside = [n for n, (first, last) in enumerate(spans) if first < stop and last >= start]
            cut = [(max(spans[n][0], start), min(spans[n][1], stop - 1)) for n in inside]
            share = torch.tensor(
                [_size(c) / _size(spans[n]) for c, n in zip(cut, inside, strict=True)]
            )
            where = torch.tensor(cut, dtype=torch.long).reshape(1, -1, 2) - start
            read = self._chunk(ids[start:stop], where, scores[None, start:stop])
            values[inside] += share[:, None, None] * read.float()
            start = stop
        self.kept.ids, self.kept.scores = ids, scores
        return values.to(self.model.model.dtype), scores

    def _resume(self, ids: tuple[int, ...], first: int) -> tuple[int, Float[Tensor, "s"]]:
        """How many tokens need not be read again, and scores to fill in."""
        from transformers import DynamicCache

        kept, scores = self.kept, torch.full((len(ids),), self.probe.bias)
        same = min(alike(kept.ids, ids), first)
        if same and kept.scores is not None:
            kept.cache.crop(same)
            scores[:same] = kept.scores[:same]
        else:
            same, kept.cache = 0, DynamicCache(config=self.model.model.config)
        kept.ids = ids[:same]  # the pass may fail
        return same, scores

    def _chunk(
        self, ids: Sequence[int], spans: Int[Tensor, "1 p 2"], scores: Float[Tensor, "1 s"]
    ) -> Float[Tensor, "p l d"]:
        model, probe = self.model, self.probe
        first, last = spans.to(model.device).unbind(-1)
        reach = [*self.layers, max(probe.layers)]  # the pass is left after the last of them
        shape = (*last.shape, len(reach), model.width)
        buffer = torch.empty(shape, dtype=model.model.dtype, device=model.device)
        blocks, chunk = model.blocks, torch.tensor([list(ids)], device=model.device)
        with (
            score_tokens(blocks, layers=probe.layers, weight=probe.weight, scores=scores),
            read_positions(blocks, columns=last, starts=first, layers=reach, buffer=buffer),
        ):
            model.model(chunk, past_key_values=self.kept.cache, use_cache=True)
        return buffer[0, :, : len(self.layers)].cpu()


def _size(span: tuple[int, int]) -> int:
    return span[1] - span[0] + 1
