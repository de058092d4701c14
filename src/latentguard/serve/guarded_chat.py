"""One guarded chat that the scoring thread answers, token by token."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from latentguard.errors import GuardError
from latentguard.guard.replies import ReplyVerdict
from latentguard.models.chat_model import ChatModel
from latentguard.models.conversation import Conversation, ReplyPiece, Sampling, TokenProbe
from latentguard.models.segments import Segments
from latentguard.models.shared_model import SharedModel
from latentguard.prompts import Prompt
from latentguard.serve.reply_reading import ReplyGate, ShownText
from latentguard.serve.scoring import PromptScorer, ScoredPrompt, judge, measure, score_prompts
from latentguard.serve.served_guards import ServedGuard


@dataclass(frozen=True)
class ReplyEnd:
    """The reply is over."""

    finish: str
    """``stop``, ``length``, or ``content_filter`` if the reply was flagged and ended for it."""

    prompt_tokens: int
    """How long the prompt was."""

    reply_tokens: int
    """How long the reply was."""

    verdict: ReplyVerdict | None = None
    """On the reply; None if the guard does not judge replies, or nothing was said."""


ChatEvent = ScoredPrompt | GuardError | ShownText[str] | ReplyEnd | Exception
"""What a chat emits, in this order: its verdict (or why there is none), pieces of text, the end.
Any other exception ends it at once."""


class GuardedChat:
    """Lives on two threads: the scoring thread opens and steps it, the event loop listens."""

    def __init__(
        self,
        prompt: Prompt,
        sampling: Sampling,
        must_refuse: Callable[[ScoredPrompt | GuardError], bool],
        *,
        served: ServedGuard,
        scored: ScoredPrompt | None = None,
        account: str = "",
        gate: ReplyGate[str] | None = None,
    ) -> None:
        """Prepare a chat.

        Args:
            prompt: What is asked, with its history.
            sampling: How the reply is drawn.
            must_refuse: Whether a verdict, or its lack, forbids a reply.
            served: What judges it.
            scored: What was found before, if the prompt is not to be read again.
            account: Whose it is.
            gate: Lets the reply through as it is read; None where the guard judges no replies.
        """
        self.prompt, self.sampling, self.account = prompt, sampling, account
        self._served = served
        self._scored = scored
        self.cancelled = False
        """Set by whoever no longer listens."""
        self._must_refuse, self._loop = must_refuse, asyncio.get_running_loop()
        self._events: asyncio.Queue[ChatEvent] = asyncio.Queue()
        self._conversation: Conversation | None = None
        self._pieces: Iterator[ReplyPiece] = iter(())
        self._gate = gate

    def cancel(self) -> None:
        """Stop: nobody listens any more."""
        self.cancelled = True

    async def next_event(self) -> ChatEvent:
        """What happens next.

        Raises:
            Exception: what ended the chat, if it failed.
        """
        event = await self._events.get()
        if isinstance(event, Exception) and not isinstance(event, GuardError):
            raise event
        return event

    def emit(self, event: ChatEvent) -> None:
        """Say something to the listener, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def step(self, model: ChatModel, segments: Segments | None = None) -> bool:
        """First read and judge the prompt, both in one pass; then draw a token each time.

        Args:
            model: The model.
            segments: How a long prompt is read while others wait.

        Returns:
            Whether there is more to come.
        """
        if self.cancelled:
            return False
        if self._conversation is None:
            verdict = self._read(self._served, model, segments)
            # never set to False: the listener may have left meanwhile
            self.cancelled = self._must_refuse(verdict) or self.cancelled
            self.emit(verdict)
            return not self.cancelled
        piece = next(self._pieces, None)
        if piece is None:
            self._end(self._conversation, self._conversation.finish)
            return False
        self._show(piece)
        if self._gate is not None and self._gate.must_end:
            self._end(self._conversation, "content_filter")
            return False
        return True

    def _show(self, piece: ReplyPiece) -> None:
        """Emit what may be shown once a piece is there."""
        if self._gate is None:
            pieces = [ShownText(piece.text)] if piece.text else []
        elif piece.score is None:
            pieces = self._gate.finish(piece.text)
        else:
            pieces = self._gate.push(piece.text, piece.score)
        for text in pieces:
            self.emit(text)

    def _end(self, conversation: Conversation, finish: str) -> None:
        verdict = self._gate.verdict(self.prompt.id) if self._gate else None
        self.emit(ReplyEnd(finish, conversation.prompt_tokens, conversation.reply_tokens, verdict))

    def _read(
        self, served: ServedGuard, model: ChatModel, segments: Segments | None
    ) -> ScoredPrompt | GuardError:
        """Judge the prompt in the pass that serves it, if that is all that its guard reads.

        Another text (``sealed``), what is obfuscated and what is long need passes of their own.
        """
        guard = served.guard
        variants = guard.plan(self.prompt)
        is_known = self._scored is not None
        alone = not is_known and [variant.prompt for variant in variants] == [self.prompt]
        positions = guard.positions if alone else ()
        probe = None
        if guard.replies is not None and self._gate is not None:
            own = guard.replies.probe
            probe = TokenProbe(own.layers, own.weight.to(model.device))
        conversation = Conversation(
            model,
            self.prompt,
            positions=positions,
            layers=guard.probe.layers,
            queries=guard.reading.queries,
            probe=probe,
            segments=segments,
        )
        self._conversation, self._pieces = conversation, conversation.pieces(self.sampling)
        if self._scored is not None:
            return self._scored
        reader: Any = SharedModel(model, segments) if segments else model
        try:
            if conversation.states is None:
                return score_prompts(served, reader, [self.prompt])[0]
            scored = judge(served, self.prompt, variants, measure(served, conversation.states))
        except GuardError as error:
            return error
        scorer = PromptScorer(served, reader)
        return scorer.with_second_pass([self.prompt], [self.account], [scored])[0]
