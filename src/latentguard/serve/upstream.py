"""Chats that another OpenAI-compatible service answers, once the guard has let them through."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from latentguard.serve.faults import BadRequest, Upstream
from latentguard.serve.options import Options

log = logging.getLogger("latentguard.serve")

TIMEOUT = httpx.Timeout(10.0, read=120.0)
"""Seconds to connect, and between two pieces of an answer."""

MOST = 8 << 20
"""Bytes of an answer that is read whole."""


class Relay:
    """Sends a request on, and its answer back.

    What is sent is what was parsed, not the bytes that came: another parser could find another chat
    in them, where an object names a key twice.
    """

    def __init__(self, options: Options, *, own_keys: bool) -> None:
        """Prepare.

        Args:
            options: Where the upstream is, and its key.
            own_keys: Whether clients show this service's keys: these are never sent on.
        """
        assert options.upstream is not None
        self._url = f"{options.upstream.rstrip('/')}/chat/completions"
        self._key, self._own_keys = options.upstream_key, own_keys
        self._client = httpx.AsyncClient(timeout=TIMEOUT)

    async def ask(self, request: Request, stream: bool, note: Mapping[str, Any]) -> Response:
        """The upstream's answer, with ``note`` in it.

        Raises:
            BadRequest: if the body holds NaN or infinity.
            Upstream: if it cannot be reached, or fails.
        """
        try:
            content = json.dumps(await request.json(), allow_nan=False)
        except ValueError:
            raise BadRequest("The body holds a number that JSON does not know.") from None
        sent = self._client.build_request(
            "POST", self._url, content=content, headers=self._headers(request)
        )
        try:
            answer = await self._client.send(sent, stream=True)
            if answer.status_code >= 500:
                log.error("The upstream answered %s.", answer.status_code)
                await answer.aclose()
                raise Upstream("The upstream service failed.")
            if stream and answer.status_code == 200:
                events = _noted(answer, note)
                return StreamingResponse(events, media_type="text/event-stream")
            return await _whole(answer, note)
        except httpx.HTTPError as error:
            log.error("The upstream cannot be reached: %r", error)
            raise Upstream("The upstream service cannot be reached.") from None

    async def close(self) -> None:
        """Close connections."""
        await self._client.aclose()

    def _headers(self, request: Request) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        elif not self._own_keys and "authorization" in request.headers:
            headers["authorization"] = request.headers["authorization"]
        return headers


async def _whole(answer: httpx.Response, note: Mapping[str, Any]) -> Response:
    content = b""
    try:
        async for piece in answer.aiter_bytes():
            content += piece
            if len(content) > MOST:
                raise Upstream("The upstream's answer is too long.")
    finally:
        await answer.aclose()
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Upstream("The upstream's answer is no JSON object.")
    return JSONResponse(body | dict(note), status_code=answer.status_code)


async def _noted(answer: httpx.Response, note: Mapping[str, Any]) -> AsyncIterator[str]:
    """The events as they come; the note goes into the first."""
    left = dict(note)
    try:
        async for line in answer.aiter_lines():
            if left and line.startswith("data: {"):
                line = f"data: {json.dumps(json.loads(line[6:]) | left)}"  # noqa: PLW2901
                left = {}
            yield f"{line}\n"
    except (httpx.HTTPError, ValueError) as error:
        log.error("The upstream broke off: %r", error)
        yield f"data: {json.dumps(Upstream('The upstream service broke off.').body)}\n\n"
    finally:
        await answer.aclose()
