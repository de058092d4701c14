"""Chats that another OpenAI-compatible service answers, once the guard has let them through."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import httpx
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from latentguard.serve.config import ServeConfig
from latentguard.serve.disconnects import run_while_connected
from latentguard.serve.errors import ApiError, BadRequest, UpstreamError
from latentguard.serve.replies import sse_event
from latentguard.serve.upstream_formats import AnswerFormat, stream_events, strict_json
from latentguard.serve.upstream_replies import FollowedReply

log = logging.getLogger("latentguard.serve")

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100)
"""As many chats as this service admits: one that waits for a connection would be a 502."""

MAX_ANSWER = 8 << 20
"""Bytes of an answer that is read whole."""

MAX_LINE = 1 << 20
"""Bytes of a line of a stream."""

PROBE_SECONDS = 5.0
"""For so long it is remembered whether the upstream could be reached."""

MODEL = re.compile(r"\w[\w.:-]{0,127}", re.ASCII)
"""A model as part of a path; none climbs out of it."""

TRACE_HEADERS = ("traceparent", "tracestate", "x-request-id")
"""Sent on as the client sent them, so that a request can be followed."""

UNREACHABLE = "The upstream service cannot be reached."


@dataclass(frozen=True)
class Forwarding:
    """How a request is sent on, and its answer sent back."""

    path: str
    """Below the upstream's URL; ``{model}`` is the request's model."""

    form: AnswerFormat
    """How the answer is written."""

    note: Mapping[str, Any]
    """Added to the answer."""

    reply: FollowedReply | None = None
    """Reads the answer before it is sent back; None sends it back unread."""


class UpstreamClient:
    """Sends a request on, and its answer back."""

    def __init__(self, config: ServeConfig, *, own_keys: bool) -> None:
        """Prepare.

        Args:
            config: Where the upstream is, its key and its times.
            own_keys: Whether clients show this service's keys: these are never sent on.
        """
        assert config.upstream is not None
        self._url = httpx.URL(config.upstream)
        self._key, self._key_header = config.upstream_key, config.upstream_key_header
        self._own_keys = own_keys
        self._models_path = config.upstream_models_path
        timeout = httpx.Timeout(config.upstream_connect_seconds, read=config.upstream_read_seconds)
        self._client = httpx.AsyncClient(timeout=timeout, limits=LIMITS)
        self._probe_lock = asyncio.Lock()
        self._probed, self._is_reachable = -PROBE_SECONDS, False

    def use_key(self, key: str | None) -> None:
        """Show the upstream this key from now on."""
        self._key = key

    async def ask(self, request: Request, body: Mapping[str, Any], how: Forwarding) -> Response:
        """The upstream's answer to a chat.

        Args:
            request: Of the client.
            body: What is sent: what was parsed, since another parser could find another chat in
                the client's bytes, as where an object names a key twice.
            how: It is sent on, and what comes back.

        Raises:
            BadRequest: if the body holds NaN or infinity, or no model where the path needs it.
            UpstreamError: if it cannot be reached, or fails.
        """
        try:
            content = json.dumps(body, allow_nan=False)
        except ValueError:
            raise BadRequest("The body holds a number that JSON does not know.") from None
        outgoing = self._request("POST", _filled(how.path, body), request, content)
        answer = self._streamed if body.get("stream") else self._answer
        return await self._within(request, answer(request, outgoing, how))

    async def models(self, request: Request) -> Response:
        """The upstream's models, which chats name; the guard's own model need not be one of them.

        Raises:
            UpstreamError: if it cannot be reached, or fails.
        """
        outgoing = self._request("GET", self._models_path, request)
        return await self._within(request, self._answer(request, outgoing))

    async def require_reachable(self) -> None:
        """Check that the upstream answers; it is asked at most every few seconds.

        Raises:
            UpstreamError: if it does not, or fails.
        """
        async with self._probe_lock:
            if monotonic() - self._probed >= PROBE_SECONDS:
                self._is_reachable = await self._probe()
                self._probed = monotonic()
        if not self._is_reachable:
            raise UpstreamError(UNREACHABLE)

    async def close(self) -> None:
        """Close connections."""
        await self._client.aclose()

    async def _probe(self) -> bool:
        try:
            answer = await self._client.get(
                self._at(self._models_path), headers=self._own_headers()
            )
        except httpx.HTTPError:
            return False
        return answer.status_code < 500

    async def _within(self, request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
        """The answer, as long as the client is there."""
        try:
            return await run_while_connected(answer, request)
        except httpx.HTTPError as error:
            log.error("The upstream cannot be reached: %r", error)
            raise UpstreamError(UNREACHABLE) from None

    async def _answer(
        self, request: Request, outgoing: httpx.Request, how: Forwarding | None = None
    ) -> Response:
        return await _whole(await self._send(request, outgoing), how)

    async def _streamed(
        self, request: Request, outgoing: httpx.Request, how: Forwarding
    ) -> Response:
        answer = await self._send(request, outgoing)
        if answer.status_code != 200:
            return await _whole(answer, how)
        return StreamingResponse(_events(answer, how), media_type="text/event-stream")

    async def _send(self, request: Request, outgoing: httpx.Request) -> httpx.Response:
        """The beginning of the upstream's answer.

        Raises:
            UpstreamError: if it fails, or refuses this service.
        """
        answer = await self._client.send(outgoing, stream=True)
        request.state.ending.push_async_callback(answer.aclose)  # a stream may never be begun
        if answer.status_code >= 500:
            log.error("The upstream answered %s.", answer.status_code)
            raise UpstreamError("The upstream service failed.")
        if answer.status_code in (401, 403) and not self._shows_clients_key:
            log.error("The upstream answered %s: check its key.", answer.status_code)
            raise UpstreamError("The upstream service refused this service.")
        return answer

    @property
    def _shows_clients_key(self) -> bool:
        return not self._key and not self._own_keys

    def _request(
        self, method: str, path: str, request: Request, content: str | None = None
    ) -> httpx.Request:
        headers = self._own_headers() | _sendable(request, TRACE_HEADERS)
        if self._shows_clients_key:
            headers |= _sendable(request, ("authorization",))
        return self._client.build_request(method, self._at(path), content=content, headers=headers)

    def _at(self, path: str) -> httpx.URL:
        """A path below the upstream's; its query goes with each request."""
        return self._url.copy_with(path=f"{self._url.path.rstrip('/')}/{path}")

    def _own_headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self._key and self._key_header.lower() == "authorization":
            headers["authorization"] = f"Bearer {self._key}"
        elif self._key:
            headers[self._key_header] = self._key
        return headers


def _filled(path: str, body: Mapping[str, Any]) -> str:
    """A path with the request's model in its place."""
    if "{model}" not in path:
        return path
    model = body.get("model")
    if not isinstance(model, str) or not MODEL.fullmatch(model):
        raise BadRequest("'model' has to name a model of the upstream.")
    return path.replace("{model}", model)


def _sendable(request: Request, names: Sequence[str]) -> dict[str, str]:
    """Headers of a request that are plain ASCII; no other is sent on."""
    values = {name: request.headers.get(name, "") for name in names}
    return {name: value for name, value in values.items() if value and value.isascii()}


async def _whole(answer: httpx.Response, how: Forwarding | None) -> Response:
    content = b""
    async for piece in answer.aiter_bytes():
        content += piece
        if len(content) > MAX_ANSWER:
            raise UpstreamError("The upstream's answer is too long.")
    headers = {name: answer.headers[name] for name in ("retry-after",) if name in answer.headers}
    body = _object(content, answer.status_code)
    if how is not None:
        body |= how.note
        if how.reply is not None and answer.status_code == 200:
            body = await how.reply.whole(body)
    return Response(strict_json(body), answer.status_code, headers, media_type="application/json")


def _object(content: bytes, status: int) -> dict[str, Any]:
    """An answer's object; a proxy before the upstream may refuse in words that are no JSON."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, dict):
        return body
    if status < 400:
        raise UpstreamError("The upstream's answer is no JSON object.")
    return BadRequest(f"The upstream service refused the request with status {status}.").body


async def _events(answer: httpx.Response, how: Forwarding) -> AsyncIterator[bytes]:
    """The events as they come, or once they were read, with the note where the format has it."""
    events = stream_events(_lines(answer))
    try:
        async for event in events if how.reply is None else how.reply.stream(events):
            yield how.form.with_verdict(event, how.note).content
    except (httpx.HTTPError, UpstreamError, ValueError, RecursionError) as error:
        log.error("The upstream broke off: %s", type(error).__name__)
        yield sse_event(UpstreamError("The upstream service broke off.").body).encode()
    except ApiError as error:  # the reply cannot be read, or its verdict cannot be logged
        yield sse_event(error.body).encode()


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Lines as events have them; ``aiter_lines`` ends one at U+2028, too, which JSON may hold.

    Raises:
        UpstreamError: if a line is too long.
    """
    rest = b""
    async for piece in answer.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_LINE:
            raise UpstreamError("A line of the upstream's stream is too long.")
    if rest:
        yield rest
