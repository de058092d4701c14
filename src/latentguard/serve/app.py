"""The application: endpoints, the page, health, metrics, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

from latentguard import __version__
from latentguard.serve import completions, ext_authz, gateway_guardrail, moderation, page, responses
from latentguard.serve.accounts import Accounts, ClientLimits
from latentguard.serve.config import ServeConfig
from latentguard.serve.errors import ApiError, BadRequest, Unavailable
from latentguard.serve.keys import ApiKeys
from latentguard.serve.limits import RequestLimits, address_of
from latentguard.serve.reload import Reloader
from latentguard.serve.request_errors import describe_errors
from latentguard.serve.service import Service, timestamp
from latentguard.serve.upstream import UpstreamClient

ERRORS = (400, 401, 408, 413, 429, 500, 502, 503)
PUBLIC = {
    "/v1/moderations": "moderations",
    "/v1/score": "score",
    "/v1/chat/completions": "chat",
    responses.PATH: responses.ENDPOINT,
    "/v1/guard": "guard",
    "/v1/models": "models",
    gateway_guardrail.PATH: gateway_guardrail.ENDPOINT,
}
"""Paths, and what the audit log calls each."""


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's error object."""

    error: ErrorObject


def build_app(service: Service) -> ASGIApp:
    """The application of a service, within its limits."""
    accounts = client_limits(service.config)
    service.require_limits = accounts.require_reachable
    upstream = None
    if service.config.upstream:
        upstream = UpstreamClient(service.config, own_keys=bool(service.keys))
        service.use_upstream_key = upstream.use_key
        if service.config.probe_upstream:
            service.require_upstream = upstream.require_reachable

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        if service.review is not None:
            service.review.start()
        yield
        await service.engine.stop()
        if upstream is not None:
            await upstream.close()
        await accounts.close()
        await _close(service)

    app = _bare_app(lifespan)
    app.include_router(moderation.routes(service))
    app.include_router(gateway_guardrail.routes(service))
    app.include_router(completions.routes(service, upstream))
    app.include_router(responses.routes(service, upstream))
    app.include_router(ext_authz.routes(service))
    app.include_router(page.routes(service, upstream))
    if service.review is not None:
        app.include_router(service.review.routes())
    _watch(app, service)
    _explain(app)
    limited = RequestLimits(
        app, service.config, keys=service.keys, accounts=accounts, note=partial(_note, service)
    )
    exporter = service.telemetry.open_telemetry
    return limited if exporter is None else exporter.traced(limited, PUBLIC)


async def _close(service: Service) -> None:
    """Close what a service writes to, and what it asks."""
    for part in (service.second_opinion, service.audit, service.review):
        if part is not None:
            part.close()
    if service.telemetry.open_telemetry is not None:
        await asyncio.to_thread(service.telemetry.open_telemetry.close)


def client_limits(config: ServeConfig) -> ClientLimits:
    """The limits of clients, counted in this process or by Redis."""
    limits: dict[str, Any] = dict(
        concurrency=config.concurrency, rate=config.rate, burst=config.burst
    )
    if config.redis is None:
        return Accounts(**limits)
    from latentguard.serve.shared_accounts import SharedAccounts  # an extra

    return SharedAccounts(config.redis, **limits)


def build_health_app(service: Service, reloader: Reloader | None = None) -> FastAPI:
    """Health, readiness and metrics alone, for a port of their own; ``/reload`` for admins."""
    app = _bare_app()
    _watch(app, service)
    if reloader is not None and service.config.admin_key is not None:
        _administer(app, reloader, ApiKeys([service.config.admin_key]))
    _explain(app)
    return app


def _bare_app(lifespan: Any = None) -> FastAPI:
    return FastAPI(
        title="latentguard",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        responses={status: {"model": ErrorResponse} for status in ERRORS},
        openapi_url="/openapi.json",
    )


async def _note(service: Service, scope: Scope, status: int, took: float) -> None:
    """Count a request; one that was refused before anything was logged of it leaves a line."""
    path = scope["path"]
    endpoint = path if path in PUBLIC else "other"
    if path.startswith(f"{ext_authz.PREFIX}/"):
        endpoint = ext_authz.PREFIX
    state = scope["state"]
    if 400 <= status < 500 and endpoint != "other" and not state.get("is_recorded"):
        line = dict(
            time=timestamp(),
            request=state["request"],
            client=state["client"],
            address=address_of(scope),
            endpoint=PUBLIC.get(endpoint, endpoint.removeprefix("/")),
            action="rejected",
            status=status,
        )
        await service.record_rejections([line])
    service.telemetry.requests.labels(endpoint, str(status)).inc()
    if endpoint != "other":
        service.telemetry.seconds.labels(endpoint).observe(took)


def _watch(app: FastAPI, service: Service) -> None:
    """Health, readiness and metrics."""

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """Whether the process lives and its scoring thread does."""
        if service.engine.state == "dead":
            raise Unavailable("The scoring thread has ended.")
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> str:
        """Whether verdicts can be asked for: guard, audit log and upstream are there."""
        await service.require_ready()
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.telemetry.page(), media_type="text/plain; version=0.0.4")


def _administer(app: FastAPI, reloader: Reloader, keys: ApiKeys) -> None:
    """What an operator may do."""

    @app.post("/reload", response_class=PlainTextResponse)
    async def reload(request: Request) -> str:
        """Read guards and keys anew."""
        keys.require(request.headers.get("authorization", ""))
        await reloader.reload()
        return "reloaded"

    @app.post("/promote")
    async def promote(request: Request) -> dict[str, Any]:
        """Let the shadow guard decide, and the guard that decided be its shadow."""
        keys.require(request.headers.get("authorization", ""))
        return {"decides": (await reloader.promote()).to_dict()}

    @app.post("/rollback")
    async def rollback(request: Request) -> dict[str, Any]:
        """Let the guard before decide again."""
        keys.require(request.headers.get("authorization", ""))
        return {"decides": (await reloader.rollback()).to_dict()}

    @app.get("/shadow")
    async def shadow(request: Request) -> dict[str, Any]:
        """Which guard decides, and what its shadow would have decided; no texts."""
        keys.require(request.headers.get("authorization", ""))
        return reloader.describe_shadow()


def _explain(app: FastAPI) -> None:
    """Errors in OpenAI's form, without a word of what was sent or of how this is made."""

    async def fault(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(BadRequest(describe_errors(error.errors())).body, status_code=400)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = BadRequest(str(error.detail)).body
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    async def broken(_: Request, __: Exception) -> Response:
        return JSONResponse(ApiError("The service failed on this request.").body, status_code=500)

    handlers: Mapping[Any, Callable[[Request, Exception], Any]] = {
        ApiError: fault,
        RequestValidationError: invalid,
        HTTPException: refused,
        Exception: broken,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI's document, without the 422 that is never sent."""
        document = describe()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
