"""Replies in a service: what is shown of one while its tokens are read, and what if it is flagged.

- ``cut``: the reply ends at the flagged token; what was shown before stays.
- ``block``: nothing is shown before the whole reply was read; a flagged one is refused.
- ``annotate``: all is shown, each piece with the running score after it.
- ``shadow``: all is shown, and the log alone has the verdict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np

from latentguard.guard.replies import ReplyProbe, ReplyVerdict, RunningScore
from latentguard.serve.config import ReplyPolicy

ReplyAction = Literal["score", "pass", "cut", "block", "annotate", "shadow"]
"""What was done with a reply: its verdict given; shown; what the policy says of a flagged one."""


Piece = TypeVar("Piece", bound=Sized)
"""What is shown of a reply: text, or the events that hold it."""


@dataclass(frozen=True)
class ShownText(Generic[Piece]):
    """A piece of a reply that may be shown."""

    text: Piece
    """Never empty."""

    score: float | None = None
    """The running score after it, where the policy is to annotate."""


class ReplyGate(Generic[Piece]):
    """Lets a reply through as its tokens are read."""

    def __init__(self, judge: ReplyProbe, policy: ReplyPolicy, hold: int) -> None:
        """Begin before the first token.

        Args:
            judge: Of the guard.
            policy: What happens to a flagged reply.
            hold: How many tokens have to be read beyond one until it is shown.
        """
        self._judge = judge
        self._policy = policy
        self._hold = hold
        self._running = RunningScore()
        self._scores = list[float]()
        self._held = deque[ShownText[Piece]]()
        self.is_flagged = False
        """Whether a running score was above the threshold."""

        self._is_undefined = False
        """Whether one is not finite; there is no verdict then."""

    @property
    def must_end(self) -> bool:
        """Whether the reply ends here: it is flagged, or nobody knows whether it is."""
        if self._policy == "shadow":
            return False
        return self._is_undefined or (self.is_flagged and self._policy != "annotate")

    def push(self, text: Piece, score: float) -> list[ShownText[Piece]]:
        """Add a token that was read; returns what may be shown now.

        Args:
            text: What it adds to the reply; often empty.
            score: Of its states, the bias of the probe not yet added.
        """
        running = self._running.push(score + self._judge.probe.bias)
        self._scores.append(running)
        self.is_flagged |= not running <= self._judge.threshold
        self._is_undefined |= not np.isfinite(running)
        self._held.append(ShownText(text, running if self._policy == "annotate" else None))
        if self.must_end or self._policy == "block":
            return []
        return self._release(0 if self._policy == "shadow" else self._hold)

    def finish(self, text: Piece) -> list[ShownText[Piece]]:
        """The reply is over: what is left of it and may be shown.

        Args:
            text: What the last token left to be shown.
        """
        if self.must_end:
            return []
        self._held.append(ShownText(text))
        return self._release(0)

    def verdict(self, id: str = "") -> ReplyVerdict | None:
        """On what was read; None if that is nothing.

        Raises:
            GuardError: if a score is not finite; a shadow has no verdict then.
        """
        if not self._scores or (self._policy == "shadow" and not np.isfinite(self._scores).all()):
            return None
        return self._judge.decide(id, np.array(self._scores))

    def _release(self, hold: int) -> list[ShownText[Piece]]:
        pieces = list[ShownText[Piece]]()
        while len(self._held) > hold:
            pieces.append(self._held.popleft())
        return [piece for piece in pieces if len(piece.text)]


def most_severe(verdicts: Iterable[ReplyVerdict]) -> ReplyVerdict | None:
    """The verdict that an answer with several replies names; None if there is none."""
    return max(verdicts, key=lambda one: (one.flagged, one.score), default=None)


def reply_action(policy: ReplyPolicy, verdict: ReplyVerdict) -> ReplyAction:
    """What the policy makes of a reply."""
    return policy if verdict.flagged else "pass"
