"""The guards of a service: one by default, others by name, all of one model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from latentguard.errors import GuardError, LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.serve.chat_thresholds import ChatThresholds
from latentguard.serve.shadow import Comparison, reads_the_same

log = logging.getLogger("latentguard.serve")

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

    folder: str | None = None
    """The name of the folder that it was read from; None if that is not known."""

    shadow: ServedGuard | None = None
    """Judges the same prompts and decides nothing; None without one."""

    comparison: Comparison = field(default_factory=Comparison)
    """What it and its shadow decided."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the guard."""
        return self.guard.digest

    @cached_property
    def cache_key(self) -> str:
        """Names the guard and its shadow among scores that are kept."""
        return f"{self.digest} {self.shadow.digest if self.shadow else ''}"

    @cached_property
    def shares_pass(self) -> bool:
        """Whether the shadow, if there is one, is scored from the pass of the guard."""
        return self.shadow is None or reads_the_same(self.guard, self.shadow.guard)

    @cached_property
    def chat_thresholds(self) -> ChatThresholds:
        """What chats are compared with."""
        return ChatThresholds(self.guard)

    @property
    def label(self) -> str:
        """Names the guard in answers, by its digest."""
        return f"latentguard-{self.digest[:12]}"

    def to_dict(self) -> dict[str, Any]:
        """What names the guard in the audit log and for operators."""
        return dict(guard=self.digest[:12], folder=self.folder)


@dataclass(frozen=True, eq=False)
class ServedGuards:
    """All of them; replaced as a whole."""

    default: ServedGuard
    """Judges what names no other guard."""

    named_guards: Mapping[str, ServedGuard] = field(default_factory=dict)
    """The others."""

    other_roles: ServedGuard | None = None
    """The default guard and its shadow with their roles swapped; None without a shadow."""

    is_promoted: bool = False
    """Whether the guard of ``--shadow`` decides."""

    @staticmethod
    def meet(
        default: LatentGuard,
        model: ChatModel,
        *,
        named_guards: Mapping[str, LatentGuard] | None = None,
        bind: Binder = verified,
        shadow: LatentGuard | None = None,
        sources: tuple[str | None, str | None] = (None, None),
    ) -> ServedGuards:
        """Guards as they are served.

        Args:
            default: Has met the model.
            model: The model.
            named_guards: Still have to meet it.
            bind: Lets a guard meet it.
            shadow: Judges what the default one judges; still has to meet the model.
            sources: Where the default guard and its shadow were read from.

        Raises:
            LatentGuardError: if one is of another model, or has no thresholds for chats.
        """
        others = {
            name: ServedGuard(bind(guard, model), name)
            for name, guard in (named_guards or {}).items()
        }
        served = ServedGuards(ServedGuard(default, folder=_folder(sources[0])), others)
        for one in served:
            _ = one.chat_thresholds  # now, and not at the first chat
        if shadow is None:
            return served
        try:
            beside = ServedGuard(bind(shadow, model), folder=_folder(sources[1]))
            _ = beside.chat_thresholds
        except LatentGuardError as error:
            raise GuardError(f"The shadow guard cannot be used: {error}") from None
        _warn(default, beside.guard)
        decides = replace(served.default, shadow=beside)
        return replace(served, default=decides, other_roles=replace(beside, shadow=served.default))

    def with_swapped_roles(self) -> ServedGuards:
        """The same guards; the shadow decides, and the guard that decided is its shadow."""
        if self.other_roles is None:
            return self
        return replace(
            self,
            default=self.other_roles,
            other_roles=self.default,
            is_promoted=not self.is_promoted,
        )

    @property
    def names(self) -> str:
        """Each guard with the start of its digest, for the log."""
        served = [(one.name, one) for one in self]
        if self.default.shadow is not None:
            served.append(("shadow", self.default.shadow))
        return ", ".join(f"{name} {one.digest[:12]}" for name, one in served)

    def __iter__(self) -> Iterator[ServedGuard]:
        yield self.default
        yield from self.named_guards.values()

    def find(self, name: str | None) -> ServedGuard:
        """The guard of a name; the default one if there is none of it."""
        return self.named_guards.get(name or "", self.default)


def _folder(source: str | None) -> str | None:
    return Path(source).absolute().name if source else None


def _warn(guard: LatentGuard, shadow: LatentGuard) -> None:
    """Say what a shadow costs, and what would not be judged if it decided."""
    if not reads_the_same(guard, shadow):
        log.warning(
            "The shadow guard reads other positions, layers, queries or chunks than the guard, so "
            "each prompt is read twice."
        )
    if guard.replies is not None and shadow.replies is None:
        log.warning("The shadow guard judges no replies, so no reply is judged while it decides.")
