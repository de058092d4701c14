"""Connections: how many there may be in all and from one address, and file descriptors for them."""

from __future__ import annotations

import resource
from collections import Counter

from latentguard.errors import LatentGuardError

SPARE_FILES = 128
"""File descriptors beside those of connections: the model, logs, the event loop, health."""


class Connections:
    """Counts open connections by address."""

    def __init__(self, limit: int, per_address: int) -> None:
        """Prepare.

        Args:
            limit: Connections in all.
            per_address: Connections from one address.
        """
        self._limit, self._per_address = limit, per_address
        self._open = Counter[str]()

    def open(self, address: str) -> bool:
        """Count a connection; whether it may stay. Each has to be closed, whatever the answer."""
        self._open[address] += 1
        few = self._open.total() <= self._limit
        return few and self._open[address] <= self._per_address

    def close(self, address: str) -> None:
        """Forget a connection."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def require_file_descriptors(connections: int, *, has_upstream: bool) -> None:
    """Raise the limit of open files, if it is too low for the connections.

    Raises:
        LatentGuardError: if it may not be raised so far.
    """
    descriptors = connections * (2 if has_upstream else 1) + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= descriptors:
        return
    if hard < descriptors:
        raise LatentGuardError(
            f"{connections:,} connections need {descriptors:,} open files; this process may have "
            f"{hard:,}. Raise the limit (ulimit -n, LimitNOFILE) or lower --max-connections."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
