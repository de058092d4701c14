"""What the guard asks of the engine, and what the engine answers.

The request for scores travels with the chat: where to read, and the digest of the token ids that
were laid out from segments (``models/chat.py``). The engine answers only if its own tokens are
these, so text that imitates control tokens, another template or tools in the prompt cannot move a
position.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from latentguard.models.layout import Layout, position_spans

FIELD = "latentguard"
"""In vLLM's ``kv_transfer_params``, the one dictionary that reaches a connector."""


@dataclass(frozen=True)
class ScoreRequest:
    """Which tokens of a prompt are to be scored."""

    channel: str
    """Path of the channel that waits for the response."""

    key: str
    """Which request it is; the response repeats it."""

    ids: str
    """Digest of the prompt's tokens."""

    at: tuple[int, ...]
    """Index of the token that each column is read at, or the last one of those averaged."""

    starts: tuple[int, ...] = ()
    """Index of the first token that each column averages; none: ``at``."""

    tail: int | None = None
    """How many of the prompt's last tokens are scored as a reply, and with them all tokens that are
    generated; None scores no reply."""

    @property
    def spans(self) -> list[range]:
        """The tokens of each column."""
        starts = self.starts or self.at
        return [range(first, last + 1) for first, last in zip(starts, self.at, strict=True)]

    @property
    def params(self) -> dict[str, Any]:
        """What goes into ``kv_transfer_params``."""
        return {FIELD: asdict(self)}

    @staticmethod
    def from_sampling(sampling: Any) -> ScoreRequest | None:
        """The score request that came with a chat; None if there is none."""
        params = (getattr(sampling, "extra_args", None) or {}).get("kv_transfer_params")
        fields = params.get(FIELD) if isinstance(params, dict) else None
        if not isinstance(fields, dict):
            return None
        return ScoreRequest(**(fields | {k: tuple(fields.get(k, ())) for k in ("at", "starts")}))


@dataclass(frozen=True)
class ScoreResponse:
    """What the engine read."""

    key: str
    values: tuple[float, ...] | None
    """Each column; None if the prompt's tokens are not those that were asked about."""


@dataclass(frozen=True)
class TokenScores:
    """What the engine read of some tokens of a reply."""

    key: str
    choice: int
    """Which of the replies to one prompt."""

    start: int
    """Index of the first of these tokens among those that are scored."""

    values: tuple[float, ...]
    """Of each token, the bias of the probe not yet added."""


def digest_ids(ids: Sequence[int]) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()


def score_request(
    layout: Layout, positions: Sequence[str], channel: Any, *, tail: int | None = None
) -> ScoreRequest:
    """The score request for a prompt: each column at its position."""
    starts, at = zip(*position_spans(layout, positions), strict=True)
    ids = digest_ids(layout.ids)
    return ScoreRequest(channel.path, channel.key(), ids, at, starts, tail)


def reply_request(ids: Sequence[int], channel: Any, *, tail: int) -> ScoreRequest:
    """The score request for the last tokens of a prompt, read as a reply."""
    return ScoreRequest(channel.path, channel.key(), digest_ids(ids), (), (), tail)
