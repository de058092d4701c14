"""What one client may do at once: requests under way, and requests a second.

A client is an API key, or an address where there are no keys.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from latentguard.serve.errors import QueueFull, RateLimited

ACCOUNTS = 10_000
"""Accounts whose rate is remembered; the least recently seen go first."""


class Accounts:
    """Limits of each account; belongs to the event loop."""

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

    @contextmanager
    def admit(self, account: str) -> Iterator[None]:
        """Count a request while it is under way.

        Raises:
            QueueFull: if the account has too many.
            RateLimited: if they come too fast.
        """
        if self._active[account] >= self._concurrency:
            raise QueueFull(
                f"At most {self._concurrency} requests of one client are served at once."
            )
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
        left, since = self._buckets.pop(account, (float(self._burst), now))
        left = min(left + (now - since) * rate, float(self._burst))
        allowed = left >= 1
        self._buckets[account] = (left - allowed, now)
        if len(self._buckets) > ACCOUNTS:
            self._buckets.popitem(last=False)
        if not allowed:
            seconds = math.ceil((1 - left) / rate)
            raise RateLimited(f"At most {rate:g} requests a second are served.", seconds)
