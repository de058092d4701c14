"""Traces and metrics by OpenTelemetry: a span for each request, with its verdicts; never a text.

Where they go is said by OpenTelemetry's own variables, as ``OTEL_EXPORTER_OTLP_ENDPOINT``. The
exporters work in threads of their own: a collector that is slow or gone delays no request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentguard import __version__
from latentguard.serve.scoring import ScoredPrompt

QUIET = ("/healthz", "/readyz", "/metrics")
"""Asked every few seconds; they leave no span."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

TENTHS = tuple(n / 10 for n in range(1, 10))


class OpenTelemetry:
    """Makes spans and measurements; the providers decide where they go."""

    def __init__(self, tracers: TracerProvider, meters: MeterProvider) -> None:
        """Make the instruments."""
        self._tracers, self._meters = tracers, meters
        self._tracer = tracers.get_tracer("latentguard", __version__)
        self._meter = meters.get_meter("latentguard", __version__)
        self._seconds = self._meter.create_histogram(
            "http.server.request.duration",
            unit="s",
            description="Whole requests.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._verdicts = self._meter.create_counter("latentguard.verdicts", unit="{prompt}")
        self._probabilities = self._meter.create_histogram(
            "latentguard.probability",  # scores can be negative, which no histogram takes
            unit="1",
            explicit_bucket_boundaries_advisory=TENTHS,
        )

    @staticmethod
    def from_environment() -> OpenTelemetry:
        """Exporters that send OTLP over HTTP, as the ``OTEL_`` variables say."""
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "latentguard")
        resource = Resource.create({"service.name": name, "service.version": __version__})
        tracers = TracerProvider(resource=resource)
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        return OpenTelemetry(tracers, MeterProvider([reader], resource=resource))

    def gauge(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Observe a number whenever metrics are exported."""

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(float(value()))]

        self._meter.create_observable_gauge(
            f"latentguard.{name}", callbacks=[observe], description=description
        )

    def traced(self, app: ASGIApp, routes: Iterable[str]) -> ASGIApp:
        """The application with a span around each request.

        Args:
            app: What serves.
            routes: Paths that name their span; all others are ``other``, so that clients cannot
                make up names.
        """
        known_routes = frozenset(routes)

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in QUIET:
                await app(scope, receive, send)
                return
            route = scope["path"] if scope["path"] in known_routes else "other"
            await self._serve(app, route, (scope, receive, send))

        return serve

    async def _serve(self, app: ASGIApp, route: str, call: tuple[Scope, Receive, Send]) -> None:
        scope, receive, send = call
        method = scope["method"] if scope["method"] in ("GET", "POST") else "_OTHER"
        attributes: dict[str, Any] = {"http.request.method": method, "http.route": route}
        status = [0]

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        began = perf_counter()
        parent = propagate.extract(
            {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        )
        with self._tracer.start_as_current_span(
            f"{method} {route}", parent, SpanKind.SERVER, attributes
        ) as span:
            await app({**scope, "headers": _with_own_span(scope["headers"])}, receive, watch)
            span.set_attribute("http.response.status_code", status[0])
            if status[0] >= 500 or not status[0]:
                span.set_status(Status(StatusCode.ERROR))
        attributes["http.response.status_code"] = status[0]
        self._seconds.record(perf_counter() - began, attributes)

    def verdict(
        self, endpoint: str, action: str, scored: ScoredPrompt | None, *, guard: str
    ) -> None:
        """Note what was done with a prompt, on the span of its request; ``guard`` is its name."""
        decision = scored.verdict.decision if scored else "none"
        attributes: dict[str, Any] = dict(
            endpoint=endpoint, action=action, decision=decision, guard=guard
        )
        self._verdicts.add(1, attributes)
        if scored is not None:
            self._probabilities.record(scored.verdict.probability)
            figures = dict(score=scored.verdict.score, threshold=scored.threshold)
            attributes |= figures | {"readings": scored.readings}
        event = {f"latentguard.{name}": value for name, value in attributes.items()}
        trace.get_current_span().add_event("verdict", event)

    def close(self) -> None:
        """Send what was not sent yet."""
        self._tracers.shutdown()
        self._meters.shutdown()


def _with_own_span(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers with the current span as parent of whatever an upstream does."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    own = [(name.encode(), value.encode()) for name, value in carrier.items()]
    return [pair for pair in headers if pair[0] not in dict(own)] + own
