"""Chats that another OpenAI-compatible service answers, once the guard has let them through."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from latentguard.serve.config import ServeConfig
from latentguard.serve.disconnects import run_while_connected
from latentguard.serve.errors import BadRequest, UpstreamError
from latentguard.serve.replies import sse_event

log = logging.getLogger("latentguard.serve")

TIMEOUT = httpx.Timeout(10.0, read=120.0)
"""Seconds to connect, and until the answer begins or the next piece of it comes."""

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100)
"""As many chats as this service admits: one that waits for a connection would be a 502."""

MOST = 8 << 20
"""Bytes of an answer that is read whole."""


class UpstreamClient:
    """Sends a request on, and its answer back."""

    def __init__(self, config: ServeConfig, *, own_keys: bool) -> None:
        """Prepare.

        Args:
            config: Where the upstream is, and its key.
            own_keys: Whether clients show this service's keys: these are never sent on.
        """
        assert config.upstream is not None
        self._url = config.upstream.rstrip("/")
        self._key, self._own_keys = config.upstream_key, own_keys
        self._client = httpx.AsyncClient(timeout=TIMEOUT, limits=LIMITS)

    async def ask(
        self, request: Request, body: Mapping[str, Any], note: Mapping[str, Any]
    ) -> Response:
        """The upstream's answer to a chat.

        Args:
            request: Of the client.
            body: What is sent: what was parsed, since another parser could find another chat in
                the client's bytes, as where an object names a key twice.
            note: Added to the answer.

        Raises:
            BadRequest: if the body holds NaN or infinity.
            UpstreamError: if it cannot be reached, or fails.
        """
        try:
            content = json.dumps(body, allow_nan=False)
        except ValueError:
            raise BadRequest("The body holds a number that JSON does not know.") from None
        sent = self._request("POST", "chat/completions", request, content)
        stream = bool(body.get("stream"))
        return await self._told(request, self._answer(request, sent, stream, note))

    async def models(self, request: Request) -> Response:
        """The upstream's models, which chats name; the guard's own model need not be one of them.

        Raises:
            UpstreamError: if it cannot be reached, or fails.
        """
        sent = self._request("GET", "models", request)
        return await self._told(request, self._answer(request, sent, stream=False, note={}))

    async def close(self) -> None:
        """Close connections."""
        await self._client.aclose()

    async def _told(self, request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
        try:
            return await run_while_connected(answer, request)
        except httpx.HTTPError as error:
            log.error("The upstream cannot be reached: %r", error)
            raise UpstreamError("The upstream service cannot be reached.") from None

    async def _answer(
        self, request: Request, sent: httpx.Request, stream: bool, note: Mapping[str, Any]
    ) -> Response:
        answer = await self._client.send(sent, stream=True)
        request.state.ending.push_async_callback(answer.aclose)  # a stream may never be begun
        if answer.status_code >= 500:
            log.error("The upstream answered %s.", answer.status_code)
            raise UpstreamError("The upstream service failed.")
        if stream and answer.status_code == 200:
            return StreamingResponse(_noted(answer, note), media_type="text/event-stream")
        return await _whole(answer, note)

    def _request(
        self, method: str, path: str, request: Request, content: str | None = None
    ) -> httpx.Request:
        url, headers = f"{self._url}/{path}", self._headers(request)
        return self._client.build_request(method, url, content=content, headers=headers)

    def _headers(self, request: Request) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        elif not self._own_keys and "authorization" in request.headers:
            headers["authorization"] = request.headers["authorization"]
        return headers


async def _whole(answer: httpx.Response, note: Mapping[str, Any]) -> Response:
    content = b""
    async for piece in answer.aiter_bytes():
        content += piece
        if len(content) > MOST:
            raise UpstreamError("The upstream's answer is too long.")
    kept = {name: answer.headers[name] for name in ("retry-after",) if name in answer.headers}
    body = _object(content, answer.status_code) | dict(note)
    return JSONResponse(body, status_code=answer.status_code, headers=kept)


def _object(content: bytes, status: int) -> dict[str, Any]:
    """An answer's object; a proxy before the upstream may refuse in words that are no JSON."""
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if isinstance(body, dict):
        return body
    if status < 400:
        raise UpstreamError("The upstream's answer is no JSON object.")
    return BadRequest(f"The upstream service refused the request with status {status}.").body


async def _noted(answer: httpx.Response, note: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """The events as they come; the note goes into the first."""
    left = dict(note)
    try:
        async for line in _lines(answer):
            if left and line.startswith(b"data: {"):
                line = b"data: " + json.dumps(json.loads(line[6:]) | left).encode()  # noqa: PLW2901
                left = {}
            yield line + b"\n"
    except (httpx.HTTPError, ValueError) as error:
        log.error("The upstream broke off: %r", error)
        yield sse_event(UpstreamError("The upstream service broke off.").body).encode()


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Lines as events have them; ``aiter_lines`` ends one at U+2028, too, which JSON may hold."""
    rest = b""
    async for piece in answer.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest
