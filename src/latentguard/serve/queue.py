"""What waits for the scoring thread, shared fairly between accounts by tokens.

An account is an API key, or an address where there are no keys. Each has a queue of its own and a
count of the tokens that were read for it; the next batch begins with the oldest prompt of the
account that has been served least. One that was idle starts level with the others, so that it
neither saves up nor loses time. While a long prompt is read, prompts of accounts that were served
less go before the rest of it. If the queue is full, the account with the most prompts in it makes
room for one with fewer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.models.segments import Segments
from latentguard.prompts import Prompt
from latentguard.serve.errors import QueueFull
from latentguard.serve.served_guards import ServedGuard

Work = Callable[[LatentGuard, ChatModel, Segments | None], Any]
"""Something to do on the thread."""

FULL = "Too many prompts are waiting; try again in a second."


@dataclass(eq=False)
class WorkItem:
    """A prompt that is scored together with others, or work that is done alone."""

    future: asyncio.Future[Any]
    """Who waits."""

    prompt: Prompt | None = None
    """What is scored, or else"""

    work: Work | None = None
    """what is done."""

    size: int = 0
    """About how many tokens."""

    account: str = ""
    """Whose it is."""

    served: ServedGuard | None = None
    """What judges it; None for the default guard at that time."""

    request: object = None
    """What it is a part of; a request is given up as a whole."""

    arrived: float = field(default_factory=monotonic)
    """When."""


@dataclass(eq=False)
class _Account:
    name: str
    served: float
    """Tokens that were read for it, on the clock of the queue."""

    items: deque[WorkItem] = field(default_factory=deque)


class FairQueue:
    """Items by account; whoever calls holds the lock."""

    def __init__(self, limit: int) -> None:
        """Make an empty queue.

        Args:
            limit: Items that may wait.
        """
        self._limit = limit
        self._accounts = dict[str, _Account]()
        """Those that wait for something."""

        self._behind = dict[str, float]()
        """Tokens served to those that wait for nothing, where that is more than the clock."""

        self._clock = 0.0
        """The tokens served to the account whose turn came last."""

    def __len__(self) -> int:
        return sum(len(account.items) for account in self._accounts.values())

    def __iter__(self) -> Any:
        return iter([item for account in self._accounts.values() for item in account.items])

    @property
    def tokens(self) -> int:
        """About how many tokens wait."""
        return sum(item.size for item in self)

    @property
    def next_item(self) -> WorkItem | None:
        """The item that the next batch begins with."""
        account = self._least_served()
        return account.items[0] if account else None

    def add(self, items: Sequence[WorkItem], *, others: int = 0) -> list[WorkItem]:
        """Let items of one account wait; what had to make room for them is given back.

        Args:
            items: Of one request.
            others: How many places of the queue are taken by something else.

        Raises:
            QueueFull: if no other account has more items waiting.
        """
        self.drop_abandoned()
        if not items:
            return []
        name = items[0].account
        evicted = self._make_room(name, len(items), others)
        self._account(name).items.extend(items)
        return evicted

    def _make_room(self, name: str, count: int, others: int) -> list[WorkItem]:
        own = len(self._accounts[name].items) if name in self._accounts else 0
        missing = len(self) + count + others - self._limit
        evicted = list[WorkItem]()
        while missing > len(evicted):
            largest = max(self._accounts.values(), key=lambda a: len(a.items), default=None)
            if largest is None or largest.name == name or len(largest.items) <= own + count:
                self._put_back(evicted)
                raise QueueFull(FULL)
            evicted += self._evict(largest)
        return evicted

    def _evict(self, account: _Account) -> list[WorkItem]:
        """Take out the request that came last."""
        last = account.items[-1].request
        items = [
            i for i in account.items if i is account.items[-1] or i.request is last is not None
        ]
        self._remove(items)
        return items

    def _put_back(self, items: Iterable[WorkItem]) -> None:
        for item in items:
            self._account(item.account).items.append(item)

    def take(
        self, budget: int, *, max_size: int | None = None, before: str | None = None
    ) -> list[WorkItem]:
        """The next batch: work that is done alone, or prompts that fit together.

        Args:
            budget: Tokens of a batch, its prompts padded to the longest; the first always fits.
            max_size: Tokens of the longest prompt.
            before: Only of accounts that were served less than this one, which is being served.
        """
        self.drop_abandoned()
        first = self._least_served(max_size)
        if first is None or (before is not None and first.served >= self._served(before)):
            return []
        self._clock = max(self._clock, first.served)
        item = next(one for one in first.items if max_size is None or one.size <= max_size)
        batch = [item]
        self._charge(first, item)
        longest = item.size
        while item.prompt is not None:
            largest = budget // (len(batch) + 1)
            following = self._nearest(longest, min(largest, max_size or largest), before)
            if following is None:
                break
            longest = max(longest, following.size)
            batch.append(following)
            self._charge(self._accounts[following.account], following)
        return batch

    def charge(self, name: str, tokens: int) -> None:
        """Count tokens that were read for an account outside of the queue."""
        least = self._least_served()
        if least is None or self._served(name) <= least.served:
            self._clock = self._served(name)  # its turn: it owes nothing to those who come later
        if name in self._accounts:
            self._accounts[name].served += tokens
        else:
            self._behind[name] = self._served(name) + tokens

    def _served(self, name: str) -> float:
        """The tokens that an account counts as served with, whether it waits or not."""
        if name in self._accounts:
            return self._accounts[name].served
        return max(self._behind.get(name, 0.0), self._clock)

    def _nearest(self, longest: int, largest: int, before: str | None) -> WorkItem | None:
        """The next prompt of a batch: of the account that was served least, nearest in length.

        Like lengths waste little on padding.
        """
        if longest > largest:
            return None
        for account in sorted(self._accounts.values(), key=lambda one: one.served):
            if before is not None and account.served >= self._served(before):
                return None
            fitting = [i for i in account.items if i.prompt is not None and i.size <= largest]
            if fitting:
                return min(fitting, key=lambda item: abs(item.size - longest))
        return None

    def drop_abandoned(self) -> None:
        """Forget what nobody waits for any more."""
        self._remove([item for item in self if item.future.done()])

    def clear(self) -> list[WorkItem]:
        """Take everything out."""
        items = list(self)
        self._accounts.clear()
        return items

    def _least_served(self, max_size: int | None = None) -> _Account | None:
        candidates = [
            account
            for account in self._accounts.values()
            if max_size is None or any(item.size <= max_size for item in account.items)
        ]
        return min(candidates, key=lambda account: account.served, default=None)

    def _charge(self, account: _Account, item: WorkItem) -> None:
        account.served += max(item.size, 1)
        self._remove([item])

    def _account(self, name: str) -> _Account:
        """An account, level with the others at the least."""
        if name not in self._accounts:
            self._behind = {n: s for n, s in self._behind.items() if s > self._clock}
            self._accounts[name] = _Account(name, self._behind.pop(name, self._clock))
        return self._accounts[name]

    def _remove(self, items: Sequence[WorkItem]) -> None:
        removed_ids = set(map(id, items))
        for name in {item.account for item in items}:
            account = self._accounts[name]
            account.items = deque(item for item in account.items if id(item) not in removed_ids)
            if not account.items:
                self._behind[name] = account.served
                del self._accounts[name]


def settle(pairs: Iterable[tuple[WorkItem, Any]]) -> None:
    """Give each item what was found, on the event loop; an exception is raised there."""
    for item, result in pairs:
        if item.future.done():  # given up meanwhile
            continue
        if isinstance(result, Exception):
            item.future.set_exception(result)
        else:
            item.future.set_result(result)


def estimated_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt has: a quarter of its bytes, and some for the template."""
    turns = 1 + len(prompt.history)
    return size_in_bytes(prompt) // 4 + 8 * turns + 24


def size_in_bytes(prompt: Prompt) -> int:
    """Of all that is said, in UTF-8."""
    texts = [prompt.text, *(turn.content for turn in prompt.history)]
    return sum(len(text.encode("utf-8", "replace")) for text in texts)
