"""``/ext_authz/...``: Envoy asks whether a chat may go on, as the client sent it.

Nothing can be rewritten here, so what is read has to be what the upstream reads. A chat is refused
if its bytes could be read in two ways: a key that is named twice, several parts of a message, which
a template may join otherwise, control tokens, another encoding. In the Responses API an item is
refused, too, if it has an id, by which an upstream may find another text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from latentguard.prompts import Prompt
from latentguard.serve.chat_request import ForwardedChat, forwarded_chat
from latentguard.serve.completions import Chat
from latentguard.serve.config import ServeConfig
from latentguard.serve.decision import is_blocked
from latentguard.serve.errors import ApiError, BadRequest, Flagged, NotJudged, PayloadTooLarge
from latentguard.serve.messages import readable_text
from latentguard.serve.request_errors import describe_errors
from latentguard.serve.response_request import (
    TEXT_PARTS,
    ResponseRequest,
    forwarded_response,
    input_items,
    readable_request,
)
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.service import RequestContext, Service

PREFIX = "/ext_authz"
"""Envoy's ``path_prefix``: the path of the client's request follows."""

PARTIAL = "x-envoy-auth-partial-body"
"""Envoy's header that the body was cut."""

AnyRequest = TypeVar("AnyRequest", bound=BaseModel)


@dataclass(frozen=True)
class _Chat:
    """A chat in either API."""

    model: str | None
    """Its model."""

    text: Prompt
    """What of it is text, for the log of one that cannot be judged."""

    read: Callable[[ServeConfig], ForwardedChat]
    """What is read of it; an error if it would have to be rewritten."""


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

    @router.api_route(PREFIX + "/{path:path}", methods=methods, include_in_schema=False)
    async def check(request: Request) -> Response:
        """200 if the chat may go on, else why not."""
        find = next((APIS[end] for end in APIS if request.url.path.endswith(end)), None)
        if request.method != "POST" or find is None:
            raise NotJudged("Only chats are judged here; let Envoy ask for their path alone.")
        chat = find(_parsed(await request.body(), request), service)
        context = RequestContext(service, request, "ext_authz", model=chat.model)
        return await _judge(context, chat)

    return router


def _parsed(content: bytes, request: Request) -> Any:
    """The body, if every parser reads the same in it."""
    if request.headers.get(PARTIAL, "false").lower() == "true":
        raise PayloadTooLarge("Envoy sent only a part of the body; raise its max_request_bytes.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadRequest("The body is compressed; this guard reads plain JSON.")
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except ValueError:  # other bytes, or a mark of their order
        raise BadRequest("The body is not JSON in UTF-8.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise BadRequest("The body names a key twice.")
    return values


def _refuse_constant(_: str) -> Any:
    raise BadRequest("The body holds a number that JSON does not know.")


def _validated(body: Any, kind: type[AnyRequest]) -> AnyRequest:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise BadRequest(describe_errors(error.errors())) from None


def _completions(body: Any, service: Service) -> _Chat:
    """A body of Chat Completions."""
    chat = _validated(body, Chat)

    def read(config: ServeConfig) -> ForwardedChat:
        for message in body["messages"]:
            if isinstance(message.get("content"), list) and len(message["content"]) > 1:
                raise BadRequest("A message has several parts; send its text as one.")
        return forwarded_chat(body, config, service.control_tokens)

    return _Chat(chat.model, readable_text(chat.messages), read)


def _response(body: Any, service: Service) -> _Chat:
    """A body of the Responses API."""
    asked = _validated(body, ResponseRequest)

    def read(config: ServeConfig) -> ForwardedChat:
        forwarded = forwarded_response(asked, config, service.control_tokens)
        for item, rebuilt in zip(input_items(asked.input), forwarded.body["input"], strict=True):
            if _plain_item(item) != _plain_item(rebuilt):
                raise BadRequest(
                    "An item would have to be rewritten; send its text as one, without an id, "
                    "annotations and log-probabilities."
                )
        return forwarded

    return _Chat(asked.model, readable_request(asked), read)


def _plain_item(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item without what says nothing, a lone part of text as the text that it is."""
    values = {"type": "message"} | {n: v for n, v in item.items() if v and n != "status"}
    return {name: _lone_text(value) for name, value in values.items()}


def _lone_text(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        part = {name: one for name, one in value[0].items() if one}
        if part.pop("type", None) in TEXT_PARTS and set(part) <= {"text"}:
            return part.get("text")
    return value


APIS = {"/chat/completions": _completions, "/responses": _response}
"""How the path of a chat ends; nothing else goes on."""


async def _judge(context: RequestContext, chat: _Chat) -> Response:
    service = context.service
    config = service.config
    if config.control_tokens == "escape":  # would be a rewriting
        config = replace(config, control_tokens="refuse")
    try:
        sent = chat.read(config)
        scored = await context.score_readings(sent.readings)
    except ApiError as error:
        await context.go_on_without_verdict(chat.text, error)
        return Response()
    if not scored:
        await context.record_unread(sent.context)
        return Response()
    outcome = await context.record_chat(sent.readings, scored)
    if is_blocked(service.config, outcome):
        raise Flagged(service.config.refusal)
    return Response(headers=_headers(service.config, outcome))


def _headers(config: ServeConfig, outcome: ScoredPrompt) -> dict[str, str]:
    """What Envoy may pass on to the upstream; a shadow says nothing."""
    if config.policy == "shadow":
        return {}
    headers = {"x-latentguard-score": f"{outcome.verdict.score:.4f}"}
    if config.on_review != "pass":
        headers["x-latentguard-decision"] = outcome.verdict.decision
    return headers
