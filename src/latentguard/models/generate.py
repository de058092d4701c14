"""Steered greedy replies (paper, sections 3.4 and 3.5): a sweep for the price of a few runs.

Prompts are read by ``models.prefill``; the replies of many settings are decoded here as one batch,
which finished replies leave. Axis names in shapes: r rows (setting by setting), t tokens of the
padded prompt, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latentguard.errors import ModelError
from latentguard.interventions import Ablation, Edit, Intervention, Tokens
from latentguard.models.edits import EditedReader, ReplyEdits, pass_key, require_fit, require_place
from latentguard.models.layout import Layout
from latentguard.models.prefill import (
    KeysValues,
    PromptBatch,
    ReplyingModel,
    SteeredReader,
    build_cache,
    forward,
    join_passes,
    steered_tokens,
)
from latentguard.prompts import Prompt, Reply
from latentguard.states import Progress

DECODED_BATCHES = {"cpu": 16, "cuda": 4}
"""Tokens that are kept while decoding, as a multiple of the model's ``tokens_per_batch``."""

READ_BATCHES = {"cpu": 4}
"""Tokens of prompts that are read together for one setting, in the same unit: with few settings,
more prompts make the rows that decoding on a CPU is faster with."""

MAX_CPU_CACHE_BYTES = 2 << 30
"""Bytes of keys and values at most where no error shows that memory ran out."""

ATTENTION_KINDS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of blocks that keep keys and values, and these alone, for each token."""


def sweep(
    model: ReplyingModel,
    prompts: Iterable[Prompt],
    interventions: Iterable[Edit | None],
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
    prompts = list(prompts)
    settings = [_require_fit(model, one) for one in interventions]
    run = _Sweep(model, max_new_tokens, post, watch)
    rows = run.lay_out(prompts, settings)
    replies: list[list[Any]] = [[None] * len(prompts) for _ in settings]
    todo = sorted(range(len(prompts)), key=lambda i: len(rows[i][1].ids), reverse=True)
    while todo and settings:
        longest = len(rows[todo[0]][1].ids) + max_new_tokens
        batch = todo[: run.prompts_at_once(longest, len(settings))]
        try:
            batches = run.reply_to([rows[i] for i in batch], settings)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            tokens = len(batch) * longest
            rows_at_once = len(batch) * min(len(settings), run.settings_at_once(tokens))
            model.shrink(error, tokens, rows_at_once)
            continue
        for n, batch_replies in batches:
            for i, reply in zip(batch, batch_replies, strict=True):
                replies[n][i] = reply
        todo = todo[len(batch) :]
        if progress is not None:
            progress(len(batch) * len(settings))
    return replies


def _require_attention(model: ReplyingModel) -> None:
    config = model.model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    others = set(kinds or ()) - ATTENTION_KINDS
    shared = getattr(config, "num_kv_shared_layers", 0)
    if others or shared:
        names = ", ".join(sorted(others)) or "keys and values that blocks share"
        raise ModelError(f"Replies need blocks of attention with their own cache; found {names}.")


def _require_fit(model: ReplyingModel, setting: Edit | None) -> Edit:
    if setting is None:
        return Intervention(0, torch.zeros(model.width), 0.0)
    require_fit(model, setting)
    return setting


class _Sweep:
    """How to reply, for one sweep."""

    def __init__(
        self, model: ReplyingModel, max_new_tokens: int, post: bool, watch: Sequence[str]
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is at least 1; found {max_new_tokens}")
        _require_attention(model)
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.post = post
        self.ends = torch.tensor(sorted(end_ids(model)), dtype=torch.long, device=model.device)
        self.watch = [(word, first_ids(model, word)) for word in watch]

    def lay_out(
        self, prompts: Sequence[Prompt], settings: Sequence[Edit]
    ) -> list[tuple[Prompt, Layout]]:
        """Lay out the prompts, and make sure that each can be read and edited."""
        layouts = self.model.chat(prompts)
        if not self.post:
            layouts = [replace(one, ids=one.ids[: one.t_inst + 1]) for one in layouts]
        for layout, prompt in zip(layouts, prompts, strict=True):
            self.model.check_length(len(layout.ids) + self.max_new_tokens, prompt)
            for choice in _token_choices(settings):
                steered_tokens(layout, prompt, choice)
            for setting in settings:
                require_place(setting, prompt, layout)
        return list(zip(prompts, layouts, strict=True))

    def prompts_at_once(self, longest: int, settings: int) -> int:
        """How many prompts of so many tokens are read together, with so many settings each."""
        batches = max(1, READ_BATCHES.get(self.model.device.type, 1) // settings)
        return max(1, batches * self.model.tokens_per_batch // longest)

    def settings_at_once(self, tokens: int) -> int:
        """How many settings are decoded together if one has so many tokens."""
        kind = self.model.device.type
        budget = DECODED_BATCHES.get(kind, 4) * self.model.tokens_per_batch
        if kind == "cpu":
            budget = min(budget, MAX_CPU_CACHE_BYTES // _token_bytes(self.model))
        return max(1, budget // tokens)

    @torch.inference_mode()
    def reply_to(
        self, rows: Sequence[tuple[Prompt, Layout]], settings: Sequence[Edit]
    ) -> list[tuple[int, list[Reply]]]:
        """The number of each setting, in some order, and its replies."""
        batch = PromptBatch.pad(rows, _token_choices(settings), self.model.device)
        readers = self._readers(rows, batch, settings)
        todo = sorted(range(len(settings)), key=lambda n: pass_key(settings[n]))
        step = self.settings_at_once(len(rows) * (batch.ids.shape[1] + self.max_new_tokens))
        replies = []
        for chunk in (todo[at : at + step] for at in range(0, len(todo), step)):
            together = [settings[n] for n in chunk]
            groups = [list(group) for _, group in groupby(together, key=pass_key)]
            passes = [readers[isinstance(group[0], Intervention)].read(group) for group in groups]
            cached, logits = join_passes(passes)
            watched = self._watched(logits)
            edits = ReplyEdits.of(together, rows, batch, self.model)
            ids = self._decode(cached, logits, batch.real.repeat(len(chunk), 1), edits)
            replies_of_rows = map(self._reply, list(rows) * len(chunk), ids, watched)
            for n in chunk:
                own = [
                    replace(r, label=settings[n].label) for r in islice(replies_of_rows, len(rows))
                ]
                replies.append((n, own))
        return replies

    def _readers(
        self,
        rows: Sequence[tuple[Prompt, Layout]],
        batch: PromptBatch,
        settings: Sequence[Edit],
    ) -> dict[bool, SteeredReader | EditedReader]:
        """What reads the prompts under steering (True) and under other edits (False)."""
        steered = [one.layer for one in settings if isinstance(one, Intervention)]
        edited = [one for one in settings if not isinstance(one, Intervention)]
        readers: dict[bool, SteeredReader | EditedReader] = {}
        if steered:
            readers[True] = SteeredReader(self.model, batch, steered)
        if edited:
            readers[False] = EditedReader(self.model, rows, batch, edited)
        return readers

    def _decode(
        self,
        cached: KeysValues,
        logits: Float[Tensor, "r v"],
        real: Bool[Tensor, "r t"],
        edits: ReplyEdits,
    ) -> list[list[int]]:
        """Greedy tokens of each row; finished rows leave the batch.

        Args:
            cached: Keys and values of the prompts; taken over.
            logits: After the last token of the prompts.
            real: Which tokens are no padding.
            edits: What is changed at every token.
        """
        cache = build_cache(cached)
        cached.clear()  # the cache holds them now
        ids: list[list[int]] = [[] for _ in logits]
        rows = torch.arange(len(logits), device=logits.device)
        while True:
            tokens = logits.argmax(-1)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                ids[row].append(token)
            unfinished = (~torch.isin(tokens, self.ends)).nonzero()[:, 0]
            if not len(unfinished) or len(ids[rows[0]]) == self.max_new_tokens:
                return ids
            if len(unfinished) < len(rows):
                cache.batch_select_indices(unfinished)
                rows, tokens, real = rows[unfinished], tokens[unfinished], real[unfinished]
            real = torch.cat([real, real.new_ones(len(real), 1)], 1)
            with edits.applied(self.model.blocks, rows, real.shape[1]):
                logits = forward(self.model, tokens[:, None], real, cache)

    def _watched(self, logits: Float[Tensor, "r v"]) -> list[tuple[tuple[str, float], ...]]:
        """The watched words of each row, each with its log-probability as first word."""
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
        text = self._decode_text(layout.ids[-1], ids[:-1] if finished else ids)
        return Reply(prompt, text, tuple(ids), finished, watched=watched)

    def _decode_text(self, last: int, ids: list[int]) -> str:
        """The text of a reply; behind the user's own words with its leading blank.

        Without post-instruction tokens, that blank shows where the user's sentence ends (Table 1),
        and tokenizers such as Llama-2's take it from the front of what they decode.
        """
        decode = partial(self.model.tokenizer.decode, skip_special_tokens=True)
        if not self.post:
            lead, whole = decode([last]), decode([last, *ids])
            if whole.startswith(lead):
                return str(whole[len(lead) :])
        return str(decode(ids))


def _token_choices(settings: Iterable[Edit]) -> set[Tokens]:
    """The choices of tokens that some settings steer or ablate."""
    return {one.tokens for one in settings if isinstance(one, Intervention | Ablation)}


def _token_bytes(model: ReplyingModel) -> int:
    """Bytes of the keys and values of one token in all blocks, at most."""
    config = model.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    return int(2 * model.depth * width * model.model.dtype.itemsize)


def end_ids(model: ReplyingModel) -> set[int]:
    """Tokens that end a reply: those of the generation config and that of the tokenizer."""
    config = getattr(model.model, "generation_config", None)
    return all_end_ids(getattr(config, "eos_token_id", None), model.tokenizer)


def all_end_ids(ends: int | Sequence[int] | None, tokenizer: Any) -> set[int]:
    """What a generation config names as end of a reply, and the tokenizer's own."""
    several = ends if isinstance(ends, (list, tuple)) else [ends]
    return {int(i) for i in (*several, tokenizer.eos_token_id) if i is not None}


def first_ids(model: ReplyingModel, word: str) -> list[int]:
    """Tokens with which a reply that begins with ``word`` begins: with and without a blank.

    Raises:
        ValueError: if the word has no visible token.
    """
    first = set[int]()
    for text in (word, f" {word}"):
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        visible = (i for i in ids if model.tokenizer.decode([i]).strip())
        first.update(islice(visible, 1))
    if not first:
        raise ValueError(f"'{word}' has no visible token")
    return sorted(first)
