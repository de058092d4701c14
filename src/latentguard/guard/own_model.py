"""The model of a guard: given, or loaded and verified when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from latentguard.states import Backend, Fingerprint


class OwnModel:
    """Holds a guard's model; what is pickled or copied to another process is where to load it."""

    def __init__(
        self,
        backend: Backend | None = None,
        *,
        source: str | None = None,
        device: str | None = None,
    ) -> None:
        """Hold a model, or where it is.

        Args:
            backend: The model, verified already.
            source: Where to load it from; by default what the guard's fingerprint names.
            device: Where to load it to.
        """
        self._backend = backend
        self._source = source
        self._device = device

    def get(self, fingerprint: Fingerprint, verify: Callable[[Backend], None]) -> Backend:
        """The model; loaded and verified the first time.

        Raises:
            ModelError: if it cannot be loaded, or is not the guard's own.
        """
        if self._backend is None:
            backend = self.load(fingerprint)
            verify(backend)
            self._backend = backend
        return self._backend

    def load(self, fingerprint: Fingerprint) -> Backend:
        """Load the model, not verified."""
        from latentguard.models.chat_model import ChatModel

        source = self._source or fingerprint.model
        return ChatModel.load(source, dtype=fingerprint.dtype, device=self._device)

    def __getstate__(self) -> dict[str, Any]:
        return {"_backend": None, "_source": self._source, "_device": self._device}
