"""Which KV slots hold a prompt's positions, and what was scored there.

The scheduler's side keeps the book of blocks; the worker's side keeps the numbers. A slot is NaN
from the step in which its block is handed out until a token is computed there, so a number that is
read is always of the token that the engine's own cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentguard.integrations.vllm.score_request import ScoreRequest, digest_ids

Copy = tuple[int, int]
"""From a block to a block."""


class SlotScores:
    """The worker's buffer, a row for each KV slot and one for padding."""

    def __init__(self, slots: int, columns: int, block: int, device: torch.device) -> None:
        """Room for so many slots, all unknown."""
        self.block = block
        self._rows = torch.full((slots + 1, columns), torch.nan, device=device)

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
        """The mean of each column over its slots; NaN where one was not written."""
        flat = torch.tensor([slot for own in slots for slot in own], device=self._rows.device)
        rows, ends = self._rows[flat].cpu(), [0, *accumulate(len(own) for own in slots)]
        return [float(rows[a:b, column].mean()) for column, (a, b) in enumerate(pairwise(ends))]

    def _whole(self) -> Float[Tensor, "blocks slots c"]:
        return self._rows[:-1].view(-1, self.block, self._rows.shape[1])


@dataclass(frozen=True)
class Due:
    """A prompt that is computed whole in this step."""

    request: ScoreRequest
    slots: tuple[tuple[int, ...], ...]
    """Where each column is read; several are averaged."""


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


@dataclass
class _Request:
    length: int
    scores: ScoreRequest | None
    blocks: list[int] = field(default_factory=list)


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
        for new in scheduled.scheduled_new_reqs:
            request = self._opened(new, refused)
            fresh += self._taken(request, new.block_ids, new.num_computed_tokens)
            due += self._finished(request, new.req_id, new.num_computed_tokens, scheduled)
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
            due += self._finished(request, name, computed, scheduled)
        copies = tuple((c.src_block_id, c.dst_block_id) for c in self._copied(scheduled))
        return Step(tuple(fresh), copies, tuple(due), tuple(refused))

    def _opened(self, new: Any, refused: list[ScoreRequest]) -> _Request:
        ids = new.prompt_token_ids
        scores = ScoreRequest.from_sampling(new.sampling_params)
        if scores is not None and (ids is None or digest_ids(ids) != scores.ids):
            refused.append(scores)
            scores = None
        request = _Request(len(ids or ()), scores)
        self._requests[new.req_id] = request
        return request

    def _taken(
        self, request: _Request, blocks: tuple[list[int], ...] | None, computed: int
    ) -> list[int]:
        """Its first blocks; those of the tokens that were computed already are cache hits."""
        request.blocks += blocks[0] if blocks else []
        return request.blocks[computed // self._block :]

    def _finished(self, request: _Request, name: str, computed: int, scheduled: Any) -> list[Due]:
        """The request, if this step computes the last token of its prompt."""
        after = computed + scheduled.num_scheduled_tokens[name]
        if request.scores is None or not computed < request.length <= after:
            return []
        size = self._block
        slots = (
            tuple(request.blocks[i // size] * size + i % size for i in span)
            for span in request.scores.spans
        )
        return [Due(request.scores, tuple(slots))]

    @staticmethod
    def _copied(scheduled: Any) -> Sequence[Any]:
        return scheduled.kv_cache_block_copies or ()
