"""The server's answer on its way to the client: no token of a reply is shown before it is read.

The engine computes the states of a token in the pass that writes the next one. So the last token of
a reply that ends by its length or a stop text is read in a short pass of its own; all others are
read in the passes that write the reply (``judged_choice`` says which).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.responses import Response
from starlette.types import Message, Send

from latentguard.guard.replies import ReplyVerdict
from latentguard.integrations.vllm.chat_guard import ChatGuard, PendingChat, require_answer
from latentguard.integrations.vllm.held_reply import content_type, with_length
from latentguard.integrations.vllm.judged_choice import Events, JudgedChoice
from latentguard.integrations.vllm.reply_tokens import ReplyOptions
from latentguard.serve.config import ServeConfig
from latentguard.serve.errors import ApiError, Unavailable
from latentguard.serve.replies import ChatWriter, reply_note, sse_event, token_usage
from latentguard.serve.reply_reading import ShownText, most_severe
from latentguard.serve.upstream_formats import ChatFormat, StreamEvent, strict_json

log = logging.getLogger("latentguard.vllm")

LOST = "The scores of this reply are not complete, so it cannot be judged."
BROKEN_OFF = "The server broke the reply off."


@dataclass(frozen=True)
class JudgedChat:
    """A chat whose replies are judged."""

    guard: ChatGuard
    chat: PendingChat
    config: ServeConfig
    stop: asyncio.Event
    """Ends the chat in the engine."""


class JudgedReply:
    """Stands between the server, whose prompt has its verdict, and the client's ``send``."""

    def __init__(self, judged: JudgedChat, send: Send) -> None:
        """Begin before the first message."""
        assert judged.chat.reply is not None
        self._guard = judged.guard
        self._chat = judged.chat
        self._config = judged.config
        self._stop = judged.stop
        self._send = send
        self._options: ReplyOptions = judged.chat.reply.options
        self._log = judged.chat.reply.log
        self._is_shadow = judged.config.on_flagged_reply == "shadow"
        judge = judged.guard.guard.require_reply_probe()
        self._choices = [
            JudgedChoice(judge, judged.config, shows_ends=self._options.shows_ends)
            for _ in range(self._options.count)
        ]
        self._form = ChatFormat()
        self._messages = deque[Message]()
        self._head: Message | None = None
        self._body = b""
        self._prompt_ids: Sequence[int] = judged.chat.own.ids
        self._tail: Events = ()
        """Events that end the stream."""

        self._has_begun = False
        self._is_whole = False
        self._is_over = False
        self._refusal: Response | None = None

    async def take(self, message: Message) -> None:
        """What the server sends."""
        self._messages.append(message)
        self._log.news.set()

    async def run(self, server: asyncio.Task[None], note: Mapping[str, Any]) -> Response | None:
        """Send the reply on as it is read, until it is over.

        Args:
            server: Ends once no more comes.
            note: What the answer says of the prompt's verdict.

        Returns:
            What the client is answered with, if nothing was sent.

        Raises:
            ApiError: if the reply cannot be judged and nothing of it was sent.
        """
        server.add_done_callback(lambda _: self._log.news.set())
        try:
            while not self._is_over:
                await self._log.news.wait()
                self._log.news.clear()
                is_last = server.done()
                await self._advance(note)
                if is_last and not self._is_over:
                    server.result()  # raises what the server raised
                    raise Unavailable(BROKEN_OFF)
        except ApiError as fault:
            self._stop.set()
            if not self._has_begun:
                raise
            await self._show_bytes(sse_event(fault.body).encode(), more=False)
        return self._refusal

    async def _advance(self, note: Mapping[str, Any]) -> None:
        while self._messages:
            await self._take_up(self._messages.popleft())
        if self._is_over:
            return
        try:
            self._guard.collect()
            if self._log.is_lost:
                raise Unavailable(LOST)
            is_event_stream = self._head is not None and _is_event_stream(self._head)
            await (self._judge_stream() if is_event_stream else self._judge_whole(note))
        except ApiError as fault:
            if not self._is_shadow:
                raise
            if self._is_whole:
                log.warning("A reply was not judged: %s", fault)
                self._is_over = True

    # ---- what the server sends

    async def _take_up(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            return
        assert self._head is not None
        self._is_whole = not message.get("more_body", False)
        self._body += message.get("body", b"")
        if self._head["status"] != 200:
            if self._is_whole:  # an error of the server's own: nothing was generated
                await self._show_whole(self._body)
                self._is_over = True
        elif _is_event_stream(self._head):
            for event in self._next_events():
                await self._take_event(event)
            if self._is_shadow and self._is_whole:
                await self._show_bytes(b"", more=False)
        elif self._is_whole:
            self._take_answer()
            if self._is_shadow:
                await self._show_whole(self._body)

    def _next_events(self) -> list[StreamEvent]:
        *parts, self._body = self._body.split(b"\n\n")
        if self._is_whole:
            parts.append(self._body)
        return [StreamEvent(tuple(part.split(b"\n"))) for part in parts if part.strip()]

    async def _take_event(self, event: StreamEvent) -> None:
        data = event.data
        self._form.new_texts(data)
        shown = self._without_ids(event)
        self._prompt_ids = data.get("prompt_token_ids") or self._prompt_ids
        if self._is_shadow:
            await self._show((shown,))
        choices = data.get("choices") or ()
        if (data and not choices) or self._form.is_last(event):
            self._tail += (shown,)
            return
        for choice in choices:
            if not _is_only_role(choice):
                self._add(choice, (shown,))
            elif not self._is_shadow:
                await self._show((shown,))
        if not choices and not self._is_shadow:  # a comment, which keeps the connection alive
            await self._show((shown,))

    def _take_answer(self) -> None:
        """An answer in one; its ids are left out of what is shown.

        Raises:
            Unavailable: if there is none, as once the client has left.
        """
        answer = json.loads(self._body)
        if not isinstance(answer, dict):
            raise Unavailable(BROKEN_OFF)
        self._prompt_ids = answer.get("prompt_token_ids") or self._prompt_ids
        for choice in answer["choices"]:
            self._add(choice)
        self._body = strict_json(self._shown_fields(answer))

    def _add(self, choice: Mapping[str, Any], events: Events = ()) -> None:
        """Take up tokens of a reply, and what shows them unless that was shown before."""
        index = choice.get("index", 0)
        try:
            if not 0 <= index < len(self._choices):
                raise Unavailable("The server wrote a reply that nobody asked for.")
            self._choices[index].add(choice, () if self._is_shadow else events)
        except ApiError:
            if not self._is_shadow:
                raise
            self._log.is_lost = True

    def _without_ids(self, event: StreamEvent) -> StreamEvent:
        data = self._shown_fields(event.data)
        return event if data == event.data else event.with_data(data)

    def _shown_fields(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """An object without the token ids, unless the client asked for them."""
        if self._options.shows_ids:
            return dict(data)
        shown = {name: value for name, value in data.items() if name != "prompt_token_ids"}
        if "choices" in shown:
            shown["choices"] = [
                {name: value for name, value in choice.items() if name != "token_ids"}
                for choice in shown["choices"]
            ]
        return shown

    # ---- reading

    async def _read(self, index: int) -> list[ShownText[Events]]:
        """Read what can be read of a reply; returns what may be shown.

        Raises:
            Unavailable: if a number is missing.
        """
        choice = self._choices[index]
        pieces = choice.advance(self._log.scores[index])
        if choice.must_end or not choice.is_complete or choice.is_shown:
            return pieces
        if choice.missing > 1:
            raise Unavailable(LOST)
        if choice.missing:
            ids = [*self._prompt_ids, *choice.ids]
            score = await require_answer(self._guard.score_last_token(ids))
            if not math.isfinite(score):
                raise Unavailable(LOST)
            pieces += choice.read_last(score)
        return pieces if choice.must_end else pieces + choice.finish()

    async def _judge_stream(self) -> None:
        for index in range(len(self._choices)):
            pieces = await self._read(index)
            for piece in pieces:
                await self._show(_annotated(piece))
        if self._must_end:
            await self._cut()
        elif self._is_whole:
            await self._close()

    async def _judge_whole(self, note: Mapping[str, Any]) -> None:
        if self._is_whole:
            for index in range(len(self._choices)):
                await self._read(index)
        elif not self._options.is_stream and not self._options.has_stop_texts:
            for choice, scores in zip(self._choices, self._log.scores, strict=True):
                choice.advance_unseen(scores)
        if self._must_end:
            self._stop.set()
            self._refusal = self._refused(note)
            self._is_over = True
        elif self._is_whole:
            self._require_complete()
            self._note_shadow()
            await self._close_whole()

    @property
    def _must_end(self) -> bool:
        return any(choice.must_end for choice in self._choices)

    def _verdicts(self) -> list[ReplyVerdict]:
        verdicts = [choice.verdict() for choice in self._choices]
        return [verdict for verdict in verdicts if verdict is not None]

    def _notes(self) -> dict[str, Any]:
        return reply_note(self._config.on_flagged_reply, most_severe(self._verdicts()))

    def _note_shadow(self) -> None:
        """Log what a shadow says to nobody else."""
        if self._is_shadow:
            for verdict in self._verdicts():
                if verdict.flagged:
                    log.warning(
                        "A reply of %d tokens was flagged at token %d (score %.4g) and shown.",
                        *(verdict.tokens, verdict.flagged_at, verdict.score),
                    )

    def _require_complete(self) -> None:
        if not all(choice.is_shown for choice in self._choices):
            raise Unavailable(BROKEN_OFF)

    # ---- what the client gets

    async def _cut(self) -> None:
        """The end of a stream whose reply was flagged."""
        self._stop.set()
        refusal = self._config.refusal if self._config.on_flagged_reply == "block" else None
        unfinished = [n for n, choice in enumerate(self._choices) if not choice.is_shown]
        await self._show(tuple(self._form.cut(unfinished, refusal, self._notes())), more=False)
        self._is_over = True

    async def _close(self) -> None:
        """The end of a stream: what follows its replies, with their verdict."""
        is_failed = any("error" in event.data for event in self._tail)
        if not is_failed:
            self._require_complete()
            self._note_shadow()
        self._is_over = True
        if self._is_shadow:
            return
        notes = {} if is_failed else self._notes()
        events = self._tail
        if notes and events:
            events = (*events[:-1], *self._form.closing(events[-1], notes))
        await self._show(events, more=False)

    async def _close_whole(self) -> None:
        self._is_over = True
        if self._is_shadow:
            return
        body = json.loads(self._body)
        note = dict(body.get("latentguard") or {}) | dict(self._notes().get("latentguard", {}))
        await self._show_whole(strict_json(body | ({"latentguard": note} if note else {})))

    def _refused(self, note: Mapping[str, Any]) -> Response:
        """An answer in one with a refusal in place of its replies."""
        usage = token_usage(len(self._prompt_ids), sum(choice.count for choice in self._choices))
        writer = ChatWriter(self._chat.own.request.key, self._options.model, note, usage=False)
        text = self._config.refusal
        return writer.whole(text, "content_filter", usage, refusal=text, note=self._notes())

    async def _show(self, events: Events, *, more: bool = True) -> None:
        await self._show_bytes(b"".join(event.content for event in events), more=more)

    async def _show_bytes(self, content: bytes, *, more: bool) -> None:
        assert self._head is not None
        if not self._has_begun:
            self._has_begun = True
            await self._send(self._head)
        await self._send({"type": "http.response.body", "body": content, "more_body": more})

    async def _show_whole(self, content: bytes) -> None:
        assert self._head is not None
        self._head = with_length(self._head, len(content))
        await self._show_bytes(content, more=False)


def _annotated(piece: ShownText[Events]) -> Events:
    """The events of a piece, the last with its running score."""
    if piece.score is None:
        return piece.text
    return (*piece.text[:-1], piece.text[-1].with_reply_score(piece.score))


def _is_only_role(choice: Mapping[str, Any]) -> bool:
    """Whether a choice of an event begins a reply and shows nothing of it."""
    delta = dict(choice.get("delta") or {}) | {"role": None}
    return choice.get("token_ids") is None and not any(delta.values())


def _is_event_stream(head: Message) -> bool:
    return content_type(head) == "text/event-stream"
