"""States and scores at the tokens of replies that are given, read behind their prompts.

Attention is causal, so what is read at a token of a whole reply is what was there when the reply
was only so long: a stream that is read token by token gives the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import ModelError, PromptError
from latentguard.models.chat import ChatTokenizer
from latentguard.models.chat_model import ChatModel
from latentguard.models.generate import end_ids
from latentguard.models.hooks import score_tokens
from latentguard.models.layout import CaptureRow, ReplyLayout, common_prefix_length
from latentguard.models.loading import cache_argument
from latentguard.models.prefill import build_cache, has_only_keys_and_values
from latentguard.prompts import Prompt, Reply
from latentguard.states import Progress, ReplyScoring

ReplyBackend = ChatModel | ReplyScoring
"""What reads replies: a model on transformers, or an engine that scores their tokens itself."""

REPLIES_AT_ONCE = 256
"""Replies that are sorted by length and read together."""


def lay_out_reply(model: ChatModel, reply: Reply) -> ReplyLayout:
    """The tokens of a reply behind its prompt: its own if it carries them, else those of its text.

    Raises:
        PromptError: if the reply has no token but its end, or is too long with its prompt.
        TemplateError: if the template cannot show the prompt.
    """
    layout = reply_layout(model.chat, reply, end_ids(model))
    model.check_length(len(layout.ids), reply.prompt)
    return layout


def reply_layout(chat: ChatTokenizer, reply: Reply, ends: set[int]) -> ReplyLayout:
    """The tokens of a reply of any length behind its prompt, without the one of ``ends``."""
    if not reply.ids:
        return chat.lay_out_reply(reply.prompt, reply.text)
    [prompt] = chat([reply.prompt])
    ids = reply.ids[:-1] if reply.ids[-1] in ends else reply.ids
    if not ids:
        raise PromptError(f"Reply '{reply.prompt.id}' has no token but the one that ends it.")
    return ReplyLayout((*prompt.ids, *ids), len(prompt.ids))


@dataclass(frozen=True, eq=False)
class ReplyWindows:
    """Mean states over windows of replies, one window after the other."""

    means: Float[Tensor, "w l d"]
    """Of each window."""

    owners: tuple[int, ...]
    """The number of the reply that each window is of."""

    sizes: tuple[int, ...]
    """How many tokens each window has."""


def capture_reply_windows(
    model: ChatModel,
    replies: Sequence[Reply],
    layers: Sequence[int],
    *,
    size: int,
    count: int,
    progress: Progress | None = None,
) -> ReplyWindows:
    """Mean states over the first windows of each reply.

    Args:
        model: The model.
        replies: What to read.
        layers: At which layers.
        size: Tokens of a window. What is left at the end is one more if it is half of one at least,
            or the whole reply.
        count: Windows of a reply at most.
        progress: Called with the number of replies just done.
    """
    parts = list[Float[Tensor, "w l d"]]()
    layouts = [lay_out_reply(model, reply) for reply in replies]
    spans = [_windows(layout, size, count) for layout in layouts]
    for start in range(0, len(replies), REPLIES_AT_ONCE):
        group = range(start, min(start + REPLIES_AT_ONCE, len(replies)))
        rows = []
        for n in group:
            padded = spans[n] + spans[n][-1:] * (count - len(spans[n]))
            rows.append(CaptureRow.of_spans(layouts[n].ids, padded))
        means = model.capture_rows(rows, tuple(layers), progress=progress)
        parts += [own[: len(spans[n])] for n, own in zip(group, means, strict=True)]
    if not parts:
        raise PromptError("There are no replies to read: expected at least one, found none.")
    return ReplyWindows(
        torch.cat(parts),
        tuple(n for n, own in enumerate(spans) for _ in own),
        tuple(last - first + 1 for own in spans for first, last in own),
    )


def _windows(layout: ReplyLayout, size: int, count: int) -> list[tuple[int, int]]:
    """First and last token of each window of a reply."""
    end = len(layout.ids)
    starts = range(layout.start, max(layout.start + 1, end - size // 2 + 1), size)
    return [(start, min(start + size, end) - 1) for start in starts][:count]


def score_reply_tokens(
    model: ReplyBackend,
    replies: Iterable[Reply],
    layers: Sequence[int],
    weight: Float[Tensor, "l d"],
) -> Iterator[tuple[Reply, Float[Tensor, "t"]]]:
    """Yield each reply with what its tokens score: states times weights, summed over the layers.

    Args:
        model: The model.
        replies: What to read, consumed lazily.
        layers: At which layers.
        weight: One row a layer.

    Raises:
        ModelError: if the model can do neither.
        PromptError: if a reply is empty or too long.
    """
    if isinstance(model, ReplyScoring):
        yield from model.reply_scores(replies, layers, weight)
        return
    if not isinstance(model, ChatModel):
        raise ModelError(
            f"Replies are read by a ChatModel, or inside vLLM by a VllmModel; found a "
            f"{type(model).__name__}."
        )
    for group in _groups(replies):
        layouts = [lay_out_reply(model, reply) for reply in group]
        scores = _score_group(model, layouts, tuple(layers), weight.to(model.device))
        yield from zip(group, scores, strict=True)


def _score_group(
    model: ChatModel,
    layouts: Sequence[ReplyLayout],
    layers: tuple[int, ...],
    weight: Float[Tensor, "l d"],
) -> list[Float[Tensor, "t"]]:
    spans = [(layout.start, len(layout.ids) - 1) for layout in layouts]
    rows = [CaptureRow.of_spans(one.ids, [span]) for one, span in zip(layouts, spans, strict=True)]
    scores: list[Float[Tensor, "t"]] = [torch.empty(0)] * len(rows)

    def read(batch: list[int]) -> None:
        batch_scores = model.score_batch([rows[i] for i in batch], layers, weight)
        for i, own in zip(batch, batch_scores, strict=True):
            scores[i] = own

    model.run_in_batches([row.length for row in rows], read)
    return scores


class ReplyReader:
    """Reads a reply while another model writes it: its text so far, with a cache of its own."""

    def __init__(
        self,
        model: ChatModel,
        prompt: Prompt,
        layers: Sequence[int],
        weight: Float[Tensor, "l d"],
    ) -> None:
        """Begin before the first token.

        Args:
            model: The model that reads.
            prompt: What is replied to.
            layers: At which layers.
            weight: One row a layer.
        """
        self._model = model
        self._prompt = prompt
        self._layers = tuple(layers)
        self._weight = weight.to(model.device)
        self._ids: tuple[int, ...] = ()
        self._scores: list[float] = []
        """Of each token in the cache, those of the prompt included."""

        self._cache = build_cache([])

    def read(self, text: str, *, is_whole: bool) -> list[float]:
        """The scores of the reply's tokens so far, in order.

        The last token counts only once the reply is whole: more text may lengthen it. Where more
        text has changed earlier tokens, too, these are read again.

        Args:
            text: The whole reply so far.
            is_whole: Whether no more comes.

        Raises:
            PromptError: if prompt and reply together are too long.
        """
        layout = lay_out_reply(self._model, Reply(self._prompt, text))
        ids = layout.ids if is_whole else layout.ids[:-1]
        prefix = common_prefix_length(self._ids, ids)
        if prefix < len(self._ids):
            self._cache.crop(prefix - len(self._ids))  # so many tokens of its end are dropped
        self._scores[prefix:] = self._read_tokens(ids[prefix:])
        self._ids = ids
        return self._scores[layout.start :]

    @torch.inference_mode()
    def _read_tokens(self, ids: Sequence[int]) -> list[float]:
        if not ids:
            return []
        network = self._model.model
        totals = torch.zeros(1, len(ids), device=self._model.device)
        blocks = self._model.blocks
        with score_tokens(blocks, layers=self._layers, weight=self._weight, totals=totals):
            tokens = torch.tensor([ids], device=self._model.device)
            network(tokens, use_cache=True, **{cache_argument(network): self._cache})
        if not has_only_keys_and_values(self._cache):
            raise ModelError(
                "Following a reply takes a cache of keys and values that can be cut; the blocks of "
                "this model keep more. Score its replies once they are whole."
            )
        scores: list[float] = totals[0].tolist()
        return scores


def _groups(replies: Iterable[Reply]) -> Iterator[list[Reply]]:
    source = iter(replies)
    while group := list(islice(source, REPLIES_AT_ONCE)):
        yield group
