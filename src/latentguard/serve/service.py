"""One running service: what its endpoints share, and how a verdict becomes an action."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Literal

from starlette.requests import Request

from latentguard.prompts import Prompt
from latentguard.serve.audit_log import AuditLog
from latentguard.serve.config import ServeConfig
from latentguard.serve.disconnects import run_while_connected
from latentguard.serve.drift import DriftReference
from latentguard.serve.engine import ScoringEngine
from latentguard.serve.errors import ApiError, ClientDisconnected, Unavailable
from latentguard.serve.keys import ApiKeys
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.telemetry import Telemetry

Action = Literal[
    "score", "pass", "review", "block", "annotate", "shadow", "error", "unjudged", "left"
]
"""What was done: the verdict told; a chat answered; answered, though it is to be reviewed; what the
policy says of a flagged one; no verdict, so refused; no verdict, and answered all the same; no
verdict, as the client left before."""


@dataclass(eq=False)
class Service:
    """What the endpoints share."""

    config: ServeConfig
    """Policies and limits."""

    engine: ScoringEngine
    """The thread that judges."""

    telemetry: Telemetry
    """What Prometheus sees."""

    keys: ApiKeys
    """Who may come in."""

    audit: AuditLog | None = None
    """Where verdicts are written."""

    reference: DriftReference = field(default_factory=DriftReference)
    """Known verdicts, for the page."""

    canaries: list[dict[str, Any]] = field(default_factory=list)
    """Verdicts on the guard's canaries, once the page has asked for them."""

    _digest: str = ""

    @property
    def guard_name(self) -> str:
        """Names the guard in answers, by its digest."""
        return f"latentguard-{self.digest[:12]}"

    @property
    def digest(self) -> str:
        """SHA-256 of the guard.

        Raises:
            Unavailable: until it is loaded.
        """
        if not self._digest:
            if self.engine.state not in ("ready", "draining"):
                raise Unavailable("The guard is not ready.")
            self._digest = self.engine.guard.digest
        return self._digest

    def action(self, scored: ScoredPrompt) -> Action:
        """What the policy makes of a chat."""
        if scored.verdict.flagged:
            return self.config.policy
        if scored.verdict.decision == "review":
            return "block" if self.config.on_review == "block" else "review"
        return "pass"

    def answers_without_verdict(self, fault: ApiError) -> bool:
        """Whether a chat is answered though it could not be judged.

        ``on_error=allow`` forgives what the service did, never what a client can bring about:
        an unreadable prompt, or a full queue. A shadow never stands in the way.
        """
        if self.config.policy == "shadow":
            return not isinstance(fault, ClientDisconnected)
        return self.config.on_error == "allow" and isinstance(fault, Unavailable)


class RequestContext:
    """One request, from its arrival to its line in the audit log."""

    def __init__(self, service: Service, request: Request, endpoint: str) -> None:
        """Begin."""
        self.service, self.endpoint, self.began = service, endpoint, perf_counter()
        self._request = request
        self.id: str = request.state.request
        self.client: str = request.state.client
        header = service.config.segment_header
        self.segment = (request.headers.get(header) or None) if header else None

    def with_segment(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts in the segment that the request names."""
        return [replace(prompt, segment=self.segment) for prompt in prompts]

    async def score(self, prompts: Sequence[Prompt]) -> list[ScoredPrompt]:
        """Judge prompts; a fault is noted, then raised."""
        try:
            return await run_while_connected(self.service.engine.score(prompts), self._request)
        except ApiError as fault:
            forgiven = self.endpoint == "chat" and self.service.answers_without_verdict(fault)
            await self.record_failure(prompts, fault, answered=forgiven)
            raise

    async def record_failure(
        self, prompts: Sequence[Prompt], fault: ApiError, *, answered: bool
    ) -> None:
        """Note that there is no verdict, and whether the chat is answered all the same."""
        lack: Action = "unjudged" if answered else "error"
        action: Action = "left" if isinstance(fault, ClientDisconnected) else lack
        for _ in prompts:
            self.service.telemetry.verdict(self.endpoint, action)
        await self._write([self._line(p, action) | {"error": fault.code} for p in prompts])

    async def record_verdicts(
        self, prompts: Sequence[Prompt], found: Sequence[ScoredPrompt], actions: Sequence[Action]
    ) -> None:
        """Note verdicts, before anybody sees them.

        Raises:
            AuditUnavailable: if the audit log cannot be written.
        """
        verdicts = [scored.verdict for scored in found]
        lines = [
            self._line(prompt, action)
            | dict(score=verdict.score, probability=verdict.probability)
            | dict(flagged=verdict.flagged, decision=verdict.decision, beliefs=verdict.beliefs)
            | dict(obfuscations=verdict.obfuscations)
            for prompt, verdict, action in zip(prompts, verdicts, actions, strict=True)
        ]
        await self._write(lines)
        for verdict, action in zip(verdicts, actions, strict=True):
            self.service.telemetry.verdict(self.endpoint, action, verdict)

    def _line(self, prompt: Prompt, action: Action) -> dict[str, Any]:
        audit = self.service.audit
        if audit is None:
            return {}
        ready = self.service.engine.state in ("ready", "draining")
        line = dict(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            request=self.id,
            client=self.client,
            endpoint=self.endpoint,
            guard=self.service.digest[:12] if ready else None,
            prompt=audit.digest(prompt),
            action=action,
            ms=round(1000 * (perf_counter() - self.began), 2),
        )
        if self.service.config.segment_header:
            line["segment"] = prompt.segment
        if audit.texts:
            line["text"] = prompt.text
        return line

    async def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        audit = self.service.audit
        if audit is None:
            return
        try:
            if audit.fsync == "always":  # a disk may take its time; the others need not wait
                await asyncio.to_thread(audit.write, lines)
            else:
                audit.write(lines)
        except ApiError as fault:
            config = self.service.config
            shadow = self.endpoint == "chat" and config.policy == "shadow"
            if config.on_error == "block" and not shadow:
                raise fault from None
