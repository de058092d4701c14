"""Audit lines at an OpenTelemetry collector: no verdict leaves before its line is taken."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from latentguard.serve.audit_log import AuditLog
from latentguard.serve.audit_sinks import require_writable
from latentguard.serve.errors import AuditUnavailable
from serve.running import flagged, offline, post, running
from serve.test_operations import free_port


class _Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append((self.path, self.headers["content-type"], json.loads(body)))
        self.send_response(self.server.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def collector(status=200):
    made = ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    made.seen, made.status = [], status
    made.url = f"http://127.0.0.1:{made.server_port}/v1/logs"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()


def lines(body):
    """The audit lines of a request, by OTLP's JSON."""
    (resource,) = body["resourceLogs"]
    (name,) = resource["resource"]["attributes"]
    assert (name["key"], name["value"]) == ("service.name", {"stringValue": "latentguard"})
    (scope,) = resource["scopeLogs"]
    for record in scope["logRecords"]:
        assert int(record["timeUnixNano"]) > 0
        assert record["severityNumber"] == 9
    return [json.loads(record["body"]["stringValue"]) for record in scope["logRecords"]]


def test_a_verdict_s_line_is_there_before_the_verdict():
    with collector() as made, running(audit=AuditLog(made.url)) as url:
        assert post(f"{url}/v1/moderations", json={"input": flagged()}).status_code == 200
        ((path, kind, body),) = made.seen
        assert (path, kind) == ("/v1/logs", "application/json")
        (line,) = lines(body)
        assert line["score"] == pytest.approx(offline()[flagged()].score, abs=1e-4)
        assert "text" not in line


def test_without_a_collector_there_is_no_verdict():
    with running(audit=AuditLog(f"http://127.0.0.1:{free_port()}/v1/logs")) as url:
        answer = post(f"{url}/v1/moderations", json={"input": flagged()})
        assert answer.status_code == 503
        assert "the collector cannot be reached" in answer.json()["error"]["message"]


def test_a_collector_that_refuses_is_said():
    with collector(status=429) as made:
        log = AuditLog(made.url)
        with pytest.raises(AuditUnavailable, match="the collector answered 429"):
            log.write([{"n": 1}])
        assert log.lost == 1
        made.status = 200
        log.write([{"n": 2}, {"n": 3}])
        log.close()
        assert lines(made.seen[-1][2]) == [{"n": 2}, {"n": 3}]


def test_check_asks_the_collector():
    with collector() as made:
        require_writable(made.url)
        assert made.seen[0][2] == {"resourceLogs": []}
    with pytest.raises(OSError, match="cannot be reached"):
        require_writable(made.url)
