"""The page on this machine alone: a server on 127.0.0.1 with a token in its address."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from latentguard.errors import LatentGuardError
from latentguard.review.routes import Review, page_file, routes

HOST = "127.0.0.1"

MAX_BODY = 1 << 16
"""Bytes of a request; the page sends a few hundred."""


class LocalServer:
    """Serves a review to whoever has its address."""

    def __init__(self, review: Review, port: int = 0) -> None:
        """Take the port.

        Args:
            review: What is shown.
            port: 0 takes a free one.

        Raises:
            LatentGuardError: if the port cannot be had.
        """
        self.token = secrets.token_urlsafe(24)
        self._socket = _listen(port)
        self.port: int = self._socket.getsockname()[1]
        app = LocalOnly(build_app(review, self._require), self.port)
        config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none")
        self.server = uvicorn.Server(config)

    @property
    def url(self) -> str:
        """The address with the token, which browsers keep to themselves after the ``#``."""
        return f"http://{HOST}:{self.port}/#{self.token}"

    def run(self) -> None:
        """Serve until Control-C."""
        self.server.run(sockets=[self._socket])

    def _require(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise HTTPException(401, "Open the page by the address in the terminal.")


class LocalOnly:
    """Refuses names that are not this machine's, as pages of others would use, and long bodies."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        """Wrap an application that listens on a port."""
        self._app = app
        self._hosts = [f"{name}:{port}" for name in (HOST, "localhost")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            length = headers.get(b"content-length", b"0")
            if headers.get(b"host", b"").decode("latin-1") not in self._hosts:
                await _refuse(send, 403, f"This page answers to {' and '.join(self._hosts)} alone.")
                return
            if b"transfer-encoding" in headers or int(length) > MAX_BODY:
                await _refuse(send, 413, f"At most {MAX_BODY} bytes are read.")
                return
        await self._app(scope, receive, send)


def build_app(review: Review, require: Callable[[Request], None]) -> FastAPI:
    """The application of a review; errors have the form that the service's have."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(routes(review, require))
    app.add_api_route("/", page_file("index.html", "text/html; charset=utf-8"))

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse(_error(str(error.detail)), status_code=error.status_code)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        fields = ", ".join(str(one["loc"][-1]) for one in error.errors())
        return JSONResponse(_error(f"The request cannot be used: {fields}."), status_code=400)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    return app


def _error(message: str) -> dict[str, dict[str, str]]:
    return {"error": {"message": message}}


async def _refuse(send: Send, status: int, message: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(_error(message)).encode()})


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise LatentGuardError(
            f"Port {port} cannot be had ({error.strerror}); name another with --port."
        ) from None
    return listener
