"""``POST /v1/responses``: OpenAI's Responses API, guarded as ``/v1/chat/completions`` is.

Nothing is kept between requests: a client sends the whole history each time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from latentguard.models.conversation import Sampling
from latentguard.serve.answers import AnswerStyle, UpstreamRequest, answer_alone, answer_through
from latentguard.serve.chat_request import require_few
from latentguard.serve.errors import BadRequest
from latentguard.serve.messages import own_model_prompt
from latentguard.serve.parameters import says_something
from latentguard.serve.replies import ScoredOrError, verdict_note
from latentguard.serve.response_request import (
    ReadRequest,
    ResponseRequest,
    forwarded_response,
    read_request,
    readable_request,
)
from latentguard.serve.response_writer import ResponseObject, ResponseWriter
from latentguard.serve.service import RequestContext, Service
from latentguard.serve.upstream import UpstreamClient
from latentguard.serve.upstream_formats import ResponsesFormat

PATH = "/v1/responses"

ENDPOINT = "responses"
"""In metrics and in the audit log."""


class OwnResponseRequest(ResponseRequest):
    """What the guard's own model reads besides, in the ranges that it can use."""

    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None


def routes(service: Service, upstream: UpstreamClient | None) -> APIRouter:
    """The endpoint: answered by the upstream if there is one, else by the guard's own model."""
    router = APIRouter()
    what: dict[int | str, dict[str, Any]] = {
        200: {"model": ResponseObject, "content": {"text/event-stream": {}}}
    }

    async def own(request: Request, body: OwnResponseRequest) -> Response:
        """Answer a request of OpenAI's Responses API, unless the guard's verdict forbids it."""
        context = RequestContext(service, request, ENDPOINT, model=body.model)
        return await _own(context, body)

    async def through(request: Request, body: ResponseRequest) -> Response:
        """Have the upstream answer a request, unless the guard's verdict forbids it."""
        assert upstream is not None
        context = RequestContext(service, request, ENDPOINT, model=body.model)
        return await _through(upstream, context, body, await request.json())

    how: dict[str, Any] = dict(methods=["POST"], name="responses", responses=what)
    answer = own if upstream is None else through
    router.add_api_route(PATH, answer, response_model=None, **how)
    return router


async def _through(
    upstream: UpstreamClient,
    context: RequestContext,
    body: ResponseRequest,
    content: dict[str, Any],
) -> Response:
    """Have the upstream answer, if the verdict allows it."""
    config, tokens = context.service.config, context.service.control_tokens
    outgoing = UpstreamRequest(
        content,
        lambda: forwarded_response(body, config, tokens),
        readable_request(body),
        config.upstream_responses_path,
        ResponsesFormat(),
    )
    return await answer_through(upstream, context, outgoing, _style(context, body))


async def _own(context: RequestContext, body: OwnResponseRequest) -> Response:
    """Have the guard's own model answer, if the verdict allows it."""
    service = context.service
    config = replace(service.config, control_tokens="forward")  # here they are text
    read = read_request(body, config, service.control_tokens)
    _require_plain(read)
    readings = read.readings(config, context=own_model_prompt(read.messages))
    require_few(readings, config)
    return await answer_alone(context, _style(context, body), readings, _sampling(service, body))


def _require_plain(read: ReadRequest) -> None:
    """Check that the guard's own model can answer: with one text, to messages alone.

    Raises:
        BadRequest: if it cannot.
    """
    unsupported = [name for name in ("tools", "top_logprobs") if read.parameters.get(name)]
    schema = (read.parameters.get("text") or {}).get("format")
    if says_something(schema):
        unsupported.append("text.format")
    unsupported += sorted({item["type"] for item in read.items} - {"message"})
    if unsupported:
        raise BadRequest(f"{', '.join(unsupported)}: the guard's own model cannot do this.")


def _sampling(service: Service, body: OwnResponseRequest) -> Sampling:
    most = service.config.max_reply
    how = Sampling(max_tokens=min(most, body.max_output_tokens or most))
    if body.temperature is not None:
        how = replace(how, temperature=body.temperature)
    return how if body.top_p is None else replace(how, top_p=body.top_p)


def _style(context: RequestContext, body: ResponseRequest) -> AnswerStyle:
    mark, name = context.id.removeprefix("req-"), context.service.config.name
    extra = body.model_dump(include={"temperature", "top_p", "max_output_tokens", "metadata"})
    echo = {"instructions": body.instructions, **extra}

    def write(judged: ScoredOrError) -> ResponseWriter:
        return ResponseWriter(mark, name, verdict_note(context, judged), echo=echo)

    return AnswerStyle(write, bool(body.stream))
