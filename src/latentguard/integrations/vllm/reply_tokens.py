"""What a request asks of its replies, and the scores of their tokens as the engine posts them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentguard.integrations.vllm.score_request import TokenScores
from latentguard.serve.errors import BadRequest


@dataclass(frozen=True)
class ReplyOptions:
    """What a request asks of its replies."""

    count: int
    """How many replies to the prompt."""

    model: str
    """What the client calls the model."""

    is_stream: bool
    """Whether events are asked for."""

    has_stop_texts: bool
    """Whether a text ends the reply; the engine may then compute tokens behind it."""

    shows_ends: bool
    """Whether the token that ends a reply is shown."""

    shows_ids: bool
    """Whether the client wants the token ids."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> ReplyOptions:
        """What a request asks.

        Raises:
            BadRequest: if its replies cannot be judged.
        """
        if body.get("echo"):
            raise BadRequest("'echo' shows text that is no part of the reply; leave it out.")
        if body.get("include_reasoning") is not None and not body["include_reasoning"]:
            raise BadRequest("'include_reasoning' hides tokens from the guard; leave it out.")
        count = body.get("n")
        if count is not None and (not isinstance(count, int) or count < 1):
            raise BadRequest("'n' has to be a whole number of at least 1.")
        return ReplyOptions(
            count=count or 1,
            model=str(body.get("model")),
            is_stream=bool(body.get("stream")),
            has_stop_texts=bool(body.get("stop")),
            shows_ends=bool(body.get("include_stop_str_in_output")),
            shows_ids=bool(body.get("return_token_ids")),
        )


@dataclass
class TokenScoreLog:
    """The scores of the tokens of a request's replies, in order.

    A number that is missing, comes twice or is not finite makes the whole log lost: it is never
    read as harmless.
    """

    scores: tuple[list[float], ...]
    """Of each reply."""

    is_lost: bool = False
    """Whether nothing can be said of the replies."""

    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever something came."""

    @staticmethod
    def of(count: int) -> TokenScoreLog:
        """Begin with so many replies."""
        return TokenScoreLog(tuple([] for _ in range(count)))

    def add(self, part: TokenScores) -> None:
        """Take up what the engine posted."""
        self.news.set()
        if part.choice >= len(self.scores):
            self.is_lost = True
            return
        own = self.scores[part.choice]
        self.is_lost |= part.start != len(own) or not all(map(math.isfinite, part.values))
        own.extend(part.values)
