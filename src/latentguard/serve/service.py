"""One running service: what its endpoints share, and how a judgement becomes an action."""

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
from latentguard.serve.disconnects import wanted
from latentguard.serve.drift import Reference
from latentguard.serve.engine import Scorer
from latentguard.serve.errors import Fault, Left, Unavailable
from latentguard.serve.keys import Keys
from latentguard.serve.options import Options
from latentguard.serve.scoring import Judgement
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

    options: Options
    """Policies and limits."""

    scorer: Scorer
    """The thread that judges."""

    telemetry: Telemetry
    """What Prometheus sees."""

    keys: Keys
    """Who may come in."""

    audit: AuditLog | None = None
    """Where verdicts are written."""

    reference: Reference = field(default_factory=Reference)
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
            if self.scorer.state not in ("ready", "draining"):
                raise Unavailable("The guard is not ready.")
            self._digest = self.scorer.guard.digest
        return self._digest

    def action(self, judgement: Judgement) -> Action:
        """What the policy makes of a chat."""
        if judgement.verdict.flagged:
            return self.options.policy
        if judgement.verdict.decision == "review":
            return "block" if self.options.on_review == "block" else "review"
        return "pass"

    def forgives(self, fault: Fault) -> bool:
        """Whether a chat is answered though it could not be judged.

        ``on_error=allow`` forgives what the service did, never what a client can bring about:
        an unreadable prompt, or a full queue. A shadow never stands in the way.
        """
        if self.options.policy == "shadow":
            return not isinstance(fault, Left)
        return self.options.on_error == "allow" and isinstance(fault, Unavailable)


class Case:
    """One request, from its arrival to its line in the audit log."""

    def __init__(self, service: Service, request: Request, endpoint: str) -> None:
        """Begin."""
        self.service, self.endpoint, self.began = service, endpoint, perf_counter()
        self._request = request
        self.id: str = request.state.request
        self.client: str = request.state.client
        header = service.options.segment_header
        self.segment = (request.headers.get(header) or None) if header else None

    def placed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts in the segment that the request names."""
        return [replace(prompt, segment=self.segment) for prompt in prompts]

    async def judge(self, prompts: Sequence[Prompt]) -> list[Judgement]:
        """Judge prompts; a fault is noted, then raised."""
        try:
            return await wanted(self.service.scorer.judge(prompts), self._request)
        except Fault as fault:
            forgiven = self.endpoint == "chat" and self.service.forgives(fault)
            await self.failed(prompts, fault, answered=forgiven)
            raise

    async def failed(self, prompts: Sequence[Prompt], fault: Fault, *, answered: bool) -> None:
        """Note that there is no verdict, and whether the chat is answered all the same."""
        lack: Action = "unjudged" if answered else "error"
        action: Action = "left" if isinstance(fault, Left) else lack
        for _ in prompts:
            self.service.telemetry.verdict(self.endpoint, action)
        await self._write([self._line(p, action) | {"error": fault.code} for p in prompts])

    async def decided(
        self, prompts: Sequence[Prompt], found: Sequence[Judgement], actions: Sequence[Action]
    ) -> None:
        """Note verdicts, before anybody sees them.

        Raises:
            Unlogged: if the audit log cannot be written.
        """
        verdicts = [judgement.verdict for judgement in found]
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
        ready = self.service.scorer.state in ("ready", "draining")
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
        if self.service.options.segment_header:
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
        except Fault as fault:
            options = self.service.options
            shadow = self.endpoint == "chat" and options.policy == "shadow"
            if options.on_error == "block" and not shadow:
                raise fault from None
