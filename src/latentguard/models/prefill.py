"""Reading prompts under many interventions at once: keys, values and first logits of each.

What the settings share is computed once, by the model's own modules:

* the *head*, the template's text before the message, is one row instead of one for each prompt;
* the blocks below the steered layer do not know of the setting: their keys, their values and the
  residual stream that they hand on are kept, and a setting starts at its layer.

Prompts are padded on the left. Axis names in shapes: b prompts, r rows (setting by setting),
t tokens of the padded prompt, d width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latentguard.errors import PromptError
from latentguard.models.hooks import add_vector, note_output, read_positions, skip_blocks
from latentguard.models.layout import Layout
from latentguard.prompts import Prompt
from latentguard.states import Intervention, Tokens

if TYPE_CHECKING:
    from latentguard.models.chat_model import ChatModel

Cached = list[tuple[Tensor, Tensor]]
"""Keys and values of each block, ``[rows heads tokens width]``."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts, padded on the left; the first is the longest."""

    prompts: list[Prompt]
    ids: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]
    """Which tokens are no padding."""

    head: int
    """How many tokens all begin with, before the message."""

    steered: dict[Tokens, Bool[Tensor, "b t"]]
    """Which tokens each choice of tokens means."""

    @staticmethod
    def of(
        rows: Sequence[tuple[Prompt, Layout]], choices: set[Tokens], device: torch.device
    ) -> Batch:
        """Pad prompts; the longest comes first."""
        longest = len(rows[0][1].ids)
        shape = (len(rows), longest)
        ids, real = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        steered = {choice: torch.zeros(shape, dtype=torch.bool) for choice in choices}
        for row, (prompt, layout) in enumerate(rows):
            pad = longest - len(layout.ids)
            ids[row, pad:], real[row, pad:] = torch.tensor(layout.ids), True
            for choice, where in steered.items():
                where[row, [pad + column for column in chosen(layout, prompt, choice)]] = True
        masks = {choice: where.to(device) for choice, where in steered.items()}
        head = _head([layout for _, layout in rows])
        return Batch([p for p, _ in rows], ids.to(device), real.to(device), head, masks)


@dataclass(frozen=True, eq=False)
class _Start:
    """Where a steered pass begins."""

    layer: int
    below: Cached
    """Keys and values of the blocks below."""

    hidden: Float[Tensor, "r t d"] | None
    """The unsteered residual stream at the layer; None at layer 0, where all is computed."""

    size: int
    """What ``note_output`` noted."""


@dataclass(frozen=True, eq=False)
class _Base:
    """The unsteered pass, as far as settings share it."""

    cached: Cached
    hidden: dict[int, Float[Tensor, "b t d"]]
    """The residual stream at each steered layer above 0."""

    size: int

    def start(self, layer: int, rows: Int[Tensor, "r"]) -> _Start:
        """Begin at a layer, with some rows of this pass."""
        if layer == 0:
            return _Start(0, [], None, 0)
        below = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.cached[:layer]]
        return _Start(layer, below, self.hidden[layer][rows], self.size)


class Reader:
    """Reads one batch of prompts under any number of interventions."""

    def __init__(self, model: ChatModel, batch: Batch, layers: Sequence[int]) -> None:
        """Run unsteered as far as settings at ``layers`` need it.

        Of the head, one row runs through all blocks; of the rest, all rows to the last layer.
        """
        self.model, self.batch = model, batch
        self._head = self._tail = _Base([], {}, 0)
        ids, real, size = batch.ids, batch.real, batch.head
        layers = sorted(set(layers) - {0})
        if size:
            self._head = self._read(ids[:1, :size], real[:1, :size], [], layers, stop=False)
        if layers:
            past = _placed(self._head.cached, real, size)
            self._tail = self._read(ids[:, size:], real, past, layers, stop=True)

    def _read(
        self, ids: Tensor, real: Tensor, past: Cached, layers: list[int], *, stop: bool
    ) -> _Base:
        """Run unsteered and keep the residual stream at some layers."""
        model, sizes, cache = self.model, list[int](), cache_of(past)
        shape = (*ids.shape, len(layers), model.width)
        buffer = torch.empty(shape, dtype=model.model.dtype, device=model.device)
        columns = torch.arange(ids.shape[1], device=model.device).expand(ids.shape)
        with ExitStack() as stack:
            stack.enter_context(note_output(model.blocks[0], sizes))
            if layers:
                reading = read_positions(
                    model.blocks, columns=columns, layers=layers, buffer=buffer, stop=stop
                )
                stack.enter_context(reading)
            forward(self.model, ids, real, cache)
        hidden = {layer: buffer[:, :, slot] for slot, layer in enumerate(layers)}
        return _Base(_cached(cache), hidden, sizes[0])

    @torch.inference_mode()
    def steer(self, group: Sequence[Intervention]) -> tuple[Cached, Float[Tensor, "r v"]]:
        """Read the prompts under settings that share a layer: what is cached, the first logits."""
        batch, layer, size = self.batch, group[0].layer, self.batch.head
        vectors = torch.stack([one.coefficient * one.vector.float().cpu() for one in group])
        vectors = vectors.to(self.model.device)
        setting = torch.arange(len(group), device=vectors.device)
        past, source = self._head.cached, torch.zeros_like(setting)
        if size and group[0].tokens == "all":
            ids, real = batch.ids[:1, :size][source], batch.real[:1, :size][source]
            past, _ = self._pass(ids, real, [], self._head.start(layer, source), (vectors, real))
            source = setting
        count = len(batch.ids)
        row = torch.arange(count, device=vectors.device).repeat(len(group))
        past = _placed(past, batch.real[row], size, source.repeat_interleave(count))
        where = torch.cat([batch.steered[one.tokens] for one in group])[:, size:]
        what = (vectors.repeat_interleave(count, 0), where)
        start = self._tail.start(layer, row)
        return self._pass(batch.ids[row, size:], batch.real[row], past, start, what)

    def _pass(
        self, ids: Tensor, real: Tensor, past: Cached, start: _Start, what: tuple[Tensor, Tensor]
    ) -> tuple[Cached, Tensor]:
        """Read tokens from a layer on while a vector of each row is added at some of them."""
        blocks, layer, cache = self.model.blocks, start.layer, cache_of(past)
        with ExitStack() as stack:
            if start.hidden is not None:
                skip = skip_blocks(blocks, layer=layer, hidden=start.hidden, size=start.size)
                stack.enter_context(skip)
            vectors, tokens = what
            stack.enter_context(add_vector(blocks, layer=layer, vectors=vectors, tokens=tokens))
            logits = forward(self.model, ids, real, cache)
        return start.below + _cached(cache, layer), logits


def forward(
    model: ChatModel, ids: Int[Tensor, "r u"], real: Bool[Tensor, "r t"], cache: Any
) -> Float[Tensor, "r v"]:
    """Logits after the last of some tokens; ``real`` covers the cached ones before them too."""
    places = (real.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model.model(
        ids,
        attention_mask=real.long(),
        position_ids=places,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1].to(model.device)
    return logits


def shares(setting: Intervention) -> tuple[int, bool]:
    """What settings of one pass have in common: the layer, and whether the head is steered."""
    return setting.layer, setting.tokens == "all"


def chosen(layout: Layout, prompt: Prompt, tokens: Tokens) -> Sequence[int]:
    """Indices of the tokens that an intervention steers.

    Raises:
        PromptError: if there is no token before the question, or no question.
    """
    if tokens == "all":
        return range(len(layout.ids))
    if tokens == "t_inst":
        return [layout.t_inst]
    if tokens == "instruction":
        return layout.instruction
    found = layout.before(prompt.question_at or 0)
    if not found:
        raise PromptError(f"Prompt '{prompt.id}' has no question_at with tokens before it.")
    return found


def _head(layouts: Sequence[Layout]) -> int:
    """How many tokens all prompts begin with, at most up to the message."""
    most = min(layout.instruction.start for layout in layouts)
    columns = zip(*(layout.ids[:most] for layout in layouts), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def cache_of(cached: Cached) -> Any:
    """A cache that holds them; it keeps every token, and masks alone make sliding windows."""
    from transformers import DynamicCache

    return DynamicCache(cached) if cached else DynamicCache()


def remembers_tokens(cache: Any) -> bool:
    """Whether all that the blocks remember is keys and values of each token.

    What else blocks keep (recurrent states, convolutions, indices) cannot be cut, copied and put
    together token by token.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(type(block) in (DynamicLayer, DynamicSlidingWindowLayer) for block in cache.layers)


def _cached(cache: Any, layer: int = 0) -> Cached:
    """What the blocks from ``layer`` on have cached."""
    return [(block.keys, block.values) for block in cache.layers[layer:]]


def _placed(
    cached: Cached, real: Bool[Tensor, "r t"], size: int, source: Int[Tensor, "r"] | None = None
) -> Cached:
    """Put the head's keys and values behind the padding of each row, cut at ``size`` columns."""
    pads = (~real).sum(1, keepdim=True)
    columns = (torch.arange(size, device=real.device) - pads).clamp(min=0)
    rows = torch.zeros_like(pads) if source is None else source[:, None]

    def place(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[rows.to(x.device), columns.to(x.device)].transpose(1, 2)

    return [(place(keys), place(values)) for keys, values in cached]


def joined(parts: list[tuple[Cached, Tensor]]) -> tuple[Cached, Tensor]:
    """Put the rows of several passes together."""
    if len(parts) == 1:
        return parts[0]
    blocks = zip(*(one for one, _ in parts), strict=True)
    cached = [(torch.cat([k for k, _ in b]), torch.cat([v for _, v in b])) for b in blocks]
    return cached, torch.cat([logits for _, logits in parts])
