"""Replies that an upstream writes, followed by the guard's model with a cache of its own.

What comes is held back in chunks: a chunk of a stream is sent on once all of its text was read. All
text of a choice is read, in the order in which it comes: reasoning, content, refusals, arguments of
calls.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentguard.errors import GuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.replies import ReplyProbe, ReplyVerdict, running_scores
from latentguard.models.chat_model import ChatModel
from latentguard.models.reply_reading import ReplyReader
from latentguard.models.segments import Segments
from latentguard.prompts import Prompt
from latentguard.serve.errors import ApiError, Unavailable, UpstreamError
from latentguard.serve.replies import reply_note
from latentguard.serve.reply_reading import most_severe, reply_action
from latentguard.serve.service import RequestContext
from latentguard.serve.upstream_formats import AnswerFormat, StreamEvent


class FollowedChoice:
    """One choice of an upstream's answer, as it is read."""

    def __init__(self, context: RequestContext, prompt: Prompt) -> None:
        """Begin before the first piece.

        Args:
            context: The request.
            prompt: The chat in context.
        """
        self._context = context
        self._prompt = prompt
        self._reader: ReplyReader | None = None
        self._running = np.zeros(0)
        self.text = ""
        """All that came so far."""

        self.is_flagged = False
        """Whether a running score was above the threshold at any reading."""

    @property
    def score(self) -> float | None:
        """The running score after the last token that was read."""
        return float(self._running[-1]) if len(self._running) else None

    async def read(self, *, is_whole: bool) -> None:
        """Read what came since the last reading.

        Raises:
            ApiError: if it cannot be read.
        """
        if not self.text.strip():
            return
        text = self.text
        judge = self._judge

        def work(guard: LatentGuard, model: ChatModel, _: Segments | None) -> list[float]:
            if self._reader is None:
                probe = guard.require_reply_probe().probe
                self._reader = ReplyReader(model, self._prompt, probe.layers, probe.weight)
            return self._reader.read(text, is_whole=is_whole)

        piece = Prompt(text[-256:], id=self._prompt.id)  # as much as is new, for a fair share
        engine = self._context.service.engine
        scores = await engine.run_alone(
            piece, work, account=self._context.account, served=self._context.served
        )
        self._running = running_scores([score + judge.probe.bias for score in scores])
        self.is_flagged |= bool((~(self._running <= judge.threshold)).any())

    def verdict(self) -> ReplyVerdict | None:
        """On what was read; None if that is nothing.

        Raises:
            GuardError: if a score is not finite.
        """
        if not len(self._running):
            return None
        return self._judge.decide(self._prompt.id, self._running)

    @property
    def _judge(self) -> ReplyProbe:
        return self._context.served.guard.require_reply_probe()


@dataclass(frozen=True)
class _Chunk:
    """Some events of a stream."""

    events: list[StreamEvent]
    """As they came."""

    is_due: bool
    """Whether what came is to be read now."""

    is_whole: bool
    """Whether no more comes."""


class FollowedReply:
    """All choices of an upstream's answer."""

    def __init__(self, context: RequestContext, prompt: Prompt, form: AnswerFormat) -> None:
        """Begin before the first piece.

        Args:
            context: The request.
            prompt: The chat in context.
            form: How the upstream writes its answer.
        """
        self._context = context
        self._prompt = prompt
        self._form = form
        self._policy = context.service.config.on_flagged_reply
        self._size = max(1, context.service.config.hold_tokens)
        self._choices: dict[int, FollowedChoice] = {}
        self._unreadable: list[str] = []

    async def stream(self, events: AsyncIterator[StreamEvent]) -> AsyncIterator[StreamEvent]:
        """The events of a stream, each once its text was read.

        Raises:
            ApiError: if a reply cannot be read; nothing that was not read is sent on then.
        """
        buffer: list[StreamEvent] = []
        is_over = False
        async for chunk in self._chunks(events):
            is_over |= chunk.is_whole
            buffer += chunk.events
            if chunk.is_due:
                await self._read(is_whole=chunk.is_whole)
                self._require_readable()
            if self._must_end:
                buffer = await self._cut()
            elif self._policy == "block" and not is_over:
                continue
            else:
                buffer = await self._released(buffer, is_whole=chunk.is_whole)
            for event in buffer:
                yield event
            buffer = []
            if self._must_end:
                return

    async def _chunks(self, events: AsyncIterator[StreamEvent]) -> AsyncIterator[_Chunk]:
        """Events in chunks of so many pieces of text; a shadow waits for none of them."""
        buffer: list[StreamEvent] = []
        unread = 0
        is_over = False
        async for event in events:
            unread += self._add(event)
            buffer.append(event)
            is_whole = self._form.is_last(event) and not is_over
            is_over |= is_whole
            is_due = is_whole or unread >= self._size or bool(self._unreadable)
            if is_due or is_over or self._policy == "shadow":
                yield _Chunk(buffer, is_due, is_whole)
                buffer = []
                unread = 0 if is_due else unread
        if not is_over:  # the stream ended without a word
            yield _Chunk(buffer, True, True)

    async def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """An answer in one, once its text was read; what is flagged is cut away or refused.

        Raises:
            ApiError: if a reply cannot be read.
        """
        for index, text in self._form.texts(body):
            self._choice(index).text += text
        self._unreadable += self._form.unreadable(body)
        await self._read(is_whole=True)
        self._require_readable()
        notes = await self._record()
        if self._must_end:
            flagged = [index for index, choice in self._choices.items() if choice.is_flagged]
            body = self._form.refused(body, flagged, self._context.service.config.refusal)
        note = dict(body.get("latentguard") or {}) | dict(notes.get("latentguard", {}))
        return body | ({"latentguard": note} if note else {})

    # ---- reading

    def _choice(self, index: int) -> FollowedChoice:
        if index not in self._choices:
            self._choices[index] = FollowedChoice(self._context, self._prompt)
        return self._choices[index]

    def _add(self, event: StreamEvent) -> int:
        """Take up the text of an event; returns how many pieces of text it holds."""
        texts = self._form.new_texts(event.data)
        self._unreadable += self._form.unreadable(event.data)
        for index, text in texts:
            self._choice(index).text += text
        return sum(bool(text) for _, text in texts)

    async def _read(self, *, is_whole: bool) -> None:
        try:
            for choice in self._choices.values():
                await choice.read(is_whole=is_whole)
                choice.verdict()
        except GuardError as error:
            if self._policy != "shadow":
                raise Unavailable(str(error)) from None
        except ApiError:
            if self._policy != "shadow":
                raise

    def _require_readable(self) -> None:
        """Check that a reply that is not cut holds nothing that may be no plain text.

        Raises:
            UpstreamError: if it does; a shadow goes on.
        """
        if self._unreadable and not self._must_end and self._policy != "shadow":
            raise UpstreamError(
                f"The upstream's reply holds '{self._unreadable[0]}', which this guard cannot read."
            )

    @property
    def _must_end(self) -> bool:
        is_flagged = any(choice.is_flagged for choice in self._choices.values())
        return is_flagged and self._policy in ("cut", "block")

    async def _released(self, events: list[StreamEvent], *, is_whole: bool) -> list[StreamEvent]:
        """Events that may go on, with what is noted of them."""
        if self._policy == "annotate":
            events = [self._annotated(event) for event in events]
        self._form.show(events)
        notes = await self._record() if is_whole else {}
        if notes and events and self._form.is_last(events[-1]):
            return [*events[:-1], *self._form.closing(events[-1], notes)]
        return events

    def _annotated(self, event: StreamEvent) -> StreamEvent:
        scores = [self._choice(i).score for i, text in self._form.deltas(event.data) if text]
        if not scores or scores[0] is None:
            return event
        return event.with_reply_score(scores[0])

    async def _cut(self) -> list[StreamEvent]:
        """The end of a stream whose reply was flagged."""
        notes = await self._record()
        refusal = self._context.service.config.refusal if self._policy == "block" else None
        return self._form.cut(list(self._choices), refusal, notes)

    async def _record(self) -> dict[str, Any]:
        """Note the verdict on each choice; returns what the answer says of the most severe."""
        verdicts = []
        for choice in self._choices.values():
            try:
                verdict = choice.verdict()
            except GuardError:  # a shadow, which has no verdict then
                continue
            if verdict is not None:
                verdicts.append(verdict)
                action = reply_action(self._policy, verdict)
                await self._context.record_reply(self._prompt, verdict, action)
        return reply_note(self._policy, most_severe(verdicts))
