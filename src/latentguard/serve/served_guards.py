"""The guards of a service: one by default, others by name, all of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.serve.chat_thresholds import ChatThresholds

DEFAULT_NAME = "default"
"""Names the guard that judges what names no other."""

Binder = Callable[[LatentGuard, ChatModel], LatentGuard]
"""Lets a guard meet a model; raises a LatentGuardError if it is not its own."""


def verified(guard: LatentGuard, model: ChatModel) -> LatentGuard:
    """A guard that has met its own model.

    Raises:
        ModelMismatch: if it is another.
    """
    guard.verify_model(model)
    return guard


@dataclass(frozen=True, eq=False)
class ServedGuard:
    """One guard, and what is made once of it; a request keeps it to its end."""

    guard: LatentGuard
    """The guard, met with its model."""

    name: str = DEFAULT_NAME
    """By which requests name it."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the guard."""
        return self.guard.digest

    @cached_property
    def chat_thresholds(self) -> ChatThresholds:
        """What chats are compared with."""
        return ChatThresholds(self.guard)

    @property
    def label(self) -> str:
        """Names the guard in answers, by its digest."""
        return f"latentguard-{self.digest[:12]}"


@dataclass(frozen=True, eq=False)
class ServedGuards:
    """All of them; replaced as a whole."""

    default: ServedGuard
    """Judges what names no other guard."""

    named_guards: Mapping[str, ServedGuard] = field(default_factory=dict)
    """The others."""

    @staticmethod
    def meet(
        default: LatentGuard,
        named_guards: Mapping[str, LatentGuard],
        model: ChatModel,
        bind: Binder,
    ) -> ServedGuards:
        """Guards as they are served.

        Args:
            default: Has met the model.
            named_guards: Still have to meet it.
            model: The model.
            bind: Lets a guard meet it.

        Raises:
            LatentGuardError: if one is of another model, or has no thresholds for chats.
        """
        others = {
            name: ServedGuard(bind(guard, model), name) for name, guard in named_guards.items()
        }
        served = ServedGuards(ServedGuard(default), others)
        for one in served:
            _ = one.chat_thresholds  # now, and not at the first chat
        return served

    def __iter__(self) -> Iterator[ServedGuard]:
        yield self.default
        yield from self.named_guards.values()

    def find(self, name: str | None) -> ServedGuard:
        """The guard of a name; the default one if there is none of it."""
        return self.named_guards.get(name or "", self.default)
