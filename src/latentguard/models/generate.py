"""Steered greedy replies (paper, sections 3.4 and 3.5): a sweep for the price of a few runs.

Prompts are read by ``model.prefill``; the replies of many settings are decoded here as one batch,
which finished replies leave. Axis names in shapes: r rows (setting by setting), t tokens of the
padded prompt, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latentguard.errors import ModelError
from latentguard.models.layout import Layout
from latentguard.models.prefill import (
    Batch,
    Cached,
    Reader,
    cache_of,
    chosen,
    forward,
    joined,
    shares,
)
from latentguard.prompts import Prompt, Reply
from latentguard.states import Intervention, Progress

if TYPE_CHECKING:
    from latentguard.models.chat_model import ChatModel

DECODED = {"cpu": 16, "cuda": 4}
"""Tokens that are kept while decoding, as a multiple of the model's ``tokens_per_batch``."""

KEPT_ON_CPU = 2 << 30
"""Bytes of their keys and values at most where no error tells that memory ran out."""

ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of blocks that remember keys and values, and these alone, for each token."""


def sweep(
    model: ChatModel,
    prompts: Iterable[Prompt],
    interventions: Iterable[Intervention | None],
    *,
    max_new_tokens: int = 24,
    post: bool = True,
    watch: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[list[Reply]]:
    """Reply to prompts under each intervention.

    Args:
        model: The model.
        prompts: What to reply to.
        interventions: How to steer; None is unsteered.
        max_new_tokens: The longest reply; an end token of the model ends it sooner.
        post: Keep the post-instruction tokens; if not, the prompt ends at t_inst (Table 1).
        watch: Words, such as ``Certainly``, whose log-probability as first word is wanted.
        progress: Called with the number of replies just made.

    Returns:
        One list of replies, in the order of the prompts, for each intervention.

    Raises:
        PromptError: if a prompt is empty, too long, or has no question to stop before.
        ModelError: if a vector or a layer does not fit the model, or its blocks are of a kind that
            cannot be started in the middle.
    """
    prompts, settings = list(prompts), [_checked(model, one) for one in interventions]
    run = _Run(model, max_new_tokens, post, watch)
    rows = run.rows(prompts, settings)
    replies: list[list[Any]] = [[None] * len(prompts) for _ in settings]
    todo = sorted(range(len(prompts)), key=lambda i: len(rows[i][1].ids), reverse=True)
    while todo and settings:
        longest = len(rows[todo[0]][1].ids) + max_new_tokens
        batch = todo[: max(1, model.tokens_per_batch // longest)]
        try:
            found = run.batch([rows[i] for i in batch], settings)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            tokens = len(batch) * longest
            model.shrink(error, tokens, len(batch) * min(len(settings), run.at_once(tokens)))
            continue
        for n, made in found:
            for i, reply in zip(batch, made, strict=True):
                replies[n][i] = reply
        todo = todo[len(batch) :]
        if progress is not None:
            progress(len(batch) * len(settings))
    return replies


def _check_blocks(model: ChatModel) -> None:
    config = model.model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    others = set(kinds or ()) - ATTENTION
    shared = getattr(config, "num_kv_shared_layers", 0)
    if others or shared:
        found = ", ".join(sorted(others)) or "keys and values that blocks share"
        raise ModelError(f"Replies need blocks of attention with their own cache; found {found}.")


def _checked(model: ChatModel, setting: Intervention | None) -> Intervention:
    if setting is None:
        return Intervention(0, torch.zeros(model.width), 0.0)
    if not 0 <= setting.layer <= model.depth:
        raise ModelError(f"Layers run from 0 to {model.depth}; found {setting.layer}.")
    if tuple(setting.vector.shape) != (model.width,):
        shape = tuple(setting.vector.shape)
        raise ModelError(f"A vector of width {model.width} is needed; found shape {shape}.")
    return setting


class _Run:
    """How to reply, for one sweep."""

    def __init__(self, model: ChatModel, most: int, post: bool, watch: Sequence[str]) -> None:
        if most < 1:
            raise ValueError(f"max_new_tokens is at least 1; found {most}")
        _check_blocks(model)
        self.model, self.most, self.post = model, most, post
        self.ends = torch.tensor(sorted(end_ids(model)), dtype=torch.long, device=model.device)
        self.watch = [(word, first_ids(model, word)) for word in watch]

    def rows(
        self, prompts: Sequence[Prompt], settings: Sequence[Intervention]
    ) -> list[tuple[Prompt, Layout]]:
        """Lay out the prompts, and make sure that each can be read and steered."""
        layouts = self.model.chat(prompts)
        if not self.post:
            layouts = [replace(one, ids=one.ids[: one.t_inst + 1]) for one in layouts]
        for layout, prompt in zip(layouts, prompts, strict=True):
            self.model.check_length(len(layout.ids) + self.most, prompt)
            for choice in {one.tokens for one in settings}:
                chosen(layout, prompt, choice)
        return list(zip(prompts, layouts, strict=True))

    def at_once(self, tokens: int) -> int:
        """How many settings are decoded together if one has so many tokens."""
        kind = self.model.device.type
        most = DECODED.get(kind, 4) * self.model.tokens_per_batch
        if kind == "cpu":
            most = min(most, KEPT_ON_CPU // _token_bytes(self.model))
        return max(1, most // tokens)

    @torch.inference_mode()
    def batch(
        self, rows: Sequence[tuple[Prompt, Layout]], settings: Sequence[Intervention]
    ) -> list[tuple[int, list[Reply]]]:
        """The number of each setting, in some order, and its replies."""
        batch = Batch.of(rows, {one.tokens for one in settings}, self.model.device)
        reader = Reader(self.model, batch, [one.layer for one in settings])
        todo = sorted(range(len(settings)), key=lambda n: shares(settings[n]))
        step = self.at_once(len(rows) * (batch.ids.shape[1] + self.most))
        found = []
        for chunk in (todo[at : at + step] for at in range(0, len(todo), step)):
            groups = groupby((settings[n] for n in chunk), key=shares)
            cached, logits = joined([reader.steer(list(group)) for _, group in groups])
            watched = self._watched(logits)
            ids = self._decode(cached, logits, batch.real.repeat(len(chunk), 1))
            made = map(self._reply, list(rows) * len(chunk), ids, watched)
            for n in chunk:
                replies = [replace(r, label=settings[n].label) for r in islice(made, len(rows))]
                found.append((n, replies))
        return found

    def _decode(
        self, cached: Cached, logits: Float[Tensor, "r v"], real: Bool[Tensor, "r t"]
    ) -> list[list[int]]:
        """Greedy tokens of each row; finished rows leave the batch."""
        cache = cache_of(cached)
        cached.clear()  # the cache holds them now
        found: list[list[int]] = [[] for _ in logits]
        rows = torch.arange(len(logits), device=logits.device)
        while True:
            tokens = logits.argmax(-1)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                found[row].append(token)
            going = (~torch.isin(tokens, self.ends)).nonzero()[:, 0]
            if not len(going) or len(found[rows[0]]) == self.most:
                return found
            if len(going) < len(rows):
                cache.batch_select_indices(going)
                rows, tokens, real = rows[going], tokens[going], real[going]
            real = torch.cat([real, real.new_ones(len(real), 1)], 1)
            logits = forward(self.model, tokens[:, None], real, cache)

    def _watched(self, logits: Float[Tensor, "r v"]) -> list[tuple[tuple[str, float], ...]]:
        if not self.watch:
            return [()] * len(logits)
        chances = logits.float().log_softmax(-1)
        columns = [chances[:, ids].logsumexp(-1).tolist() for _, ids in self.watch]
        words = [word for word, _ in self.watch]
        return [tuple(zip(words, row, strict=True)) for row in zip(*columns, strict=True)]

    def _reply(
        self,
        row: tuple[Prompt, Layout],
        ids: list[int],
        watched: tuple[tuple[str, float], ...],
    ) -> Reply:
        prompt, layout = row
        finished = ids[-1] in self.ends.tolist()
        text = self._text(layout.ids[-1], ids[:-1] if finished else ids)
        return Reply(prompt, text, tuple(ids), finished, watched=watched)

    def _text(self, last: int, said: list[int]) -> str:
        """What is said; behind the user's own words with its leading blank.

        By that blank a reply is told from the end of the user's sentence (Table 1), and tokenizers
        such as Llama-2's take it from the front of what they decode.
        """
        decode = partial(self.model.tokenizer.decode, skip_special_tokens=True)
        if not self.post:
            lead, whole = decode([last]), decode([last, *said])
            if whole.startswith(lead):
                return str(whole[len(lead) :])
        return str(decode(said))


def _token_bytes(model: ChatModel) -> int:
    """Of the keys and values of one token in all blocks, at most."""
    config = model.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    wide = (getattr(config, "num_key_value_heads", None) or heads) * size
    return int(2 * model.depth * wide * model.model.dtype.itemsize)


def end_ids(model: ChatModel) -> set[int]:
    """Tokens that end a reply: those of the generation config and that of the tokenizer."""
    config = getattr(model.model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    several = ends if isinstance(ends, (list, tuple)) else [ends]
    return {int(i) for i in (*several, model.tokenizer.eos_token_id) if i is not None}


def first_ids(model: ChatModel, word: str) -> list[int]:
    """Tokens with which a reply that says ``word`` begins: with and without a blank before it.

    Raises:
        ValueError: if the word has no visible token.
    """
    found = set[int]()
    for text in (word, f" {word}"):
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        seen = (i for i in ids if model.tokenizer.decode([i]).strip())
        found.update(islice(seen, 1))
    if not found:
        raise ValueError(f"'{word}' has no visible token")
    return sorted(found)
