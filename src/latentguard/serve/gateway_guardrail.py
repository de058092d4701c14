"""``POST /beta/litellm_basic_guardrail_api``: LiteLLM's generic contract for guardrails.

The gateway sends the texts of a request and its messages; the answer is ``NONE`` or ``BLOCKED``.
Everything is read as in ``/v1/chat/completions``: each message by itself and the last in context.
Texts of replies pass unread, as the guard reads what is asked. An image cannot be read, which is an
error, and so the gateway blocks it unless it was told to go on after errors. A shadow passes it.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from latentguard.prompts import Prompt
from latentguard.serve.chat_readings import (
    ChatReading,
    OtherText,
    chat_readings,
    separate_readings,
)
from latentguard.serve.chat_request import require_few
from latentguard.serve.decision import is_blocked
from latentguard.serve.errors import ApiError, BadRequest
from latentguard.serve.json_texts import texts_of
from latentguard.serve.messages import ChatMessage, readable_text
from latentguard.serve.parameters import texts_in
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.service import RequestContext, Service

PATH = "/beta/litellm_basic_guardrail_api"

ENDPOINT = "guardrail"
"""In metrics and in the audit log."""


class GuardrailRequest(BaseModel):
    """What the gateway asks; fields that hold no text of a client are left out."""

    model_config = ConfigDict(extra="ignore")

    input_type: Literal["request", "response"]
    """Whether it is asked of a model, or what a model replied."""

    texts: list[str] | None = None
    """Every text of the request or the reply."""

    structured_messages: list[ChatMessage] | None = None
    """The request's messages."""

    images: list[str] | None = None
    """Cannot be read."""

    tools: list[dict[str, Any]] | None = None
    """Descriptions of tools; their texts are in none of the fields above."""

    tool_calls: list[dict[str, Any]] | None = None
    """Calls of tools in the request."""


class GuardrailResponse(BaseModel):
    """What the gateway is to do."""

    action: Literal["NONE", "BLOCKED"]
    """Go on, or refuse the request."""

    blocked_reason: str | None = None
    """A sentence for the client, without its text."""


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post(PATH, response_model=GuardrailResponse)
    async def guardrail(request: Request, body: GuardrailRequest) -> Any:
        """Say whether a gateway may go on with a request, in LiteLLM's generic contract."""
        context = RequestContext(service, request, ENDPOINT)
        if body.input_type == "response":
            return GuardrailResponse(action="NONE")
        outcome = await _judge(context, body)
        if outcome is None or not is_blocked(service.config, outcome):
            return GuardrailResponse(action="NONE")
        verdict = outcome.verdict
        category = f", category {verdict.category}" if verdict.category else ""
        reason = f"The guard blocks this request (probability {verdict.probability:.2f}{category})."
        return GuardrailResponse(action="BLOCKED", blocked_reason=reason)

    return router


async def _judge(context: RequestContext, body: GuardrailRequest) -> ScoredPrompt | None:
    """The recorded verdict; None if there is nothing to read, or none for a shadow.

    Raises:
        ApiError: if there is no verdict, unless the gateway goes on all the same.
    """
    readings: list[ChatReading] = []
    try:
        readings = _readings(context.service, body)
        if not readings:
            return None
        require_few(readings, context.service.config)
        scored = await context.score_readings(readings)
    except ApiError as error:
        prompt = readings[0].prompt if readings else _readable_text(body)
        await context.go_on_without_verdict(prompt, error)
        return None
    return await context.record_chat(readings, scored)


def _readable_text(body: GuardrailRequest) -> Prompt:
    """What of a request is text, for the log of one that cannot be judged."""
    messages = body.structured_messages
    return readable_text(messages) if messages else Prompt("\n".join(body.texts or ()), id="chat")


def _readings(service: Service, body: GuardrailRequest) -> list[ChatReading]:
    """What is read: the messages as a chat, and every other text by itself.

    Raises:
        BadRequest: if there is an image, or a message holds something that is not read.
    """
    if body.images:
        raise BadRequest("Images cannot be read, so there is no verdict on this request.")
    messages = [*(body.structured_messages or ())]
    for message in messages:
        message.require_readable()
    message_texts = {message.text for message in messages}
    texts = [text for text in body.texts or () if text.strip() and text not in message_texts]
    schemas = texts_in({"tools": body.tools} if body.tools else {}, service.config.tools)
    calls = texts_of(body.tool_calls)
    others: list[OtherText] = [("schema", text) for text in schemas]
    others += [("call", text) for text in calls]
    how: dict[str, Any] = dict(
        trusted_roles=service.config.trusted_roles, sources=service.config.sources
    )
    if any(message.speaker == "user" and message.text.strip() for message in messages):
        others += [("user", text) for text in texts]
        return chat_readings(messages, other_texts=others, **how)
    messages += [ChatMessage(role="user", content=text) for text in texts]
    return separate_readings(messages, other_texts=others, **how)
