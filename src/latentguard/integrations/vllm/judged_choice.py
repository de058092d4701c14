"""One reply of a chat: its tokens and their scores, paired.

Every token is read but the one that ends a reply (end of sequence, stop token), which shows
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentguard.guard.replies import ReplyProbe, ReplyVerdict
from latentguard.serve.config import ServeConfig
from latentguard.serve.errors import Unavailable
from latentguard.serve.reply_reading import ReplyGate, ShownText
from latentguard.serve.upstream_formats import StreamEvent

Events = tuple[StreamEvent, ...]


class JudgedChoice:
    """One reply: what its tokens show, and what was read of them."""

    def __init__(self, judge: ReplyProbe, config: ServeConfig, *, shows_ends: bool) -> None:
        """Begin before the first token.

        Args:
            judge: Of the guard.
            config: What happens to a flagged reply, and how much is held back.
            shows_ends: Whether the token that ends the reply is shown.
        """
        self._gate = ReplyGate[Events](judge, config.on_flagged_reply, config.hold_tokens)
        self._shows_ends = shows_ends
        self._shown_with: dict[int, Events] = {}
        """The events that a token is shown with."""

        self._waiting: Events = ()
        """Events that come behind the last token."""

        self._expected = 0
        """How many tokens are to be read, as far as is known."""

        self.count = 0
        """How many tokens were read."""

        self.ids = list[int]()
        """Tokens to be read."""

        self.is_complete = False
        """Whether no more comes."""

        self.is_shown = False
        """Whether all of it may be shown."""

    @property
    def must_end(self) -> bool:
        """Whether the reply ends here."""
        return self._gate.must_end

    @property
    def missing(self) -> int:
        """How many tokens of a reply that is complete were not read."""
        return max(0, self._expected - self.count) if self.is_complete else 0

    def add(self, choice: Mapping[str, Any], events: Events = ()) -> None:
        """Take up tokens.

        Args:
            choice: Of the server's answer: token ids, and why the reply ends.
            events: What shows them.

        Raises:
            Unavailable: if their ids are not there.
        """
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            raise Unavailable("The server did not say which tokens the reply has.")
        self._waiting += events
        finish = choice.get("finish_reason")
        self.is_complete |= finish is not None
        is_end_token = finish == "stop" and not isinstance(choice.get("stop_reason"), str)
        if is_end_token and not self._shows_ends:
            ids = ids[:-1]
        elif ids:
            self._shown_with[self._expected + len(ids) - 1] = self._waiting
            self._waiting = ()
        self._expected += len(ids)
        self.ids += ids

    def advance(self, scores: Sequence[float]) -> list[ShownText[Events]]:
        """Read the tokens that came and whose scores are there; returns what may be shown."""
        return self._push(scores[: self._expected])

    def advance_unseen(self, scores: Sequence[float]) -> None:
        """Read tokens that the server has not shown yet.

        The last one may be the end of the reply, which is not read.
        """
        self._push(scores[:-1])

    def read_last(self, score: float) -> list[ShownText[Events]]:
        """Read the last token, which no pass of the reply has read."""
        return self._push([*[0.0] * self.count, score])

    def finish(self) -> list[ShownText[Events]]:
        """All was read: what is left."""
        self.is_shown = True
        return self._gate.finish(self._waiting)

    def verdict(self) -> ReplyVerdict | None:
        """On what was read; None if that is nothing."""
        return self._gate.verdict()

    def _push(self, scores: Sequence[float]) -> list[ShownText[Events]]:
        pieces = list[ShownText[Events]]()
        while self.count < len(scores) and not self.must_end:
            pieces += self._gate.push(self._shown_with.pop(self.count, ()), scores[self.count])
            self.count += 1
        return pieces
