"""What was found for a text before: a growing chat costs one new reading a turn.

Texts are kept as digests with a key of this process, those of one client apart from those of
another: no client learns from the time of an answer what somebody else has sent.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")

ENTRIES = 20_000
"""Values that are kept; the least recently used go first."""


class TextCache(Generic[T]):
    """Values by text; belongs to one thread."""

    def __init__(self, entries: int = ENTRIES) -> None:
        """Make an empty cache of at most so many values."""
        self._entries, self._key = entries, secrets.token_bytes(32)
        self._values = OrderedDict[bytes, T]()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, *texts: str) -> T | None:
        """What is kept for a client, a text and whatever else it depends on."""
        digest = self._digest(texts)
        if digest in self._values:
            self._values.move_to_end(digest)
        return self._values.get(digest)

    def put(self, value: T, *texts: str) -> None:
        """Keep a value."""
        self._values[self._digest(texts)] = value
        while len(self._values) > self._entries:
            self._values.popitem(last=False)

    def _digest(self, texts: tuple[str, ...]) -> bytes:
        digest = hashlib.blake2b(key=self._key, digest_size=32)
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8) + content)
        return digest.digest()
