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

KNOWN = frozenset(
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens "
    "max_tokens messages metadata modalities model n parallel_tool_calls prediction "
    "presence_penalty prompt_cache_key prompt_cache_retention reasoning_effort response_format "
    "safety_identifier seed service_tier stop store stream stream_options temperature tool_choice "
    "tools top_logprobs top_p user verbosity web_search_options".split()
)
"""Parameters of OpenAI's API. Servers know others, some of which can replace what is asked."""

SHORT = 64
"""Characters and numbers that all other parameters together may hold: no room for a request."""


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
            BadRequest: if the body holds NaN or infinity, or much in fields that nobody knows.
            Upstream: if it cannot be reached, or fails.
        """
        body = await request.json()
        _require_known(body)
        try:
            content = json.dumps(body, allow_nan=False)
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


def _require_known(body: Mapping[str, Any]) -> None:
    """Of a request in which another chat could be hidden, nothing is sent."""
    unknown = {name: value for name, value in body.items() if name not in KNOWN}
    if _size(list(unknown.values())) > SHORT:
        names = ", ".join(sorted(name[:40] for name in unknown)[:5])
        raise BadRequest(
            f"{names}: OpenAI's API has no such parameters; this guard does not read them, and "
            f"sends at most {SHORT} characters of them on."
        )


def _size(value: Any) -> int:
    """How much a value can say: its characters, names included; 1 for a number."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(name) + _size(inner) for name, inner in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else 1


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
    kept = {name: answer.headers[name] for name in ("retry-after",) if name in answer.headers}
    return JSONResponse(body | dict(note), status_code=answer.status_code, headers=kept)


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
