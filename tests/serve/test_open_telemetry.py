"""Traces and metrics by OpenTelemetry: what a collector is told of a request, and what not."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serve.running import flagged, get, passed, post, running
from serve.test_upstream import answers, upstream

pytest.importorskip("opentelemetry.sdk", reason="needs the extra 'otel'")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra 'otel'")

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Collected:
    """A service's providers, with what they exported."""

    def __init__(self):
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        from latentguard.serve.open_telemetry import OpenTelemetry

        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = OpenTelemetry(tracers, MeterProvider([self.reader]))

    @property
    def spans(self):
        return self.exporter.get_finished_spans()

    def metrics(self):
        """Name -> points."""
        data = self.reader.get_metrics_data()
        scopes = [s for resource in data.resource_metrics for s in resource.scope_metrics]
        return {m.name: m.data.data_points for scope in scopes for m in scope.metrics}


@pytest.fixture
def collected():
    return Collected()


def test_a_request_is_a_span_of_the_clients_trace_with_its_verdicts(collected):
    with running(open_telemetry=collected.telemetry) as url:
        body = {"input": [flagged(), passed()]}
        assert post(f"{url}/v1/moderations", json=body, headers=HEADERS).status_code == 200
    (span,) = collected.spans  # it ends behind the answer
    assert span.name == "POST /v1/moderations"
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.attributes["http.response.status_code"] == 200
    decisions = [event.attributes["latentguard.decision"] for event in span.events]
    assert decisions == ["block", "allow"]
    assert flagged() not in span.to_json()


def test_an_upstream_is_called_as_part_of_the_span(collected):
    seen = []

    def script(handler, body):
        seen.append(handler.headers["traceparent"])
        answers(handler, body)

    with (
        upstream(script) as (_, where),
        running(upstream=where, open_telemetry=collected.telemetry) as url,
    ):
        chat = {"messages": [{"role": "user", "content": passed()}]}
        post(f"{url}/v1/chat/completions", json=chat, headers=HEADERS)
    (span,) = collected.spans  # it ends behind the answer
    assert seen[-1] == f"00-{TRACE}-{span.context.span_id:016x}-01"


def wait_for_requests(collected, count):
    """The metrics once so many requests have ended, which is a moment behind their answers."""
    for _ in range(600):
        metrics = collected.metrics()
        if sum(p.count for p in metrics["http.server.request.duration"]) >= count:
            break
        time.sleep(0.1)
    return metrics


def test_metrics_are_those_of_prometheus(collected):
    with running(open_telemetry=collected.telemetry) as url:
        for text in (flagged(), passed(), passed()):
            post(f"{url}/v1/moderations", json={"input": text})
        metrics = wait_for_requests(collected, 3)
    counts = {p.attributes["decision"]: p.value for p in metrics["latentguard.verdicts"]}
    assert counts == {"block": 1, "allow": 2}
    assert sum(p.count for p in metrics["http.server.request.duration"]) == 3
    assert metrics["latentguard.ready"][0].value == 1.0
    assert metrics["latentguard.probability"][0].count == 3


def test_clients_make_up_no_names_and_probes_leave_no_span(collected):
    with running(open_telemetry=collected.telemetry) as url:
        assert get(f"{url}/healthz").status_code == 200
        assert get(f"{url}/made/up").status_code == 404
    names = [span.name for span in collected.spans]
    assert names == ["GET other"]


@contextmanager
def receiver():
    """A collector; the paths and bodies that it was sent, and its URL."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.path, self.headers.get("content-encoding"), body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield seen, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_otlp_is_sent_where_the_variables_say(monkeypatch):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from latentguard.serve.open_telemetry import OpenTelemetry

    with receiver() as (seen, where):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", where)
        with running(open_telemetry=OpenTelemetry.from_environment()) as url:
            post(f"{url}/v1/moderations", json={"input": passed()})
    paths = {path for path, _, _ in seen}
    assert paths == {"/v1/traces", "/v1/metrics"}
    body = next(body for path, _, body in seen if path == "/v1/traces")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert names == ["POST /v1/moderations"]
    assert passed().encode() not in body


def test_a_collector_that_is_gone_keeps_nobody_waiting(monkeypatch):
    from latentguard.serve.open_telemetry import OpenTelemetry

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with running(open_telemetry=OpenTelemetry.from_environment()) as url:
        assert post(f"{url}/v1/moderations", json={"input": passed()}).status_code == 200
