"""A chat that the guard's own model answers: read first, then replied to.

The chat in context is read in the pass that its reply goes on from. Its other texts are read before
that, together with what others sent. If all places for chats are taken, the chat in context is read
with them too, so that a verdict does not wait for a place.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from latentguard.errors import GuardError
from latentguard.models.conversation import Sampling
from latentguard.prompts import Prompt
from latentguard.serve.chat_readings import ChatReading
from latentguard.serve.decision import answers_without_verdict, is_blocked
from latentguard.serve.disconnects import run_while_connected
from latentguard.serve.errors import ApiError, Unavailable
from latentguard.serve.guarded_chat import ChatEvent, GuardedChat
from latentguard.serve.replies import ScoredOrError
from latentguard.serve.reply_reading import ReplyGate
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.service import RequestContext

T = TypeVar("T")


class OwnChat:
    """One chat, on the event loop."""

    def __init__(
        self, context: RequestContext, readings: list[ChatReading], sampling: Sampling
    ) -> None:
        """Prepare.

        Args:
            context: The request.
            readings: What is read of the chat; the first is the chat in context.
            sampling: How the reply is drawn.
        """
        self.context, self.readings, self.sampling = context, readings, sampling
        self.scored: list[ScoredPrompt | None] = [None] * len(readings)
        """What was found so far."""

        self.reply: GuardedChat | None = None
        """The reply that is under way."""

    async def read(self) -> ScoredOrError:
        """The recorded verdict, or why there is none though the chat is answered.

        The reply is under way then, unless the verdict forbids one.

        Raises:
            ApiError: if there is no verdict; this is recorded.
        """
        await self._recording(self._read_before())
        outcome: ScoredPrompt | None = None
        if self.scored[0] is not None or self._is_blocked():
            outcome = await self._record()
            if self._is_blocked():
                return outcome
        event = await self._recording(self._begin())
        if outcome is not None:
            return outcome
        if isinstance(event, ScoredPrompt):
            self.scored[0] = event
            return await self._record()
        error = Unavailable("The guard cannot give a verdict on this prompt.")
        await self.context.go_on_without_verdict(self.prompt, error)
        return error

    @property
    def prompt(self) -> Prompt:
        """The chat in context."""
        [prompt] = self.context.with_segment([self.readings[0].prompt])
        return prompt

    async def _read_before(self) -> None:
        """Read what does not need the pass of the reply.

        With a second opinion that is all of the chat: the scoring thread cannot wait for it.
        """
        service = self.context.service
        is_read_with_reply = service.engine.has_free_chat and service.second_opinion is None
        start = 1 if is_read_with_reply else 0
        self.scored[start:] = await self.context.score_readings(self.readings[start:])

    async def _begin(self) -> ChatEvent:
        """Begin the reply; what the chat emits first."""
        self.reply = chat = GuardedChat(
            self.prompt,
            self.sampling,
            self._must_refuse,
            served=self.context.served,
            scored=self.scored[0],
            account=self.context.account,
            gate=self._gate(),
        )
        self.context.request.state.ending.callback(chat.cancel)
        await self.context.service.engine.start_chat(chat)
        first = self.context.service.engine.within_deadline(chat.next_event())
        return await run_while_connected(first, self.context.request)

    def _gate(self) -> ReplyGate[str] | None:
        """What lets the reply through; None where the guard judges no replies."""
        judge = self.context.served.guard.replies
        config = self.context.service.config
        if judge is None:
            return None
        return ReplyGate(judge, config.on_flagged_reply, config.hold_tokens)

    def _must_refuse(self, event: ScoredPrompt | GuardError) -> bool:
        """Whether a verdict on the chat in context, or its lack, forbids a reply."""
        if isinstance(event, ScoredPrompt):
            return self._is_blocked(event)
        return not answers_without_verdict(self.context.service.config, Unavailable())

    def _is_blocked(self, in_context: ScoredPrompt | None = None) -> bool:
        scored = [in_context or self.scored[0], *self.scored[1:]]
        if not any(scored):
            return False
        outcome = self.context.decide(self.readings, scored)
        return is_blocked(self.context.service.config, outcome)

    async def _record(self) -> ScoredPrompt:
        return await self.context.record_chat(self.readings, self.scored)

    async def _recording(self, work: Awaitable[T]) -> T:
        """What some work gives; an error is recorded, then raised."""
        try:
            return await work
        except ApiError as error:
            await self.context.record_failure([self.prompt], error, is_answered=False)
            raise
