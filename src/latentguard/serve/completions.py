"""``POST /v1/chat/completions``: a chat, answered only once its verdict is known and logged."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from latentguard.models.conversation import Sampling
from latentguard.serve.answers import AnswerStyle, UpstreamRequest, answer_alone, answer_through
from latentguard.serve.chat_readings import chat_readings
from latentguard.serve.chat_request import forwarded_chat, require_few
from latentguard.serve.errors import BadRequest
from latentguard.serve.messages import ChatMessage, own_model_prompt, readable_text
from latentguard.serve.replies import ChatResponse, ChatWriter, ScoredOrError, verdict_note
from latentguard.serve.service import RequestContext, Service
from latentguard.serve.upstream import UpstreamClient
from latentguard.serve.upstream_formats import ChatFormat


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
    """Have the upstream answer, if the verdict allows it."""
    config, tokens = context.service.config, context.service.control_tokens
    outgoing = UpstreamRequest(
        body,
        lambda: forwarded_chat(body, config, tokens),
        readable_text(chat.messages),
        config.upstream_chat_path,
        ChatFormat(),
    )
    return await answer_through(upstream, context, outgoing, _style(context, chat))


async def _own(context: RequestContext, body: ChatRequest) -> Response:
    """Have the guard's own model answer, if the verdict allows it."""
    service = context.service
    _require_plain(body)
    messages = [message.with_one_text() for message in body.messages]
    readings = chat_readings(
        messages,
        context=own_model_prompt(messages),
        trusted_roles=service.config.trusted_roles,
        sources=service.config.sources,
    )
    require_few(readings, service.config)
    return await answer_alone(context, _style(context, body), readings, _sampling(service, body))


def _style(context: RequestContext, chat: Chat) -> AnswerStyle:
    usage = chat.stream_options is not None and chat.stream_options.include_usage
    mark, name = context.id.removeprefix("req-"), context.service.config.name

    def write(judged: ScoredOrError) -> ChatWriter:
        return ChatWriter(mark, name, verdict_note(context, judged), usage=usage)

    return AnswerStyle(write, bool(chat.stream))


def _require_plain(body: ChatRequest) -> None:
    """The guard's own model answers with one text; what asks for more is turned away."""
    extra = body.model_extra or {}
    unsupported = [name for name in ("tools", "functions", "logprobs", "audio") if extra.get(name)]
    if (extra.get("response_format") or {"type": "text"}) != {"type": "text"}:
        unsupported.append("response_format")
    if (body.n or 1) > 1:
        unsupported.append("n")
    if unsupported:
        raise BadRequest(f"{', '.join(unsupported)}: the guard's own model cannot do this.")


def _sampling(service: Service, body: ChatRequest) -> Sampling:
    most = service.config.max_reply
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    how = Sampling(max_tokens=most, seed=body.seed, stop=stop)
    reply_tokens = body.max_completion_tokens or body.max_tokens
    how = replace(how, max_tokens=min(most, reply_tokens or most))
    if body.temperature is not None:
        how = replace(how, temperature=body.temperature)
    return how if body.top_p is None else replace(how, top_p=body.top_p)
