"""What an operator relies on: health on a port of its own, connections, readiness, closing."""

import contextlib
import json
import resource
import socket
import threading
import time

import httpx
import pytest

from latentguard.errors import LatentGuardError
from latentguard.serve import upstream as upstream_module
from latentguard.serve.audit_log import AuditLog
from latentguard.serve.connections import SPARE_FILES, address_group, require_file_descriptors
from latentguard.serve.server import HEALTH_CONNECTIONS
from serve.running import get, passed, post, running, wait_ready
from serve.test_upstream import answers, chat, upstream


@contextlib.contextmanager
def before(script, **how):
    """A service before an upstream that does what a script says."""
    with upstream(script) as (_, where), running(upstream=where, **how) as url:
        yield url


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def idle_sockets(url, count):
    """Connections that say nothing."""
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)
        ]


class TestHealthPort:
    def test_it_answers_while_the_other_is_full_of_idle_sockets(self):
        how = dict(health_port=free_port(), max_connections=20)
        with running(**how) as url:
            health = f"http://127.0.0.1:{how['health_port']}"
            with idle_sockets(url, 30):
                assert get(f"{health}/healthz").text == "ok"
                assert get(f"{health}/readyz").text == "ready"
                assert "latentguard_ready 1.0" in get(f"{health}/metrics").text
                with pytest.raises(httpx.HTTPError):
                    get(f"{url}/healthz", timeout=1)

    def test_it_has_nothing_else_and_needs_no_key(self):
        how = dict(health_port=free_port())
        with running(keys=["k"], **how) as url:
            health = f"http://127.0.0.1:{how['health_port']}"
            assert get(f"{health}/metrics").status_code == 200
            assert get(f"{url}/metrics").status_code == 401
            assert post(f"{health}/v1/score", json={"input": passed()}).status_code == 404

    def test_it_ends_with_the_service(self):
        how = dict(health_port=free_port())
        with running(**how):
            pass
        with pytest.raises(httpx.ConnectError):
            get(f"http://127.0.0.1:{how['health_port']}/healthz")


class TestConnections:
    def test_one_address_has_so_many(self):
        with running(max_connections_per_address=5) as url, idle_sockets(url, 8) as sockets:
            wait_closed(sockets, 3)

    def test_places_are_free_again_once_connections_end(self):
        with running(max_connections_per_address=3) as url:
            for _ in range(4):
                with idle_sockets(url, 2):
                    wait_ready(url, seconds=20)

    def test_of_one_ipv6_customer_count_together(self):
        groups = map(address_group, ("2001:db8:1:2::1", "2001:db8:1:2:a::b", "2001:db8:1:3::1"))
        assert list(groups) == ["2001:db8:1:2::/64"] * 2 + ["2001:db8:1:3::/64"]
        assert address_group("::ffff:10.0.0.1") == address_group("10.0.0.1") == "10.0.0.1"
        assert address_group("fe80::1%eth0") == "fe80::/64"

    def test_to_the_health_port_are_counted_too(self):
        how = dict(health_port=free_port(), read_seconds=60.0)
        with running(**how):
            health = f"http://127.0.0.1:{how['health_port']}"
            with idle_sockets(health, HEALTH_CONNECTIONS) as sockets:
                wait_closed(sockets, HEALTH_CONNECTIONS // 2)
            wait_ready(health, seconds=20)

    def test_that_say_nothing_to_the_health_port_are_cut(self):
        how = dict(health_port=free_port(), read_seconds=0.2)
        with running(**how), idle_sockets(f"http://127.0.0.1:{how['health_port']}", 2) as sockets:
            wait_closed(sockets, 2)

    def test_too_few_file_descriptors_are_said(self, monkeypatch):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
        with pytest.raises(LatentGuardError, match=r"need 1,152 open files.*have 512"):
            require_file_descriptors(1024, has_upstream=False)

    def test_the_limit_is_raised_where_that_is_allowed(self, monkeypatch):
        changed = []
        monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 10_000))
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
        require_file_descriptors(1024, has_upstream=True)
        assert changed == [(2 * 1024 + SPARE_FILES, 10_000)]


def wait_closed(sockets, count):
    """Wait until so many connections are closed, and no more."""
    deadline = time.monotonic() + 20
    closed = []
    while len(closed) < count and time.monotonic() < deadline:
        closed = [one for one in sockets if _is_closed(one)]
        time.sleep(0.02)
    assert len(closed) == count


def _is_closed(one):
    one.setblocking(False)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


class TestReadiness:
    def test_without_an_audit_log_that_takes_lines_it_is_not_ready(self, tmp_path):
        target = tmp_path / "audit"
        target.symlink_to("/dev/full")
        with running(audit=AuditLog(target)) as url:
            assert get(f"{url}/readyz").text == "ready"
            post(f"{url}/v1/moderations", json={"input": passed()})
            assert get(f"{url}/readyz").status_code == 503
            target.unlink()
            url.server.service.reopen_audit()
            assert get(f"{url}/readyz").text == "ready"

    def test_without_its_upstream_it_is_not_ready(self, monkeypatch):
        monkeypatch.setattr(upstream_module, "PROBE_SECONDS", 0.0)
        port = free_port()
        where = f"http://127.0.0.1:{port}/v1"
        with running(upstream=where, probe_upstream=True, ready=False) as url:
            deadline = time.monotonic() + 20
            while "guard is" in (answer := get(f"{url}/readyz")).text:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert answer.status_code == 502
            assert "cannot be reached" in answer.text
        with before(answers, probe_upstream=True) as url:
            assert get(f"{url}/readyz").text == "ready"

    def test_it_is_not_ready_some_time_before_it_closes(self):
        with running(close_delay=60.0) as url:
            url.server.service.is_closing = True
            assert get(f"{url}/readyz").status_code == 503
            assert get(f"{url}/healthz").text == "ok"
            assert post(f"{url}/v1/moderations", json={"input": passed()}).status_code == 200


class TestHosts:
    def test_other_names_are_refused(self):
        with running(allowed_hosts=("guard.example", "127.0.0.1")) as url:
            assert get(f"{url}/healthz").text == "ok"
            for name, status in (("guard.example", 200), ("guard.example:8400", 200)):
                assert get(f"{url}/healthz", headers={"host": name}).status_code == status
            assert get(f"{url}/healthz", headers={"host": "evil.example"}).status_code == 400


ODD = {
    "a lone surrogate": b'{"choices": "\\ud800"}',
    "not a number": b'{"choices": NaN}',
    "deep": b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a list": b"[1]",
    "nothing": b"",
    "bytes": b"\xff\xfe\x00",
}


class TestOddUpstreams:
    @pytest.mark.parametrize("what", ODD)
    def test_an_odd_reply_is_a_502_with_a_reason(self, what):
        with before(lambda handler, _: handler.say(ODD[what])) as url:
            answer = post(f"{url}/v1/chat/completions", json=chat(passed()))
        assert answer.status_code == 502
        assert answer.json()["error"]["message"].startswith("The upstream's answer is no")

    @pytest.mark.parametrize("what", ["a lone surrogate", "not a number", "deep"])
    def test_an_odd_event_ends_the_stream_with_an_error(self, what):
        content = b"data: " + ODD[what] + b"\n\n"
        with before(lambda handler, _: handler.say(content)) as url:
            answer = post(f"{url}/v1/chat/completions", json=chat(passed(), stream=True))
        assert answer.status_code == 200
        assert json.loads(answer.text.split("data: ")[-1])["error"]["code"] == "upstream_error"

    def test_a_line_without_end_is_cut(self, monkeypatch):
        monkeypatch.setattr(upstream_module, "MAX_LINE", 10_000)
        content = b"data: " + b"a" * 100_000
        with before(lambda handler, _: handler.say(content)) as url:
            answer = post(f"{url}/v1/chat/completions", json=chat(passed(), stream=True))
        assert "upstream_error" in answer.text
        assert len(answer.text) < 1000

    @pytest.mark.parametrize("status", [401, 403])
    def test_that_it_refused_the_services_own_key_is_not_shown(self, status):
        def script(handler, _):
            handler.say(b'{"error": {"message": "Incorrect API key: sk-secret"}}', status)

        with before(script, upstream_key="sk-secret", keys=["ours"]) as url:
            headers = {"authorization": "Bearer ours"}
            answer = post(f"{url}/v1/chat/completions", json=chat(passed()), headers=headers)
        assert answer.status_code == 502
        assert "secret" not in answer.text

    def test_times_are_options(self):
        stop = threading.Event()
        with before(lambda handler, _: stop.wait(20), upstream_read_seconds=0.2) as url:
            answer = post(f"{url}/v1/chat/completions", json=chat(passed()), timeout=15)
            stop.set()
        assert answer.status_code == 502

    def test_path_and_query_are_kept_and_the_key_has_its_header(self):
        """As Azure wants it."""
        found = []

        def script(handler, _):
            found.append((handler.path, handler.headers["api-key"]))
            answers(handler)

        how = dict(upstream_key="k", upstream_key_header="api-key")
        with upstream(script) as (_, where):
            azure = where.replace("/v1", "/openai/deployments/big") + "?api-version=1"
            with running(upstream=azure, **how) as url:
                post(f"{url}/v1/chat/completions", json=chat(passed()))
        assert found == [("/openai/deployments/big/chat/completions?api-version=1", "k")]

    def test_the_path_may_name_the_model(self):
        found = []

        def script(handler, _):
            found.append(handler.path)
            answers(handler)

        how = dict(upstream_chat_path="deployments/{model}/chat/completions")
        with upstream(script) as (_, where):
            azure = where.replace("/v1", "/openai?api-version=1")
            with running(upstream=azure, **how) as url:
                post(f"{url}/v1/chat/completions", json=chat(passed(), model="gpt-4o.2"))
                get(f"{url}/v1/models")
                for name in ("..", "a/../b", "a%2fb", "", None, 3, "gpt\n"):
                    body = chat(passed(), model=name)
                    assert post(f"{url}/v1/chat/completions", json=body).status_code == 400
        assert found == [
            "/openai/deployments/gpt-4o.2/chat/completions?api-version=1",
            "/openai/models?api-version=1",
        ]

    def test_ids_and_traces_are_sent_on(self):
        found = []

        def script(handler, _):
            found.append({name.lower(): value for name, value in handler.headers.items()})
            answers(handler)

        headers = {"x-request-id": "mine-7", "traceparent": "00-0af7-b7ad-01"}
        with upstream(script) as (_, where), running(upstream=where) as url:
            post(f"{url}/v1/chat/completions", json=chat(passed()), headers=headers)
        assert headers.items() <= found[0].items()
