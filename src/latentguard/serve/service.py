"""One running service: what its endpoints share, and a request from arrival to audit log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from starlette.requests import Request

from latentguard.guard.cascade import opinion_of
from latentguard.guard.explanation import Explainer
from latentguard.guard.replies import ReplyVerdict
from latentguard.prompts import Prompt
from latentguard.serve.audit_log import AuditLog
from latentguard.serve.chat_decision import (
    decide_as_shadow,
    decide_chat,
    decide_each,
    has_segment,
    segment_of,
)
from latentguard.serve.chat_readings import ChatReading
from latentguard.serve.config import ServeConfig
from latentguard.serve.control_tokens import ControlTokens
from latentguard.serve.decision import Action, answers_without_verdict, choose_action
from latentguard.serve.disconnects import run_while_connected
from latentguard.serve.drift import DriftMonitor, DriftReference
from latentguard.serve.engine import ScoringEngine
from latentguard.serve.errors import ApiError, ClientDisconnected, Unavailable
from latentguard.serve.keys import ApiKeys
from latentguard.serve.reply_reading import ReplyAction
from latentguard.serve.review import ServiceReview
from latentguard.serve.scoring import ScoredPrompt, with_opinion
from latentguard.serve.second_opinion import OpinionThreads
from latentguard.serve.served_guards import DEFAULT_NAME, ServedGuard, ServedGuards
from latentguard.serve.shadow import outcome_of
from latentguard.serve.telemetry import Telemetry
from latentguard.serve.text_cache import TextCache

log = logging.getLogger("latentguard.serve")


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

    cache: TextCache[ScoredPrompt] = field(default_factory=TextCache)
    """What was read before of chats."""

    explainer: Explainer = field(default_factory=Explainer)
    """Says what verdicts are made of; for the scoring thread."""

    review: ServiceReview | None = None
    """Keeps recent prompts for the page at ``/review``; None keeps none."""

    second_opinion: OpinionThreads | None = None
    """Decides in the review band; None leaves it to the policy."""

    require_limits: Callable[[], Awaitable[None]] | None = None
    """Raises an ``ApiError`` if requests of clients cannot be counted; None before it serves."""

    require_upstream: Callable[[], Awaitable[None]] | None = None
    """Raises an ``ApiError`` if the upstream cannot be reached; None without one."""

    use_upstream_key: Callable[[str | None], None] | None = None
    """Gives the upstream's client another key; None without an upstream."""

    is_closing: bool = False
    """Whether it is about to end."""

    _control_tokens: ControlTokens | None = None

    @property
    def guards(self) -> ServedGuards:
        """The guards.

        Raises:
            Unavailable: until they are loaded.
        """
        if not self.engine.is_loaded:
            raise Unavailable("The guard is not ready.")
        return self.engine.guards

    def use_reference(self, reference: DriftReference) -> None:
        """Compare scores with others from now on; the buckets of the histogram stay."""
        self.reference = reference
        self.telemetry.drift = DriftMonitor(reference.scores)

    @property
    def is_ready(self) -> bool:
        """Whether the guard can give verdicts, and is to go on with it."""
        return self.engine.state == "ready" and not self.is_closing

    async def require_ready(self) -> None:
        """Check all that a verdict needs: guard, audit log, limits and upstream.

        Raises:
            Unavailable: if something is missing.
        """
        if self.is_closing:
            raise Unavailable("The service is closing.")
        if self.engine.state != "ready":
            raise Unavailable(f"The guard is {self.engine.state}.")
        if self.audit is not None and self.audit.is_failing:
            line = dict(time=timestamp(), request="-", client="-", endpoint="readyz")
            await asyncio.to_thread(self.audit.write, [line | dict(action="probe")])
        for require in (self.require_limits, self.require_upstream):
            if require is not None:
                await require()

    def reopen_audit(self) -> None:
        """Begin the audit log anew, as after a rotation by others."""
        if self.audit is None:
            return
        try:
            self.audit.reopen()
        except OSError as error:
            log.error("The audit log cannot be opened again: %s", error.strerror)

    @property
    def control_tokens(self) -> ControlTokens:
        """Of common model families, and of the guard's model once it is loaded."""
        if self._control_tokens is None:
            if not self.engine.is_loaded:
                return ControlTokens()
            added = self.engine.model.tokenizer.get_added_vocab()
            self._control_tokens = ControlTokens(added)
        return self._control_tokens

    async def record_rejections(self, lines: Sequence[dict[str, Any]]) -> None:
        """Log requests that were refused before there was a verdict, without their texts."""
        if self.audit is None:
            return
        for line in lines:
            line.pop("text", None)
            if self.audit.may_block:
                await asyncio.to_thread(self.audit.reject, line)
            else:
                self.audit.reject(line)


class RequestContext:
    """One request, from its arrival to its line in the audit log."""

    def __init__(
        self, service: Service, request: Request, endpoint: str, *, model: str | None = None
    ) -> None:
        """Begin.

        Args:
            service: What the request came to.
            request: The request.
            endpoint: What it is called in the log.
            model: That the request names, which may be the name of a guard.
        """
        self._model = model
        self._served: ServedGuard | None = None
        self.service, self.endpoint, self.began = service, endpoint, perf_counter()
        self.request = request
        self.id: str = request.state.request
        self.client: str = request.state.client
        self.account: str = request.state.account
        headers = {"client_request": "x-request-id", "trace": "traceparent"}
        self._trace = {
            name: request.headers[header][:128]
            for name, header in headers.items()
            if header in request.headers
        }
        header = service.config.segment_header
        self.segment = (request.headers.get(header) or None) if header else None

    @property
    def served(self) -> ServedGuard:
        """The guard that judges this request, however long it takes.

        Raises:
            Unavailable: until the guards are loaded.
        """
        if self._served is None:
            self._served = self.service.guards.find(self._model)
        return self._served

    def decide(
        self, readings: Sequence[ChatReading], scored: Sequence[ScoredPrompt | None]
    ) -> ScoredPrompt:
        """The most severe reading of a chat, under the thresholds of so many readings.

        Args:
            readings: All that is read of the chat.
            scored: What was found; None where that is still to come.
        """
        return decide_chat(self.served, readings, scored, **self._thresholds)

    @property
    def _thresholds(self) -> Any:
        """Which thresholds of a guard a chat is compared with."""
        return dict(segment=self.segment, rate_of=self.service.config.rate_of)

    def with_segment(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts in the segment that the request names."""
        return [replace(prompt, segment=self.segment) for prompt in prompts]

    async def score(self, prompts: Sequence[Prompt]) -> list[ScoredPrompt]:
        """Score prompts; an error is recorded for each, then raised."""
        try:
            scored = await run_while_connected(self._score(prompts), self.request)
            band = [n for n, one in enumerate(scored) if one.verdict.decision == "review"]
            return await self._with_opinions(prompts, scored, band)
        except ApiError as error:
            await self.record_failure(prompts, error, is_answered=False)
            raise

    async def score_readings(self, readings: Sequence[ChatReading]) -> list[ScoredPrompt]:
        """Score the texts of a chat, those that are not cached; an error is raised only."""
        guard = self.served.guard
        prompts = [
            replace(one.prompt, segment=segment_of(guard, one, self.segment)) for one in readings
        ]
        cached = [self._cached(prompt) for prompt in prompts]
        missing = [p for p, scored in zip(prompts, cached, strict=True) if scored is None]
        fresh = iter(await run_while_connected(self._score(missing), self.request))
        results = [scored or next(fresh) for scored in cached]
        results = await self._with_opinions(prompts, results, self._band(readings, results))
        for prompt, scored in zip(prompts, results, strict=True):
            if not prompt.history:
                self.service.cache.put(scored, *self._cache_key(prompt))
        return results

    def _band(self, readings: Sequence[ChatReading], scored: Sequence[ScoredPrompt]) -> list[int]:
        """The readings of a chat that a second opinion is to decide; none of a blocked chat.

        An opinion that was kept with an earlier reading of the same text is not asked again.
        """
        if self.service.second_opinion is None:
            return []
        decided = decide_each(self.served, readings, scored, **self._thresholds)
        verdicts = [one.verdict for one in decided]
        if any(verdict.flagged for verdict in verdicts):
            return []
        open_cases = (None, "failed")
        return [
            n
            for n, verdict in enumerate(verdicts)
            if verdict.decision == "review" and verdict.second_opinion in open_cases
        ]

    async def _with_opinions(
        self, prompts: Sequence[Prompt], scored: Sequence[ScoredPrompt], band: Sequence[int]
    ) -> list[ScoredPrompt]:
        """The verdicts, with a second opinion on those of the band."""
        results = list(scored)
        second = self.service.second_opinion
        if second is None or not band:
            return results
        asked = [prompts[n] for n in band]
        scores = await run_while_connected(second.score(asked), self.request)
        for n, score in zip(band, scores, strict=True):
            self.service.telemetry.opinion(opinion_of(score, self.served.guard))
            results[n] = with_opinion(self.served, prompts[n], scored[n], score)
        return results

    async def _score(self, prompts: Sequence[Prompt]) -> list[ScoredPrompt]:
        engine = self.service.engine
        return await engine.score(prompts, account=self.account, served=self.served)

    def _cache_key(self, prompt: Prompt) -> tuple[str, ...]:
        return self.served.cache_key, self.account, prompt.segment or "", prompt.text

    def _cached(self, prompt: Prompt) -> ScoredPrompt | None:
        if prompt.history:
            return None
        return self.service.cache.get(*self._cache_key(prompt))

    async def record_failure(
        self, prompts: Sequence[Prompt], error: ApiError, *, is_answered: bool
    ) -> None:
        """Note that there is no verdict, and whether the chat is answered all the same."""
        lack: Action = "unjudged" if is_answered else "error"
        action: Action = "left" if isinstance(error, ClientDisconnected) else lack
        for _ in prompts:
            self.service.telemetry.verdict(self.endpoint, action, guard=self._guard_name)
        lines = [self._line(p, action) | {"error": error.code} for p in prompts]
        if error.is_clients_doing and not is_answered:
            await self.service.record_rejections(lines)
        else:
            await self._write(lines)
        self.request.state.is_recorded = True

    async def go_on_without_verdict(self, prompt: Prompt, error: ApiError) -> None:
        """Note that a chat has no verdict; only a shadow goes on.

        Raises:
            ApiError: ``error``, unless the chat is answered all the same.
        """
        is_answered = answers_without_verdict(self.service.config, error)
        await self.record_failure(self.with_segment([prompt]), error, is_answered=is_answered)
        if not is_answered:
            raise error

    async def record_unread(self, prompt: Prompt) -> None:
        """Note that nothing of a chat is of a source that is read.

        Raises:
            AuditUnavailable: if the audit log cannot be written.
        """
        await self._write([self._line(self.with_segment([prompt])[0], "unread")])
        self.service.telemetry.verdict(self.endpoint, "unread", guard=self._guard_name)
        self.request.state.is_recorded = True

    async def judge_chat(
        self, readings: Sequence[ChatReading], *, action: Action | None = None
    ) -> ScoredPrompt:
        """The recorded verdict on a chat that nobody answers here.

        Raises:
            ApiError: if there is none; this is recorded.
        """
        try:
            scored = await self.score_readings(readings)
        except ApiError as error:
            prompts = self.with_segment([readings[0].prompt])
            await self.record_failure(prompts, error, is_answered=False)
            raise
        return await self.record_chat(readings, scored, action=action)

    async def record_chat(
        self,
        readings: Sequence[ChatReading],
        scored: Sequence[ScoredPrompt | None],
        *,
        action: Action | None = None,
    ) -> ScoredPrompt:
        """The verdict on a chat, recorded before anybody sees it.

        Args:
            readings: All that is read of the chat; the first names it in the log.
            scored: What was found; None where reading was not needed any more.
            action: What is done; None leaves it to the policy.

        Raises:
            AuditUnavailable: if the audit log cannot be written.
        """
        shadow = decide_as_shadow(self.served, readings, scored, **self._thresholds)
        outcome = replace(self.decide(readings, scored), shadow=shadow)
        prompts = self.with_segment([readings[0].prompt])
        action = action or choose_action(self.service.config, outcome)
        await self.record_verdicts(prompts, [outcome], [action])
        self.keep_for_review([readings[outcome.index].prompt], [outcome])
        return outcome

    def keep_for_review(
        self, prompts: Sequence[Prompt], scored_prompts: Sequence[ScoredPrompt]
    ) -> None:
        """Keep texts with their verdicts in memory, if there is a page to review them."""
        if self.service.review is None:
            return
        for prompt, scored in zip(prompts, scored_prompts, strict=True):
            self.service.review.keep(prompt, scored, self.served)

    async def record_verdicts(
        self,
        prompts: Sequence[Prompt],
        scored_prompts: Sequence[ScoredPrompt],
        actions: Sequence[Action],
    ) -> None:
        """Note verdicts, before anybody sees them.

        Raises:
            AuditUnavailable: if the audit log cannot be written.
        """
        lines = [
            self._line(prompt, action) | _without_id(one.to_dict()) | self._shadow_line(one)
            for prompt, one, action in zip(prompts, scored_prompts, actions, strict=True)
        ]
        await self._write(lines)
        self.request.state.is_recorded = True
        for one, action in zip(scored_prompts, actions, strict=True):
            self.service.telemetry.verdict(self.endpoint, action, one, guard=self._guard_name)
            self._compare(one)

    def _shadow_line(self, scored: ScoredPrompt) -> dict[str, Any]:
        """What the audit log says of the shadow guard; nothing without one."""
        shadow, own = self.served.shadow, scored.shadow
        if shadow is None:
            return {}
        said = dict(score=own.verdict.score, threshold=own.threshold) if own else {}
        return {"shadow": shadow.to_dict() | dict(decision=scored.shadow_decision) | said}

    def _compare(self, scored: ScoredPrompt) -> None:
        """Count what the guard and its shadow decided, if it has one."""
        served = self.served
        if served.shadow is None:
            return
        outcome = outcome_of(scored.verdict.decision, scored.shadow_decision)
        is_known = any(has_segment(one.guard, self.segment) for one in (served, served.shadow))
        segment = self.segment if is_known and self.segment else ""  # others may be made up
        served.comparison.add(self.endpoint, segment, outcome, self.id)
        counter = self.service.telemetry.shadow_verdicts
        counter.labels(self.endpoint, segment, outcome, served.digest[:12]).inc()

    @property
    def _known_guard(self) -> ServedGuard | None:
        """What judges this request; None while nothing is loaded."""
        return self.served if self.service.engine.is_loaded else self._served

    @property
    def _guard_name(self) -> str:
        return guard.name if (guard := self._known_guard) else DEFAULT_NAME

    async def record_reply(
        self, prompt: Prompt, verdict: ReplyVerdict, action: ReplyAction
    ) -> None:
        """Note the verdict on a reply to a prompt; never the reply.

        Raises:
            AuditUnavailable: if the audit log cannot be written.
        """
        line = self._line(prompt, action) | {"reply": _without_id(verdict.to_dict())}
        await self._write([line])
        self.service.telemetry.reply(self.endpoint, action, verdict.decision)

    def _line(self, prompt: Prompt, action: Action | ReplyAction) -> dict[str, Any]:
        audit = self.service.audit
        if audit is None:
            return {}
        line = dict(
            time=timestamp(),
            request=self.id,
            client=self.client,
            endpoint=self.endpoint,
            guard=guard.digest[:12] if (guard := self._known_guard) else None,
            folder=guard.folder if guard else None,
            prompt=audit.digest(prompt),
            action=action,
            ms=round(1000 * (perf_counter() - self.began), 2),
        )
        line |= self._trace
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
            if audit.may_block:  # a disk may take its time; the others need not wait
                await asyncio.to_thread(audit.write, lines)
            else:
                audit.write(lines)
        except ApiError as error:
            config = self.service.config
            is_chat = self.endpoint in ("chat", "responses", "ext_authz")
            shadow = is_chat and config.policy == "shadow"
            if not shadow:
                raise error from None


def _without_id(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict for the log, where the prompt has a name of its own."""
    return {name: value for name, value in verdict.items() if name != "id"}


def timestamp() -> str:
    """Now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
