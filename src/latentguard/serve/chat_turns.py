"""Chats that wait, and those that are answered, a token each in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from latentguard.serve.guarded_chat import GuardedChat

STEP_TOKENS = 16
"""What a token of a reply counts for: a pass over it takes about as long as over so many."""


class ChatTurns:
    """All chats of the scoring thread; whoever calls holds its lock, but for ``step_each``."""

    def __init__(self, most: int) -> None:
        """Begin without chats.

        Args:
            most: Chats that are answered at the same time.
        """
        self._most = most
        self.waiting = list[GuardedChat]()
        """Those that wait, the first longest."""

        self.active = list[GuardedChat]()
        """Those that are answered."""

        self._stepping = list[GuardedChat]()
        """Those that take a step now: several if the prompt of one is read in segments."""

    def __bool__(self) -> bool:
        return bool(self.active or self.waiting)

    @property
    def has_room(self) -> bool:
        """Whether a chat that comes now is begun at once."""
        return len(self.active) + len(self.waiting) < self._most

    def drop_cancelled(self) -> None:
        """Forget those that wait and that nobody listens to any more."""
        self.waiting = [chat for chat in self.waiting if not chat.cancelled]

    def begin_waiting(self) -> None:
        """Begin those that have waited longest, of the accounts with the fewest answered."""
        while self.waiting and len(self.active) < self._most:
            active = Counter(chat.account for chat in self.active)
            chat = min(self.waiting, key=lambda one: active[one.account])
            self.waiting.remove(chat)
            self.active.append(chat)

    def step_each(self, step: Callable[[GuardedChat], bool]) -> None:
        """Let each chat take a step; one that does not go on is over.

        A step may call this again, while the prompt of its chat is read.
        """
        for chat in [*self.active]:
            if chat in self._stepping or chat not in self.active:
                continue  # its prompt is being read, or it ended while another's was
            self._stepping.append(chat)
            goes_on = step(chat)
            self._stepping.remove(chat)
            if not goes_on:
                self.active.remove(chat)

    def clear(self) -> list[GuardedChat]:
        """All of them; none waits any more."""
        chats = [*self.waiting, *self.active]
        self.waiting.clear()
        return chats
