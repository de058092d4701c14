"""Reading prompts under many interventions at once: keys, values and first logits of each.

What the settings share is computed once, by the model's own modules:

* the *head*, the template's text before the message, is one row instead of one for each prompt;
* the blocks below the steered layer do not know of the setting: their keys, their values and the
  residual stream that they hand on are kept, and a setting starts at its layer.

Prompts are padded on the left. Axis names in shapes: b prompts, r rows (setting by setting),
t tokens of the padded prompt, d width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latentguard.errors import PromptError
from latentguard.interventions import Intervention, Tokens
from latentguard.models.chat import ChatTokenizer
from latentguard.models.hooks import (
    add_vector,
    contiguous_head,
    read_positions,
    record_output_size,
    skip_blocks,
)
from latentguard.models.layout import Layout
from latentguard.models.loading import cache_argument
from latentguard.prompts import Prompt

KeysValues = list[tuple[Tensor, Tensor]]
"""Keys and values of each block, ``[rows heads tokens width]``."""


@runtime_checkable
class ReplyingModel(Protocol):
    """What steered reading and decoding need of a chat model (``ChatModel`` implements it)."""

    model: Any
    """The causal LM of transformers."""

    tokenizer: Any
    """Its tokenizer."""

    chat: ChatTokenizer
    """Lays out prompts."""

    blocks: Sequence[nn.Module]
    """Its decoder blocks."""

    tokens_per_batch: int
    """Padded tokens in one forward pass."""

    @property
    def device(self) -> torch.device:
        """Where the token embeddings are read."""

    @property
    def depth(self) -> int:
        """Number of blocks L."""

    @property
    def width(self) -> int:
        """Width d of the residual stream."""

    def check_length(self, length: int, prompt: Prompt) -> None:
        """Raise a PromptError if the model cannot read so many tokens."""

    def shrink(self, error: Exception, tokens: int, rows: int) -> None:
        """Halve the token budget if memory ran out, else raise the error."""


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Some prompts, padded on the left; the first is the longest."""

    prompts: list[Prompt]
    """The b prompts."""

    ids: Int[Tensor, "b t"]
    """Their tokens; padding is 0."""

    real: Bool[Tensor, "b t"]
    """Which tokens are no padding."""

    head: int
    """How many tokens all begin with, before the message."""

    steered: dict[Tokens, Bool[Tensor, "b t"]]
    """Which tokens each choice of tokens means."""

    @staticmethod
    def pad(
        rows: Sequence[tuple[Prompt, Layout]], choices: set[Tokens], device: torch.device
    ) -> PromptBatch:
        """Pad prompts; the longest comes first."""
        longest = len(rows[0][1].ids)
        shape = (len(rows), longest)
        ids = torch.zeros(shape, dtype=torch.long)
        real = torch.zeros(shape, dtype=torch.bool)
        steered = {choice: torch.zeros(shape, dtype=torch.bool) for choice in choices}
        for row, (prompt, layout) in enumerate(rows):
            padding = longest - len(layout.ids)
            ids[row, padding:] = torch.tensor(layout.ids)
            real[row, padding:] = True
            for choice, mask in steered.items():
                columns = steered_tokens(layout, prompt, choice)
                mask[row, [padding + column for column in columns]] = True
        masks = {choice: mask.to(device) for choice, mask in steered.items()}
        head = _shared_head([layout for _, layout in rows])
        prompts = [prompt for prompt, _ in rows]
        return PromptBatch(prompts, ids.to(device), real.to(device), head, masks)


@dataclass(frozen=True, eq=False)
class _Start:
    """Where a steered pass begins."""

    layer: int
    """The steered layer."""

    below: KeysValues
    """Keys and values of the blocks below."""

    hidden: Float[Tensor, "r t d"] | None
    """The unsteered residual stream at the layer; None at layer 0, where all is computed."""

    size: int
    """How many values a block returns (``hooks.record_output_size``)."""


@dataclass(frozen=True, eq=False)
class UnsteeredPass:
    """The unsteered pass, as far as settings share it."""

    cached: KeysValues
    """Keys and values of all blocks that ran."""

    hidden: dict[int, Float[Tensor, "b t d"]]
    """The residual stream at each steered layer above 0."""

    size: int
    """How many values a block returns (``hooks.record_output_size``)."""

    def start(self, layer: int, rows: Int[Tensor, "r"]) -> _Start:
        """Begin at a layer, with some rows of this pass."""
        if layer == 0:
            return _Start(0, [], None, 0)
        below = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.cached[:layer]]
        return _Start(layer, below, self.hidden[layer][rows], self.size)


class SteeredReader:
    """Reads one batch of prompts under any number of interventions."""

    def __init__(self, model: ReplyingModel, batch: PromptBatch, layers: Sequence[int]) -> None:
        """Run unsteered as far as settings at ``layers`` need it.

        Of the head, one row runs through all blocks; of the other tokens, all rows run to the
        last of the layers.
        """
        self.model = model
        self.batch = batch
        self._head = self._tail = UnsteeredPass([], {}, 0)
        layers = sorted(set(layers) - {0})
        head = batch.head
        if head:
            first_row = (batch.ids[:1, :head], batch.real[:1, :head])
            self._head = read_unsteered(model, *first_row, [], layers=layers, stop=False)
        if layers:
            past = place_behind_padding(self._head.cached, batch.real, head)
            tail = batch.ids[:, head:]
            self._tail = read_unsteered(model, tail, batch.real, past, layers=layers, stop=True)

    @torch.inference_mode()
    def read(self, group: Sequence[Any]) -> tuple[KeysValues, Float[Tensor, "r v"]]:
        """Read the prompts under settings of one ``pass_key``: their cache and first logits."""
        batch, layer, head = self.batch, group[0].layer, self.batch.head
        count = len(batch.ids)
        vectors = pushes(group, batch.prompts).to(self.model.device)
        row = torch.arange(count, device=vectors.device).repeat(len(group))
        past, source = self._head.cached, torch.zeros_like(row)
        if head and group[0].tokens == "all":
            own = isinstance(group[0].vector, Mapping)
            step = 1 if own else count  # else one head is enough for all prompts of a setting
            first = torch.zeros_like(row[::step])
            ids, real = batch.ids[:1, :head][first], batch.real[:1, :head][first]
            start = self._head.start(layer, first)
            past, _ = self._steered_pass(ids, real, [], start, (vectors[::step], real))
            source = torch.arange(len(row), device=row.device) // step
        past = place_behind_padding(past, batch.real[row], head, source)
        tokens = torch.cat([batch.steered[one.tokens] for one in group])[:, head:]
        push = (vectors, tokens)
        start = self._tail.start(layer, row)
        return self._steered_pass(batch.ids[row, head:], batch.real[row], past, start, push)

    def _steered_pass(
        self,
        ids: Tensor,
        real: Tensor,
        past: KeysValues,
        start: _Start,
        push: tuple[Tensor, Tensor],
    ) -> tuple[KeysValues, Tensor]:
        """Read tokens from a layer on while a vector of each row is added at some of them."""
        blocks, layer = self.model.blocks, start.layer
        vectors, tokens = push
        cache = build_cache(past)
        with ExitStack() as stack:
            if start.hidden is not None:
                skip = skip_blocks(blocks, layer=layer, hidden=start.hidden, size=start.size)
                stack.enter_context(skip)
            stack.enter_context(add_vector(blocks, layer=layer, vectors=vectors, tokens=tokens))
            logits = forward(self.model, ids, real, cache)
        return start.below + keys_values(cache, layer), logits


@torch.inference_mode()
def read_unsteered(
    model: ReplyingModel,
    ids: Int[Tensor, "r u"],
    real: Bool[Tensor, "r t"],
    past: KeysValues,
    *,
    layers: list[int],
    stop: bool,
) -> UnsteeredPass:
    """Run unsteered and keep the residual stream at some layers."""
    sizes = list[int]()
    cache = build_cache(past)
    shape = (*ids.shape, len(layers), model.width)
    buffer = torch.empty(shape, dtype=model.model.dtype, device=model.device)
    columns = torch.arange(ids.shape[1], device=model.device).expand(ids.shape)
    with ExitStack() as stack:
        stack.enter_context(record_output_size(model.blocks[0], sizes))
        if layers:
            reading = read_positions(
                model.blocks, columns=columns, layers=layers, buffer=buffer, stop=stop
            )
            stack.enter_context(reading)
        forward(model, ids, real, cache)
    hidden = {layer: buffer[:, :, slot] for slot, layer in enumerate(layers)}
    return UnsteeredPass(keys_values(cache), hidden, sizes[0])


def forward(
    model: ReplyingModel, ids: Int[Tensor, "r u"], real: Bool[Tensor, "r t"], cache: Any
) -> Float[Tensor, "r v"]:
    """Logits after the last of some tokens; ``real`` covers the cached ones before them too."""
    places = (real.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with contiguous_head(model.model):
        output = model.model(
            ids,
            attention_mask=real.long(),
            position_ids=places,
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model.model): cache},
        )
    logits: Tensor = output.logits[:, -1].to(model.device)
    return logits


def pushes(group: Sequence[Intervention], prompts: Sequence[Prompt]) -> Float[Tensor, "r d"]:
    """What is added to each row, setting by setting: c v."""
    rows = [one.coefficient * one.vector_of(p).float().cpu() for one in group for p in prompts]
    return torch.stack(rows)


def steered_tokens(layout: Layout, prompt: Prompt, tokens: Tokens) -> Sequence[int]:
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
    indices = layout.before(prompt.question_at or 0)
    if not indices:
        raise PromptError(f"Prompt '{prompt.id}' has no question_at with tokens before it.")
    return indices


def _shared_head(layouts: Sequence[Layout]) -> int:
    """How many tokens all prompts begin with, at most up to the message."""
    limit = min(layout.instruction.start for layout in layouts)
    columns = zip(*(layout.ids[:limit] for layout in layouts), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def build_cache(cached: KeysValues) -> Any:
    """A cache of these keys and values; it keeps every token, masks alone make sliding windows."""
    from transformers import DynamicCache

    return DynamicCache(cached) if cached else DynamicCache()


def has_only_keys_and_values(cache: Any) -> bool:
    """Whether the blocks keep nothing but keys and values of each token.

    What else blocks keep (recurrent states, convolutions, indices) cannot be cut, copied and put
    together token by token.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(type(block) in (DynamicLayer, DynamicSlidingWindowLayer) for block in cache.layers)


def keys_values(cache: Any, layer: int = 0) -> KeysValues:
    """What the blocks from ``layer`` on have cached."""
    return [(block.keys, block.values) for block in cache.layers[layer:]]


def place_behind_padding(
    cached: KeysValues,
    real: Bool[Tensor, "r t"],
    size: int,
    source: Int[Tensor, "r"] | None = None,
) -> KeysValues:
    """Put the head's keys and values behind the padding of each row, cut at ``size`` columns."""
    padding = (~real).sum(1, keepdim=True)
    columns = (torch.arange(size, device=real.device) - padding).clamp(min=0)
    rows = torch.zeros_like(padding) if source is None else source[:, None]

    def place(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[rows.to(x.device), columns.to(x.device)].transpose(1, 2)

    return [(place(keys), place(values)) for keys, values in cached]


def join_passes(passes: list[tuple[KeysValues, Tensor]]) -> tuple[KeysValues, Tensor]:
    """Put the rows of several passes together."""
    if len(passes) == 1:
        return passes[0]
    blocks = zip(*(cached for cached, _ in passes), strict=True)
    cached = [(torch.cat([k for k, _ in b]), torch.cat([v for _, v in b])) for b in blocks]
    return cached, torch.cat([logits for _, logits in passes])
