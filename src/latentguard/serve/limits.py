"""What a client may do to the service: size and time of headers, bodies and answers."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, nullcontext
from time import perf_counter

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentguard.review import routes as review_routes
from latentguard.serve.accounts import ClientLimits
from latentguard.serve.config import ServeConfig
from latentguard.serve.connections import address_group
from latentguard.serve.errors import (
    ApiError,
    BadRequest,
    PayloadTooLarge,
    RequestTimeout,
    error_location,
)
from latentguard.serve.json_limits import require_small_json
from latentguard.serve.keys import ApiKeys

log = logging.getLogger("latentguard.serve")

Note = Callable[[Scope, int, float], Awaitable[None]]

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
"""Sent with every answer."""

OPEN = ("/", "/page.css", "/page.js", "/figures.js", "/favicon.ico", "/healthz", "/readyz")
"""Paths that need no key to be read."""


class RequestLimits:
    """Asks for the key, then reads the body whole and within limits; then the application runs.

    What the application raises is logged, never shown.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        *,
        keys: ApiKeys,
        accounts: ClientLimits,
        note: Note,
    ) -> None:
        """Wrap an application.

        Args:
            app: The application.
            config: Limits of size and time.
            keys: Who may come in.
            accounts: Limits of each client.
            note: Given the scope, the status and the seconds of every request.
        """
        self.app, self.config, self.keys, self.note = app, config, keys, note
        self.accounts = accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer, began, ending = _Answer(send), perf_counter(), AsyncExitStack()
        try:
            address = address_group(address_of(scope))
            state = dict(request=answer.request, client="-", account=address, ending=ending)
            scope["state"] = scope.get("state", {}) | state
            self._require_host(scope)
            client = self._client(scope)
            account = client if client != "-" else address
            scope["state"] |= dict(client=client, account=account)
            admitted = nullcontext() if _is_open(scope) else self.accounts.admit(account)
            async with admitted:
                body = await self._body(scope, receive)
                if scope["method"] == "POST":
                    require_small_json(body, self.config.max_elements)
                async with ending:  # however it ends: a client may leave before its answer begins
                    await self.app(scope, _replay(body, receive), answer)
        except ApiError as fault:
            await answer.fault(fault)
        except Exception as error:  # whatever it is, the client reads one plain sentence
            log.error("%s failed: %s", answer.request, error_location(error))
            await answer.fault(ApiError("The service failed on this request."))
        finally:
            await self.note(scope, answer.status, perf_counter() - began)

    def _require_host(self, scope: Scope) -> None:
        """Refuse names that are not this service's, as pages of others would use."""
        allowed = self.config.allowed_hosts
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        if allowed and host not in allowed and host.rpartition(":")[0] not in allowed:
            raise BadRequest("This service does not answer to this Host header.")

    def _client(self, scope: Scope) -> str:
        if _is_open(scope) or _is_for_admins(scope):
            return "-"
        credentials: bytes = dict(scope["headers"]).get(b"authorization", b"")
        return self.keys.require(credentials.decode("latin-1"))

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self.config.max_body
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise BadRequest(
                "The request states the length of its body twice."
            )  # servers disagree on which
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and len(length) < 20 and int(length) > most:
            raise PayloadTooLarge(
                f"The body is {int(length):,} bytes long; at most {most:,} are read."
            )
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.config.read_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise BadRequest("The client left before its body had come.")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise PayloadTooLarge(f"The body is longer than {most:,} bytes.")
        except TimeoutError:
            raise RequestTimeout("The body did not come in time.") from None
        return bytes(body)


def _is_open(scope: Scope) -> bool:
    """Whether a request needs no key and is not counted."""
    return scope["path"] in OPEN and scope["method"] in ("GET", "HEAD")


def _is_for_admins(scope: Scope) -> bool:
    """Whether a request needs the admin key instead, which its endpoint asks for."""
    return bool(f"{scope['path']}/".startswith(f"{review_routes.PATH}/"))


def address_of(scope: Scope) -> str:
    """Where a request came from."""
    return str(scope["client"][0]) if scope.get("client") else "-"


class _Answer:
    """Sends an answer, with a request id and the common headers."""

    def __init__(self, send: Send) -> None:
        self.request, self.status = f"req-{secrets.token_hex(12)}", 0
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name for name, _ in message["headers"]}
            extra = HEADERS | {"x-request-id": self.request}
            new = [(k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in names]
            message = {**message, "headers": [*message["headers"], *new]}
        await self._send(message)

    async def fault(self, fault: ApiError) -> None:
        """Answer with a fault and close, unless an answer has begun: it ends unfinished then."""
        if self.status:
            return
        body = json.dumps(fault.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        headers |= fault.headers | {"connection": "close"}
        packed = [(k.encode(), v.encode()) for k, v in headers.items()]
        await self({"type": "http.response.start", "status": fault.status, "headers": packed})
        await self({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body first, and then waits for the client to leave."""
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class TimedProtocol(H11Protocol):
    """HTTP that cuts clients who send their headers, or read their answers, too slowly."""

    read_seconds, write_seconds = 10.0, 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for headers."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        super().connection_made(transport)
        self._wait("headers", self.read_seconds)

    def data_received(self, data: bytes) -> None:
        """Stop waiting once the headers are whole; later bytes do not prolong the wait."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait("headers", self.read_seconds)
        else:
            self._stop_waiting("headers")

    def pause_writing(self) -> None:
        """The client does not read: wait."""
        super().pause_writing()
        self._wait("reading", self.write_seconds)

    def resume_writing(self) -> None:
        """It reads."""
        super().resume_writing()
        self._stop_waiting("reading")

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        for what in list(self._timers):
            self._stop_waiting(what)
        super().connection_lost(exc)

    def _wait(self, what: str, seconds: float) -> None:
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self, what: str) -> None:
        if (timer := self._timers.pop(what, None)) is not None:
            timer.cancel()
