"""Reading guards and keys anew while requests go on: all are replaced, or none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from latentguard.errors import LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.serve.drift import DriftReference
from latentguard.serve.errors import ApiError, ReloadFailed
from latentguard.serve.keys import ApiKeys
from latentguard.serve.service import Service

log = logging.getLogger("latentguard.serve")


@dataclass(frozen=True)
class ServedFiles:
    """What a service reads from files, and can read anew."""

    guard: LatentGuard
    """Judges what names no other guard."""

    named_guards: Mapping[str, LatentGuard] = field(default_factory=dict)
    """Other guards of the same model."""

    keys: ApiKeys = field(default_factory=ApiKeys)
    """Who may come in."""

    upstream_key: str | None = None
    """What the upstream is shown."""

    reference: DriftReference = field(default_factory=DriftReference)
    """What scores are compared with."""


class Reloader:
    """Replaces the guards and the keys of a running service."""

    def __init__(self, service: Service, read: Callable[[], ServedFiles]) -> None:
        """Prepare.

        Args:
            service: The service.
            read: Reads everything anew; runs on a thread of its own.
        """
        self._service = service
        self._read = read
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
        names = ", ".join(f"{one.name} {one.digest[:12]}" for one in self._service.guards)
        log.warning("Guards and keys were read anew: %s.", names)

    async def _replace(self) -> None:
        """First all that can fail, then what cannot."""
        service = self._service
        files = await asyncio.to_thread(self._read)
        guards = await service.engine.meet_guards(files.guard, files.named_guards)
        if self.renew_certificate is not None:
            self.renew_certificate()
        service.engine.guards = guards
        service.keys.replace(files.keys)
        service.use_reference(files.reference)
        if service.use_upstream_key is not None:
            service.use_upstream_key(files.upstream_key)
