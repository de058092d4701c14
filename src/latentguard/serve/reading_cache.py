"""What was read before: a growing chat costs one new reading a turn.

Only texts without a history are kept, under a digest of the client, the segment and the text, with
a key of this process. No client learns from the time of an answer what another one has sent.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict

from latentguard.prompts import Prompt
from latentguard.serve.scoring import ScoredPrompt

ENTRIES = 20_000
"""Readings that are kept; the least recently used go first."""


class ReadingCache:
    """Verdicts on texts that stood alone; belongs to the event loop."""

    def __init__(self, entries: int = ENTRIES) -> None:
        """Make an empty cache of at most so many readings."""
        self._entries, self._key = entries, secrets.token_bytes(32)
        self._kept = OrderedDict[bytes, ScoredPrompt]()
        self.hits = 0
        """Readings that were answered from the cache."""

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, client: str, prompt: Prompt) -> ScoredPrompt | None:
        """What was found for a prompt of this client."""
        if prompt.history:
            return None
        digest = self._digest(client, prompt)
        scored = self._kept.get(digest)
        if scored is not None:
            self._kept.move_to_end(digest)
            self.hits += 1
        return scored

    def put(self, client: str, prompt: Prompt, scored: ScoredPrompt) -> None:
        """Keep what was found for a prompt of this client."""
        if prompt.history:
            return
        self._kept[self._digest(client, prompt)] = scored
        while len(self._kept) > self._entries:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget everything, as when the guard changes."""
        self._kept.clear()

    def _digest(self, client: str, prompt: Prompt) -> bytes:
        digest = hashlib.blake2b(key=self._key, digest_size=32)
        for part in (client, prompt.segment or "", prompt.text):
            content = part.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8) + content)
        return digest.digest()
