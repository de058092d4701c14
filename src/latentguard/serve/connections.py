"""Connections: how many there may be in all and from one address, and file descriptors for them.

They are counted as they are accepted, so before TLS, and until their socket is closed.
"""

from __future__ import annotations

import ipaddress
import resource
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

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


class _Accepted(socket.socket):
    """A connection that says when it is closed."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        """Close it, and say so once."""
        super().close()
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


class LimitedListener(socket.socket):
    """A listening socket that closes connections beyond the limits at once."""

    connections: Connections

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            ConnectionAbortedError: if it is one too many, which asyncio passes over.
        """
        plain, address = super().accept()
        accepted = _Accepted(fileno=plain.detach())
        name = address_group(str(address[0]))
        accepted.on_close = lambda: self.connections.close(name)
        if not self.connections.open(name):
            accepted.close()
            raise ConnectionAbortedError
        return accepted, address


def listen(host: str, port: int, connections: Connections) -> LimitedListener:
    """Take a port.

    Raises:
        LatentGuardError: if it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).split(" (")[0]  # Python says the address once more
        raise LatentGuardError(
            f"Cannot listen on {host}, port {port} ({reason}); free it, or give another."
        ) from None
    listener = LimitedListener(fileno=made.detach())
    listener.connections = connections
    return listener


def address_group(address: str) -> str:
    """What counts as one address: of IPv6 a network of 64 bits, which is one customer's."""
    if ":" not in address:
        return address
    number = ipaddress.IPv6Address(address.partition("%")[0])
    if number.ipv4_mapped is not None:
        return str(number.ipv4_mapped)
    return str(ipaddress.ip_network((number, 64), strict=False))


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
