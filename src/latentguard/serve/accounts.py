"""What one client may do at once: requests under way, and requests a second.

A client is an API key, or an address where there are no keys. Limits are counted in the process, or
for several processes together (``shared_accounts``).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import monotonic
from typing import Protocol

from latentguard.serve.errors import QueueFull, RateLimited

ACCOUNTS = 10_000
"""Accounts whose rate is remembered; the least recently seen go first."""


class ClientLimits(Protocol):
    """Limits of each account; belongs to the event loop."""

    def admit(self, account: str) -> AbstractAsyncContextManager[None]:
        """Count a request while it is under way.

        Raises:
            ApiError: if the account has too many, or they come too fast.
        """

    async def require_reachable(self) -> None:
        """Check that requests can be counted.

        Raises:
            Unavailable: if not.
        """

    async def close(self) -> None:
        """Let go."""


def too_many(concurrency: int) -> QueueFull:
    """The error for an account with too many requests under way."""
    return QueueFull(f"At most {concurrency} requests of one client are served at once.")


def too_fast(rate: float, seconds: float) -> RateLimited:
    """The error for an account that asks too often, and may ask again after so many seconds."""
    return RateLimited(f"At most {rate:g} requests a second are served.", math.ceil(seconds))


class Accounts:
    """Limits of each account, counted in this process."""

    def __init__(self, *, concurrency: int, rate: float | None, burst: int) -> None:
        """Prepare.

        Args:
            concurrency: Requests of one account that may be under way.
            rate: Requests of one account in a second, in the long run; None for no limit.
            burst: Requests that may come at once after a pause.
        """
        self._concurrency, self._rate, self._burst = concurrency, rate, burst
        self._active = Counter[str]()
        self._buckets = OrderedDict[str, tuple[float, float]]()
        """Requests that are left to each account, and when that was."""

    @asynccontextmanager
    async def admit(self, account: str) -> AsyncIterator[None]:
        """See ``ClientLimits``."""
        if self._active[account] >= self._concurrency:
            raise too_many(self._concurrency)
        if self._rate is not None:
            self._draw(account, self._rate)
        self._active[account] += 1
        try:
            yield
        finally:
            self._active[account] -= 1
            if not self._active[account]:
                del self._active[account]

    def _draw(self, account: str, rate: float) -> None:
        now = monotonic()
        tokens, since = self._buckets.pop(account, (float(self._burst), now))
        tokens = min(tokens + (now - since) * rate, float(self._burst))
        allowed = tokens >= 1
        self._buckets[account] = (tokens - allowed, now)
        if len(self._buckets) > ACCOUNTS:
            self._buckets.popitem(last=False)
        if not allowed:
            raise too_fast(rate, (1 - tokens) / rate)

    async def require_reachable(self) -> None:
        """There is nothing to reach."""

    async def close(self) -> None:
        """There is nothing to let go."""
