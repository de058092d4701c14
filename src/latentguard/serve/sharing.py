"""How many tokens are read at once, so that one account does not keep another waiting."""

from __future__ import annotations

from time import monotonic

from latentguard.models.chat_model import ChatModel
from latentguard.serve.config import ServeConfig

SHARED_TOKENS = {"cpu": 64, "cuda": 4096}
"""Tokens of a unit while several accounts share the model: about a short prompt, so that one waits
no longer than its own reading takes."""

ALONE_TOKENS = {"cpu": 512, "cuda": 4096}
"""The same while there is one account: half a second on a slow machine for whoever comes then."""

OTHER_DEVICE = 4096
"""The same on any other device."""

SHARED_SECONDS = 60.0
"""So long after its last request an account still counts as sharing the model."""

MOST_INTERRUPTED = 3
"""Long prompts that wait, each for the next; every one of them keeps its cache of what was read."""


class Abandoned(Exception):
    """Nobody waits any more for what is being read."""


class Sharing:
    """Knows whether several accounts share the model; whoever calls ``note`` holds the lock."""

    def __init__(self, config: ServeConfig) -> None:
        """Begin without accounts."""
        self._config = config
        self._newest = ("", -SHARED_SECONDS)
        self._second_newest = self._newest

    def note(self, account: str) -> None:
        """Note that an account asks for something."""
        if self._newest[0] != account:
            self._second_newest = self._newest
        self._newest = (account, monotonic())

    @property
    def is_shared(self) -> bool:
        """Whether several accounts have asked for something lately."""
        return self._second_newest[1] > monotonic() - SHARED_SECONDS

    def unit_tokens(self, model: ChatModel) -> int:
        """Tokens after which others have their turn."""
        tokens = SHARED_TOKENS if self.is_shared else ALONE_TOKENS
        return self._config.segment_tokens or tokens.get(model.device.type, OTHER_DEVICE)

    def batch_tokens(self, model: ChatModel) -> int:
        """Tokens of a batch: no more than a unit while several accounts share the model."""
        whole = self._config.batch_tokens or model.tokens_per_batch
        return min(whole, self.unit_tokens(model)) if self.is_shared else whole
