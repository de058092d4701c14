"""``POST /v1/chat/completions``: a chat, answered only once its verdict is known and logged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from latentguard.errors import GuardError
from latentguard.guard.verdict import Decision
from latentguard.models.conversation import Sampling
from latentguard.prompts import Prompt
from latentguard.serve.disconnects import wanted
from latentguard.serve.errors import BadRequest, Fault, Unavailable
from latentguard.serve.guarded_chat import End, Event, Talk
from latentguard.serve.messages import ChatMessage, legible, prompt_of, prompts_of
from latentguard.serve.replies import ChatResponse, Judged, Reply, event_of, note_of, usage_of
from latentguard.serve.scoring import Judgement
from latentguard.serve.service import Case, Service
from latentguard.serve.upstream import Relay

CHECK = 8
"""After so many pieces of text it is checked whether the client is still there."""

SEVERITY: tuple[Decision, ...] = ("allow", "review", "block")
"""The last is the worst."""


class StreamOptions(BaseModel):
    """What else a stream tells."""

    include_usage: bool = False


class Chat(BaseModel):
    """What the guard reads; an upstream gets whatever else is sent, unread, and checks it."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
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


def routes(service: Service, relay: Relay | None) -> APIRouter:
    """The endpoint: answered by the upstream if there is one, else by the guard's own model."""
    router = APIRouter()
    what: dict[int | str, dict[str, Any]] = {
        200: {"model": ChatResponse, "content": {"text/event-stream": {}}}
    }

    async def own(request: Request, body: ChatRequest) -> Response:
        """Answer a chat, unless the guard's verdict forbids it."""
        return await _own(Case(service, request, "chat"), body, request)

    async def through(request: Request, body: Chat) -> Response:
        """Have the upstream answer a chat, unless the guard's verdict forbids it."""
        assert relay is not None
        return await _through(relay, Case(service, request, "chat"), body, request)

    how: dict[str, Any] = dict(methods=["POST"], name="completions", responses=what)
    answer = own if relay is None else through
    router.add_api_route("/v1/chat/completions", answer, response_model=None, **how)
    return router


async def _through(relay: Relay, case: Case, body: Chat, request: Request) -> Response:
    """Judge, then ask the upstream."""
    try:
        worst = await _worst(case, await _read(case, body.messages))
    except Fault as fault:
        if not case.service.forgives(fault):
            raise
        return await relay.ask(request, bool(body.stream), note_of(case, fault))
    if case.service.action(worst) == "block":
        return _refusal(case, body, worst)
    return await relay.ask(request, bool(body.stream), note_of(case, worst))


async def _read(case: Case, messages: list[ChatMessage]) -> list[Prompt]:
    """The prompts of a chat; one that goes on unread is noted, by what of it is text."""
    try:
        prompts = prompts_of(messages)
        if len(prompts) > case.service.options.max_inputs:
            raise BadRequest("The chat has too many messages after one another by one role.")
    except BadRequest as fault:
        if case.service.forgives(fault):
            await case.failed(case.placed([legible(messages)]), fault, answered=True)
        raise
    return case.placed(prompts)


async def _worst(case: Case, prompts: list[Prompt]) -> Judgement:
    """Of a chat that the guard reads as several prompts, the judgement that counts."""
    found = await case.judge(prompts)
    await case.decided(prompts, found, [case.service.action(one) for one in found])
    return max(found, key=severity)


def severity(judgement: Judgement) -> tuple[int, float]:
    """What is worse is greater; scores alone do not tell, as long prompts have no band."""
    verdict = judgement.verdict
    return SEVERITY.index(verdict.decision), verdict.score


async def _own(case: Case, body: ChatRequest, request: Request) -> Response:
    """Read and judge in one pass, then go on from it."""
    service = case.service
    _require_plain(body)
    [prompt], sampling = case.placed([prompt_of(body.messages)]), _sampling(service, body)

    def halt(event: Judgement | GuardError) -> bool:
        if isinstance(event, Judgement):
            return service.action(event) == "block"
        return not service.forgives(Unavailable())

    talk = Talk(prompt, sampling, halt)
    request.state.ending.callback(talk.cancel)
    judged = await _judged(case, talk, request)
    if isinstance(judged, Judgement) and service.action(judged) == "block":
        return _refusal(case, body, judged)
    reply = _reply(case, body, judged)
    if body.stream:
        return StreamingResponse(_stream(case, talk, reply), media_type="text/event-stream")
    return await _whole(talk, reply, request)


async def _judged(case: Case, talk: Talk, request: Request) -> Judged:
    """The verdict, logged; or the fault in its place, if the chat is to be answered all the same.

    Only a judgement that failed can be forgiven here: before it there is no pass to go on from.
    """
    prompts = [talk.prompt]
    try:
        await case.service.scorer.begin(talk)
        event = await wanted(_soon(talk, case.service.options.deadline), request)
    except Fault as fault:
        await case.failed(prompts, fault, answered=False)
        raise
    if isinstance(event, Judgement):
        await case.decided(prompts, [event], [case.service.action(event)])
        return event
    lack = Unavailable("The guard cannot give a verdict on this prompt.")
    forgiven = case.service.forgives(lack)
    await case.failed(prompts, lack, answered=forgiven)
    if not forgiven:
        raise lack
    return lack


async def _soon(talk: Talk, seconds: float) -> Event:
    try:
        async with asyncio.timeout(seconds):
            return await talk.next()
    except TimeoutError:
        raise Unavailable(f"No verdict came within {seconds:g} seconds.") from None


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
    most = service.options.max_reply
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    how = Sampling(max_tokens=most, seed=body.seed, stop=stop)
    asked = body.max_completion_tokens or body.max_tokens
    how = replace(how, max_tokens=min(most, asked or most))
    if body.temperature is not None:
        how = replace(how, temperature=body.temperature)
    return how if body.top_p is None else replace(how, top_p=body.top_p)


def _reply(case: Case, body: Chat, judged: Judged) -> Reply:
    usage = body.stream_options is not None and body.stream_options.include_usage
    mark, name = case.id.removeprefix("req-"), case.service.options.name
    return Reply(mark, name, note_of(case, judged), usage=usage)


async def _stream(case: Case, talk: Talk, reply: Reply) -> AsyncIterator[str]:
    """The reply as server-sent events."""
    try:
        case.service.telemetry.first_token.observe(perf_counter() - case.began)
        yield reply.first()
        while True:
            event = await talk.next()
            if isinstance(event, End):
                yield reply.last(event.finish, usage_of(event.prompt_tokens, event.reply_tokens))
                return
            yield reply.piece(str(event))
    except Fault as fault:  # the answer has begun: an event is all that can still be said
        yield event_of(fault.body)


async def _whole(talk: Talk, reply: Reply, request: Request) -> Response:
    """The reply in one; it stops, too, if the client has left meanwhile."""
    said = list[str]()
    while not isinstance(event := await talk.next(), End):
        said.append(str(event))
        if len(said) % CHECK == 0 and await request.is_disconnected():
            return Response()
    usage = usage_of(event.prompt_tokens, event.reply_tokens)
    return reply.whole("".join(said), event.finish, usage)


def _refusal(case: Case, body: Chat, judged: Judgement) -> Response:
    """What a blocked chat is answered with."""
    text, reply = case.service.options.refusal, _reply(case, body, judged)
    if not body.stream:
        return reply.whole(text, "content_filter", usage_of(0, 0), refusal=text)
    events = [reply.first(), reply.piece(text), reply.last("content_filter", usage_of(0, 0))]
    return StreamingResponse(_each(events), media_type="text/event-stream")


async def _each(events: list[str]) -> AsyncIterator[str]:
    for event in events:
        yield event
