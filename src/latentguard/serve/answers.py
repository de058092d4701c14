"""A guarded chat is answered, by an upstream or by the guard's own model, in one or as a stream.

Which objects are read and written is the endpoint's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from fastapi.responses import Response, StreamingResponse

from latentguard.models.conversation import Sampling
from latentguard.prompts import Prompt
from latentguard.serve.chat_readings import ChatReading
from latentguard.serve.chat_request import ForwardedChat
from latentguard.serve.decision import is_blocked
from latentguard.serve.disconnects import run_while_connected
from latentguard.serve.errors import ApiError
from latentguard.serve.guarded_chat import ChatEvent, GuardedChat, ReplyEnd
from latentguard.serve.own_chat import OwnChat
from latentguard.serve.replies import (
    ReplyWriter,
    ScoredOrError,
    refused_reply,
    reply_note,
    sse_event,
    token_usage,
    verdict_note,
)
from latentguard.serve.reply_reading import ShownText, reply_action
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.service import RequestContext
from latentguard.serve.upstream import Forwarding, UpstreamClient
from latentguard.serve.upstream_formats import AnswerFormat
from latentguard.serve.upstream_replies import FollowedReply


@dataclass(frozen=True)
class AnswerStyle:
    """How a client wants its answer."""

    write: Callable[[ScoredOrError], ReplyWriter]
    """Begins the reply to a chat with such a verdict."""

    is_stream: bool
    """Whether events are asked for."""


@dataclass(frozen=True)
class UpstreamRequest:
    """A request that an upstream is to answer."""

    body: Mapping[str, Any]
    """As it was parsed; only a shadow sends it like that."""

    check: Callable[[], ForwardedChat]
    """Gives what is sent on, and what is read of it; raises an ApiError if it cannot be read."""

    readable: Prompt
    """The request's texts, for the log of one that cannot be judged."""

    path: str
    """Below the upstream's URL."""

    form: AnswerFormat
    """How the upstream writes its answer."""


async def answer_through(
    upstream: UpstreamClient, context: RequestContext, outgoing: UpstreamRequest, style: AnswerStyle
) -> Response:
    """Read all that would be sent, then ask the upstream.

    Args:
        upstream: What answers.
        context: The request.
        outgoing: What it holds.
        style: How a refusal is written.
    """
    service = context.service
    try:
        forwarded = outgoing.check()
        scored = await context.score_readings(forwarded.readings)
    except ApiError as error:
        await context.go_on_without_verdict(outgoing.readable, error)
        how = Forwarding(outgoing.path, outgoing.form, verdict_note(context, error))
        return await upstream.ask(context.request, outgoing.body, how)
    note: dict[str, Any] = {}
    if scored:
        outcome = await context.record_chat(forwarded.readings, scored)
        if is_blocked(service.config, outcome):
            return _refusal(context, style, outcome)
        note = verdict_note(context, outcome)
    else:
        await context.record_unread(forwarded.context)
    content = outgoing.body if service.config.policy == "shadow" else forwarded.body
    reply = None
    if context.served.guard.replies is not None:
        reply = FollowedReply(context, forwarded.context, outgoing.form)
    how = Forwarding(outgoing.path, outgoing.form, note, reply)
    return await upstream.ask(context.request, content, how)


async def answer_alone(
    context: RequestContext, style: AnswerStyle, readings: list[ChatReading], sampling: Sampling
) -> Response:
    """Read the chat, then have the guard's own model reply.

    Args:
        context: The request.
        style: How the answer is written.
        readings: What is read of the chat; the first is the chat in context.
        sampling: How the reply is drawn.
    """
    chat = OwnChat(context, readings, sampling)
    outcome = await chat.read()
    if isinstance(outcome, ScoredPrompt) and is_blocked(context.service.config, outcome):
        return _refusal(context, style, outcome)
    assert chat.reply is not None
    writer = style.write(outcome)
    if style.is_stream:
        events = _stream(context, chat.reply, writer)
        return StreamingResponse(events, media_type="text/event-stream")
    return await _whole(context, chat.reply, writer)


def _refusal(context: RequestContext, style: AnswerStyle, judged: ScoredPrompt) -> Response:
    """What a blocked chat is answered with."""
    text = context.service.config.refusal
    return refused_reply(style.write(judged), text, is_stream=style.is_stream)


async def _stream(
    context: RequestContext, chat: GuardedChat, writer: ReplyWriter
) -> AsyncIterator[str]:
    """The reply as server-sent events."""
    try:
        context.service.telemetry.first_token.observe(perf_counter() - context.began)
        yield writer.first()
        while True:
            event = await chat.next_event()
            if isinstance(event, ReplyEnd):
                note = await _record_reply(context, chat, event)
                if _is_refused(context, event):
                    yield writer.refusal(context.service.config.refusal)
                usage = token_usage(event.prompt_tokens, event.reply_tokens)
                yield writer.last(event.finish, usage, note)
                return
            assert isinstance(event, ShownText)
            scored = {"latentguard": {"reply_score": event.score}}
            yield writer.piece(event.text, scored if event.score is not None else None)
    except ApiError as fault:  # the answer has begun: an event is all that can still be said
        yield sse_event(fault.body)


async def _whole(context: RequestContext, chat: GuardedChat, writer: ReplyWriter) -> Response:
    """The reply in one.

    Raises:
        ClientDisconnected: if the client left meanwhile.
    """
    *pieces, end = await run_while_connected(_events(chat), context.request)
    assert isinstance(end, ReplyEnd)
    note = await _record_reply(context, chat, end)
    usage = token_usage(end.prompt_tokens, end.reply_tokens)
    if _is_refused(context, end):
        text = context.service.config.refusal
        return writer.whole(text, end.finish, usage, refusal=text, note=note)
    text = "".join(piece.text for piece in pieces if isinstance(piece, ShownText))
    return writer.whole(text, end.finish, usage, note=note)


async def _events(chat: GuardedChat) -> list[ChatEvent]:
    """What a chat emits after its verdict, the end last."""
    events = [await chat.next_event()]
    while not isinstance(events[-1], ReplyEnd):
        events.append(await chat.next_event())
    return events


def _is_refused(context: RequestContext, end: ReplyEnd) -> bool:
    """Whether a refusal takes the place of the reply."""
    return end.finish == "content_filter" and context.service.config.on_flagged_reply == "block"


async def _record_reply(
    context: RequestContext, chat: GuardedChat, end: ReplyEnd
) -> dict[str, Any]:
    """Note the verdict on the reply, if there is one; returns what the answer says of it."""
    if end.verdict is None:
        return {}
    policy = context.service.config.on_flagged_reply
    await context.record_reply(chat.prompt, end.verdict, reply_action(policy, end.verdict))
    return reply_note(policy, end.verdict)
