"""Guards and keys change while requests go on: read anew, or a shadow guard promoted.

All are replaced, or none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from latentguard.errors import LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.serve.drift import DriftReference
from latentguard.serve.errors import ApiError, NotSwapped, ReloadFailed
from latentguard.serve.keys import ApiKeys
from latentguard.serve.served_guards import Binder, ServedGuard, ServedGuards, verified
from latentguard.serve.service import Service
from latentguard.serve.shadow import attempt

log = logging.getLogger("latentguard.serve")

NO_SHADOW = "There is no shadow guard; start the service with --shadow GUARD."


@dataclass(frozen=True)
class ServedFiles:
    """What a service reads from files, and can read anew."""

    guard: LatentGuard
    """Judges what names no other guard."""

    named_guards: Mapping[str, LatentGuard] = field(default_factory=dict)
    """Other guards of the same model."""

    shadow: LatentGuard | None = None
    """Judges what the first judges, and decides nothing until it is promoted."""

    keys: ApiKeys = field(default_factory=ApiKeys)
    """Who may come in."""

    upstream_key: str | None = None
    """What the upstream is shown."""

    reference: DriftReference = field(default_factory=DriftReference)
    """What scores are compared with."""

    @property
    def all_guards(self) -> list[LatentGuard]:
        """Each guard that judges, or may come to."""
        return [
            self.guard,
            *self.named_guards.values(),
            *([] if self.shadow is None else [self.shadow]),
        ]


class Reloader:
    """Replaces the guards and the keys of a running service, and swaps guard and shadow."""

    def __init__(
        self, service: Service, read: Callable[[], ServedFiles], bind: Binder = verified
    ) -> None:
        """Prepare.

        Args:
            service: The service.
            read: Reads everything anew; runs on a thread of its own.
            bind: Lets a guard meet the model.
        """
        self._service = service
        self._read, self._bind = read, bind
        self._reference = service.reference
        """Of the guard that decides at the start."""

        self._lock = asyncio.Lock()
        self.renew_certificate: Callable[[], None] | None = None
        """Reads the certificate anew, or raises an OSError and leaves it; None without one."""

    async def reload(self) -> None:
        """Read anew, let the guards meet the model, then replace all at once.

        Requests that are under way keep their guard.

        Raises:
            ReloadFailed: if anything is not as it should be; says why. All is then as before.
        """
        async with self._lock:
            try:
                await self._replace()
            except (LatentGuardError, ApiError, OSError) as error:
                self._service.telemetry.reloads.labels("failed").inc()
                log.error("Guards and keys stay as they were: %s", error)
                raise ReloadFailed(f"Guards and keys stay as they were: {error}") from None
        self._service.telemetry.reloads.labels("done").inc()
        log.warning("Guards and keys were read anew: %s.", self._service.guards.names)

    async def _replace(self) -> None:
        """First all that can fail, then what cannot."""
        service = self._service
        files = await asyncio.to_thread(self._read)
        guards = await service.engine.meet_guards(partial(self._meet, files))
        if self.renew_certificate is not None:
            self.renew_certificate()
        is_promoted = service.guards.is_promoted
        service.engine.guards = guards.with_swapped_roles() if is_promoted else guards
        service.keys.replace(files.keys)
        self._use_reference(files.reference)
        if service.use_upstream_key is not None:
            service.use_upstream_key(files.upstream_key)

    def _meet(self, files: ServedFiles, model: ChatModel) -> ServedGuards:
        config = self._service.config
        return ServedGuards.meet(
            self._bind(files.guard, model),
            model,
            named_guards=files.named_guards,
            bind=self._bind,
            shadow=files.shadow,
            sources=(config.guard, config.shadow),
        )

    def _use_reference(self, reference: DriftReference) -> None:
        """Compare scores with those of the guard that decides.

        Args:
            reference: Of the guard that decides at the start.
        """
        self._reference = reference
        guards = self._service.guards
        if guards.is_promoted:
            reference = DriftReference.of(guards.default.guard, None)
        self._service.use_reference(reference)

    async def promote(self) -> ServedGuard:
        """Let the shadow guard decide, and the guard that decided be its shadow.

        Requests that are under way end with the guard that they began with.

        Returns:
            The guard that decides now.

        Raises:
            NotSwapped: if there is no shadow guard, it decides already, or it fails on the model.
        """
        return await self._swap(promote=True)

    async def rollback(self) -> ServedGuard:
        """Let the guard decide that decided at the start; as ``promote``.

        Raises:
            NotSwapped: if it decides already.
        """
        return await self._swap(promote=False)

    def describe_shadow(self) -> dict[str, Any]:
        """Which guard decides, its shadow, and how often they disagreed on which requests.

        Raises:
            NotSwapped: if there is no shadow guard.
        """
        guards = self._service.guards
        decides = guards.default
        if decides.shadow is None:
            raise NotSwapped(NO_SHADOW)
        return dict(
            decides=decides.to_dict(),
            shadow=decides.shadow.to_dict(),
            is_promoted=guards.is_promoted,
            passes=1 if decides.shares_pass else 2,
            **decides.comparison.to_dict(),
            recent=list(decides.comparison.recent),
        )

    async def _swap(self, *, promote: bool) -> ServedGuard:
        async with self._lock:
            guards = self._service.guards
            if guards.other_roles is None:
                raise NotSwapped(NO_SHADOW)
            if guards.is_promoted == promote:
                what = "decides already" if promote else "was not promoted"
                raise NotSwapped(f"The guard of --shadow {what}; nothing was changed.")
            if promote:
                await self._require_sound(guards.other_roles)
            self._service.engine.guards = guards.with_swapped_roles()
            self._use_reference(self._reference)
            decides = self._service.guards.default
            log.warning("From now on the guard %s (%s) decides.", decides.folder, decides.digest)
            return decides

    async def _require_sound(self, served: ServedGuard) -> None:
        """Raise ``NotSwapped`` unless a guard scores its canaries as it should."""

        def check(_: LatentGuard, model: ChatModel, __: object) -> bool:
            def verify() -> bool:
                served.guard.verify_model(model)
                return True

            return attempt(verify) is not None

        engine = self._service.engine
        if not await engine.run_alone(Prompt("-"), check, seconds=engine.config.stall):
            raise NotSwapped("The shadow guard fails on its canaries; the log says where.")
