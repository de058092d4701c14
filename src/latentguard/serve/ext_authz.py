"""``/ext_authz/...``: Envoy asks whether a chat may go on, as the client sent it.

Nothing can be rewritten here, so what is read has to be what the upstream reads. A chat is refused
if its bytes could be read in two ways: a key that is named twice, several parts of a message, which
a template may join otherwise, control tokens, another encoding.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from latentguard.serve.chat_request import ForwardedChat, forwarded_chat
from latentguard.serve.completions import Chat
from latentguard.serve.config import ServeConfig
from latentguard.serve.decision import is_blocked
from latentguard.serve.errors import ApiError, BadRequest, Flagged, NotJudged, PayloadTooLarge
from latentguard.serve.messages import readable_text
from latentguard.serve.request_errors import describe_errors
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.service import RequestContext, Service

PREFIX = "/ext_authz"
"""Envoy's ``path_prefix``: the path of the client's request follows."""

JUDGED = "/chat/completions"
"""How the path of a chat ends; nothing else goes on."""

PARTIAL = "x-envoy-auth-partial-body"
"""Envoy's header that the body was cut."""


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

    @router.api_route(PREFIX + "/{path:path}", methods=methods, include_in_schema=False)
    async def check(request: Request) -> Response:
        """200 if the chat may go on, else why not."""
        if request.method != "POST" or not request.url.path.endswith(JUDGED):
            raise NotJudged("Only chats are judged here; let Envoy ask for their path alone.")
        body = _parsed(await request.body(), request)
        chat = _validated(body)
        context = RequestContext(service, request, "ext_authz", model=chat.model)
        return await _judge(context, chat, body)

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


def _validated(body: Any) -> Chat:
    try:
        return Chat.model_validate(body)
    except ValidationError as error:
        raise BadRequest(describe_errors(error.errors())) from None


async def _judge(context: RequestContext, chat: Chat, body: dict[str, Any]) -> Response:
    service = context.service
    try:
        sent = _as_sent(body, service)
        scored = await context.score_readings(sent.readings)
    except ApiError as error:
        await context.go_on_without_verdict(readable_text(chat.messages), error)
        return Response()
    if not scored:
        await context.record_unread(sent.context)
        return Response()
    outcome = await context.record_chat(sent.readings, scored)
    if is_blocked(service.config, outcome):
        raise Flagged(service.config.refusal)
    return Response(headers=_headers(service.config, outcome))


def _as_sent(body: dict[str, Any], service: Service) -> ForwardedChat:
    """What is read of a chat whose bytes go on as they are.

    Raises:
        BadRequest: if it would have to be rewritten.
    """
    for message in body["messages"]:
        if isinstance(message.get("content"), list) and len(message["content"]) > 1:
            raise BadRequest("A message has several parts; send its text as one.")
    config = service.config
    if config.control_tokens == "escape":
        config = replace(config, control_tokens="refuse")
    return forwarded_chat(body, config, service.control_tokens)


def _headers(config: ServeConfig, outcome: ScoredPrompt) -> dict[str, str]:
    """What Envoy may pass on to the upstream; a shadow says nothing."""
    if config.policy == "shadow":
        return {}
    headers = {"x-latentguard-score": f"{outcome.verdict.score:.4f}"}
    if config.on_review != "pass":
        headers["x-latentguard-decision"] = outcome.verdict.decision
    return headers
