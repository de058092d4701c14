"""``POST /v1/chat/completions``: a chat, answered only once its verdict is known and logged."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from latentguard.models.conversation import Sampling
from latentguard.serve.chat_readings import chat_readings
from latentguard.serve.chat_request import forwarded_chat, require_few
from latentguard.serve.disconnects import run_while_connected
from latentguard.serve.errors import ApiError, BadRequest
from latentguard.serve.guarded_chat import ChatEvent, GuardedChat, ReplyEnd
from latentguard.serve.messages import ChatMessage, own_model_prompt, readable_text
from latentguard.serve.own_chat import OwnChat
from latentguard.serve.replies import (
    ChatResponse,
    ReplyWriter,
    ScoredOrError,
    reply_note,
    sse_event,
    token_usage,
    verdict_note,
)
from latentguard.serve.reply_reading import ShownText, reply_action
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.service import RequestContext, Service
from latentguard.serve.upstream import UpstreamClient
from latentguard.serve.upstream_replies import FollowedReply


class StreamOptions(BaseModel):
    """What else a stream tells."""

    include_usage: bool = False


class Chat(BaseModel):
    """What the guard reads; an upstream gets whatever else is sent, unread, and checks it."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Chat):
    """What the guard's own model reads besides, in the ranges that it can use."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None


def routes(service: Service, upstream: UpstreamClient | None) -> APIRouter:
    """The endpoint: answered by the upstream if there is one, else by the guard's own model."""
    router = APIRouter()
    what: dict[int | str, dict[str, Any]] = {
        200: {"model": ChatResponse, "content": {"text/event-stream": {}}}
    }

    async def own(request: Request, body: ChatRequest) -> Response:
        """Answer a chat, unless the guard's verdict forbids it."""
        return await _own(RequestContext(service, request, "chat", model=body.model), body)

    async def through(request: Request, body: Chat) -> Response:
        """Have the upstream answer a chat, unless the guard's verdict forbids it."""
        assert upstream is not None
        context = RequestContext(service, request, "chat", model=body.model)
        return await _through(upstream, context, body, await request.json())

    how: dict[str, Any] = dict(methods=["POST"], name="completions", responses=what)
    answer = own if upstream is None else through
    router.add_api_route("/v1/chat/completions", answer, response_model=None, **how)
    return router


async def _through(
    upstream: UpstreamClient, context: RequestContext, chat: Chat, body: dict[str, Any]
) -> Response:
    """Read all that would be sent, then ask the upstream."""
    service = context.service
    try:
        forwarded = forwarded_chat(body, service.config, service.control_tokens)
        scored = await context.score_readings(forwarded.readings)
    except ApiError as error:
        await context.go_on_without_verdict(readable_text(chat.messages), error)
        return await upstream.ask(context.request, body, verdict_note(context, error))
    outcome = await context.record_chat(forwarded.readings, scored)
    if service.action(outcome) == "block":
        return _refusal(context, chat, outcome)
    sent = body if service.config.policy == "shadow" else forwarded.body
    reply = None
    if context.served.guard.replies is not None:
        reply = FollowedReply(context, forwarded.readings[0].prompt)
    note = verdict_note(context, outcome)
    return await upstream.ask(context.request, sent, note, reply=reply)


async def _own(context: RequestContext, body: ChatRequest) -> Response:
    """Read the chat, then have the guard's own model reply."""
    service = context.service
    _require_plain(body)
    readings = chat_readings(
        body.messages,
        context=own_model_prompt(body.messages),
        trusted_roles=service.config.trusted_roles,
    )
    require_few(readings, service.config)
    chat = OwnChat(context, readings, _sampling(service, body))
    outcome = await chat.read()
    if isinstance(outcome, ScoredPrompt) and service.action(outcome) == "block":
        return _refusal(context, body, outcome)
    assert chat.reply is not None
    reply = _reply(context, body, outcome)
    if body.stream:
        events = _stream(context, chat.reply, reply)
        return StreamingResponse(events, media_type="text/event-stream")
    return await _whole(context, chat.reply, reply)


def _require_plain(body: ChatRequest) -> None:
    """The guard's own model answers with one text; what asks for more is turned away."""
    extra = body.model_extra or {}
    asked = [name for name in ("tools", "functions", "logprobs", "audio") if extra.get(name)]
    if (extra.get("response_format") or {"type": "text"}) != {"type": "text"}:
        asked.append("response_format")
    if (body.n or 1) > 1:
        asked.append("n")
    if asked:
        raise BadRequest(f"{', '.join(asked)}: the guard's own model cannot do this.")


def _sampling(service: Service, body: ChatRequest) -> Sampling:
    most = service.config.max_reply
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    how = Sampling(max_tokens=most, seed=body.seed, stop=stop)
    asked = body.max_completion_tokens or body.max_tokens
    how = replace(how, max_tokens=min(most, asked or most))
    if body.temperature is not None:
        how = replace(how, temperature=body.temperature)
    return how if body.top_p is None else replace(how, top_p=body.top_p)


def _reply(context: RequestContext, body: Chat, judged: ScoredOrError) -> ReplyWriter:
    usage = body.stream_options is not None and body.stream_options.include_usage
    mark, name = context.id.removeprefix("req-"), context.service.config.name
    return ReplyWriter(mark, name, verdict_note(context, judged), usage=usage)


async def _stream(
    context: RequestContext, chat: GuardedChat, reply: ReplyWriter
) -> AsyncIterator[str]:
    """The reply as server-sent events."""
    try:
        context.service.telemetry.first_token.observe(perf_counter() - context.began)
        yield reply.first()
        while True:
            event = await chat.next_event()
            if isinstance(event, ReplyEnd):
                note = await _record_reply(context, chat, event)
                if _is_refused(context, event):
                    yield reply.piece(context.service.config.refusal)
                usage = token_usage(event.prompt_tokens, event.reply_tokens)
                yield reply.last(event.finish, usage, note)
                return
            assert isinstance(event, ShownText)
            scored = {"latentguard": {"reply_score": event.score}}
            yield reply.piece(event.text, scored if event.score is not None else None)
    except ApiError as fault:  # the answer has begun: an event is all that can still be said
        yield sse_event(fault.body)


async def _whole(context: RequestContext, chat: GuardedChat, reply: ReplyWriter) -> Response:
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
        return reply.whole(text, end.finish, usage, refusal=text, note=note)
    text = "".join(piece.text for piece in pieces if isinstance(piece, ShownText))
    return reply.whole(text, end.finish, usage, note=note)


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
    action = reply_action(context.service.config.on_flagged_reply, end.verdict)
    await context.record_reply(chat.prompt, end.verdict, action)
    return reply_note(context, end.verdict)


def _refusal(context: RequestContext, body: Chat, judged: ScoredPrompt) -> Response:
    """What a blocked chat is answered with."""
    reply = _reply(context, body, judged)
    return reply.refused(context.service.config.refusal, is_stream=bool(body.stream))
