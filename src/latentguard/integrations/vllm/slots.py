"""Which KV slots hold a prompt's positions, and what was scored there.

The scheduler's side keeps the book of blocks; the worker's side keeps the numbers. A slot is NaN
from the step in which its block is handed out until a token is computed there, so a number that is
read is always of the token that the engine's own cache holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentguard.integrations.vllm.score_request import ScoreRequest, TokenScores, digest_ids

Copy = tuple[int, int]
"""From a block to a block."""

CHILD = re.compile(r"(\d+)_chatcmpl-")
"""How vLLM names the requests of a chat with several replies: the index of the reply, its name."""


class SlotScores:
    """The worker's buffer, a row for each KV slot and one for padding."""

    def __init__(
        self,
        slots: int,
        columns: int,
        block: int,
        device: torch.device,
        queries: Mapping[int, int] | None = None,
    ) -> None:
        """Room for so many slots, all unknown.

        Args:
            slots: How many.
            columns: How many numbers each has.
            block: Slots of a block.
            device: Where they lie.
            queries: Column of an attended position -> column of its query.
        """
        self.block = block
        self._queries = queries or {}
        shape = (slots + 1, columns)
        self._rows = torch.full(shape, torch.nan, dtype=torch.float32, device=device)

    def forget(self, blocks: Sequence[int]) -> None:
        """Blocks that were handed out anew hold nothing yet."""
        if blocks:
            self._whole()[torch.tensor(blocks)] = torch.nan

    def copy(self, pairs: Sequence[Copy]) -> None:
        """The engine copied blocks."""
        if pairs:
            before, after = torch.tensor(pairs).T
            self._whole()[after] = self._whole()[before]

    def write(self, slots: Int[Tensor, "t"], values: Float[Tensor, "t c"]) -> None:
        """What tokens add up to; a negative slot is padding and goes into the last row."""
        where = torch.where(slots < 0, len(self._rows) - 1, slots.long())
        self._rows.index_copy_(0, where, values[: len(where)])

    def read(self, slots: Sequence[Sequence[int]]) -> list[float]:
        """The mean of each column over its slots; NaN where one was not written.

        That of an attended position has the weights of the softmax of its query's column.
        """
        spans = list(dict.fromkeys(map(tuple, slots)))  # several columns read the same span
        flat = torch.tensor([slot for own in spans for slot in own], device=self._rows.device)
        rows, ends = self._rows[flat].cpu(), [0, *accumulate(len(own) for own in spans)]
        parts = {own: rows[a:b] for own, (a, b) in zip(spans, pairwise(ends), strict=True)}
        return [self._mean(column, parts[tuple(own)]) for column, own in enumerate(slots)]

    def _mean(self, column: int, rows: Float[Tensor, "t c"]) -> float:
        query = self._queries.get(column)
        if query is None:
            return float(rows[:, column].mean())
        return float(rows[:, query].softmax(0) @ rows[:, column])

    def read_replies(self, replies: Sequence[ReplyDue]) -> list[TokenScores]:
        """The last column at each token of some replies; NaN where one was not written."""
        flat = [slot for due in replies for slot in due.slots]
        where = torch.tensor(flat, device=self._rows.device)
        values = self._rows[where, -1].tolist()  # one transfer for all of a step
        ends = [0, *accumulate(len(due.slots) for due in replies)]
        return [
            TokenScores(due.request.key, due.choice, due.start, tuple(values[a:b]))
            for due, (a, b) in zip(replies, pairwise(ends), strict=True)
        ]

    def _whole(self) -> Float[Tensor, "blocks slots c"]:
        return self._rows[:-1].view(-1, self.block, self._rows.shape[1])


@dataclass(frozen=True)
class Due:
    """A prompt that is computed whole in this step."""

    request: ScoreRequest
    slots: tuple[tuple[int, ...], ...]
    """Where each column is read; several are averaged."""


@dataclass(frozen=True)
class ReplyDue:
    """Tokens of a reply that are computed in this step and were not read before."""

    request: ScoreRequest
    choice: int
    """Which of the replies to one prompt."""

    start: int
    """Index of the first of these tokens among those that are scored."""

    slots: tuple[int, ...]
    """Of each token."""


@dataclass(frozen=True)
class Step:
    """What the worker does in one step."""

    fresh: tuple[int, ...] = ()
    """Blocks that were handed out: unknown from now on, before anything is computed."""

    copies: tuple[Copy, ...] = ()
    due: tuple[Due, ...] = ()
    """To be read after the step."""

    refused: tuple[ScoreRequest, ...] = ()
    """Prompts whose tokens are not those that were asked about."""

    replies: tuple[ReplyDue, ...] = ()
    """To be read after the step."""


@dataclass
class _Request:
    length: int
    """Tokens of the prompt."""

    scores: ScoreRequest | None
    """What is read of the prompt."""

    reply: ScoreRequest | None
    """What the tokens of the reply are read for."""

    choice: int
    """Which of the replies to one prompt."""

    unread: int = 0
    """Index of the first token of the reply that was not read, counted from the prompt's first."""

    blocks: list[int] = field(default_factory=list)

    @property
    def reply_start(self) -> int:
        """Index of the first token that is scored as a reply."""
        return self.length - (self.reply.tail or 0 if self.reply else 0)


class Ledger:
    """The scheduler's book of who holds which blocks."""

    def __init__(self, block: int) -> None:
        """Begin with nobody; ``block`` is the number of tokens in a block."""
        self._block = block
        self._requests: dict[str, _Request] = {}

    def step(self, scheduled: Any) -> Step:
        """Follow a ``SchedulerOutput`` of vLLM."""
        for name in scheduled.finished_req_ids:
            self._requests.pop(name, None)
        fresh, due, refused = list[int](), list[Due](), list[ScoreRequest]()
        replies = list[ReplyDue]()
        for new in scheduled.scheduled_new_reqs:
            request = self._opened(new, refused)
            fresh += self._taken(request, new.block_ids, new.num_computed_tokens)
            count = scheduled.num_scheduled_tokens[new.req_id]
            due += self._finished(request, new.num_computed_tokens, count)
            replies += self._replied(request, new.num_computed_tokens + count)
        old = scheduled.scheduled_cached_reqs
        for name, blocks, computed in zip(
            old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True
        ):
            request = self._requests[name]
            if name in old.resumed_req_ids:  # preempted before: its old blocks belong to others
                request.blocks.clear()
                fresh += self._taken(request, blocks, computed)
            elif blocks is not None:
                request.blocks += blocks[0]
                fresh += blocks[0]
            count = scheduled.num_scheduled_tokens[name]
            due += self._finished(request, computed, count)
            replies += self._replied(request, computed + count)
        copies = tuple((c.src_block_id, c.dst_block_id) for c in self._copied(scheduled))
        return Step(tuple(fresh), copies, tuple(due), tuple(refused), tuple(replies))

    def _opened(self, new: Any, refused: list[ScoreRequest]) -> _Request:
        ids = new.prompt_token_ids
        scores = ScoreRequest.from_sampling(new.sampling_params)
        reply = scores if scores is not None and scores.tail is not None else None
        if scores is not None and (ids is None or digest_ids(ids) != scores.ids):
            refused.append(scores)
            scores = None
        child = CHILD.match(new.req_id)
        request = _Request(len(ids or ()), scores, reply, int(child[1]) if child else 0)
        before = self._requests.get(new.req_id)  # preempted: what was read is not read again
        request.unread = before.unread if before else request.reply_start
        self._requests[new.req_id] = request
        return request

    def _taken(
        self, request: _Request, blocks: tuple[list[int], ...] | None, computed: int
    ) -> list[int]:
        """Its first blocks; those of the tokens that were computed already are cache hits."""
        request.blocks += blocks[0] if blocks else []
        return request.blocks[computed // self._block :]

    def _finished(self, request: _Request, computed: int, count: int) -> list[Due]:
        """The request, if this step computes the last token of its prompt."""
        if request.scores is None or not computed < request.length <= computed + count:
            return []
        spans = request.scores.spans
        if not spans:
            return []
        return [Due(request.scores, tuple(self._slots(request, span) for span in spans))]

    def _replied(self, request: _Request, after: int) -> list[ReplyDue]:
        """The tokens of its reply that are in the cache after this step and were not read.

        What a cache hit brings counts, since its slots hold its scores. What is computed again
        after a preemption does not.
        """
        if request.reply is None or after <= request.unread:
            return []
        start = request.unread - request.reply_start
        slots = self._slots(request, range(request.unread, after))
        request.unread = after
        return [ReplyDue(request.reply, request.choice, start, slots)]

    def _slots(self, request: _Request, tokens: range) -> tuple[int, ...]:
        size = self._block
        return tuple(request.blocks[i // size] * size + i % size for i in tokens)

    @staticmethod
    def _copied(scheduled: Any) -> Sequence[Any]:
        return scheduled.kv_cache_block_copies or ()
