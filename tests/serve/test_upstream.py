"""What an upstream says, and when it is stopped: events, statuses, crowds, clients that leave."""

import asyncio
import contextlib
import json
import select
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from serve.running import flagged, get, passed, post, running, stream

CHAT = "/v1/chat/completions"
MODELS = {"object": "list", "data": [{"id": "big", "object": "model"}]}


class _Handler(BaseHTTPRequestHandler):
    """Does what the server's ``script`` says."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append(body)
        self.server.script(self, body)

    def do_GET(self):
        self.server.seen.append(self.path)
        self.server.script(self, None)

    def say(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in ({"content_length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 256


@contextlib.contextmanager
def upstream(script):
    """A server that does ``script(handler, body)`` for each request; what it has seen, its URL."""
    made = _Server(("127.0.0.1", 0), _Handler)
    made.seen, made.script = [], script
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield made.seen, f"http://127.0.0.1:{made.server_port}/v1"
    finally:
        made.shutdown()
        made.server_close()


def answers(handler, _=None):
    """A whole answer."""
    handler.say(json.dumps(dict(id="up", choices=[])).encode())


def user(content):
    return [{"role": "user", "content": content}]


def chat(text, **more):
    return dict(messages=user(text), **more)


def told(line):
    return json.loads(line.removeprefix("data: "))["said"]


class TestEvents:
    @pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "é"])
    def test_an_event_may_hold_what_some_take_for_the_end_of_a_line(self, mark):
        said = [f"a{mark}b", f"c{mark}"]

        def script(handler, _):
            events = [f"data: {json.dumps({'said': one}, ensure_ascii=False)}\n\n" for one in said]
            handler.say("".join([*events, "data: [DONE]\n\n"]).encode())

        with upstream(script) as (_, where), running(upstream=where) as url:
            answer = post(f"{url}{CHAT}", json=chat(passed(), stream=True))
        *events, done, rest = answer.text.split("\n\n")
        assert [told(one) for one in events] == said
        assert (done, rest) == ("data: [DONE]", "")
        assert "latentguard" in events[0]

    def test_an_event_may_come_byte_by_byte(self):
        def script(handler, _):
            content = 'data: {"said": "naïve 😀"}\n\ndata: {"said": "end"}'.encode()
            handler.say(b"", content_length=len(content))
            for byte in content:
                handler.wfile.write(bytes([byte]))

        with upstream(script) as (_, where), running(upstream=where) as url:
            answer = post(f"{url}{CHAT}", json=chat(passed(), stream=True))
        assert [told(one) for one in answer.text.strip().split("\n\n")] == ["naïve 😀", "end"]


def test_as_many_chats_as_come_are_under_way_at_once():
    """None waits for another to end: more than the hundred connections that httpx would open."""
    crowd, all_there = 110, threading.Event()

    def script(handler, _):
        if len(seen) == crowd:
            all_there.set()
        all_there.wait(60)
        answers(handler)

    async def ask(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=90, verify=False) as client:
            sent = (client.post(f"{url}{CHAT}", json=chat(passed())) for _ in range(crowd))
            return [answer.status_code for answer in await asyncio.gather(*sent)]

    with upstream(script) as (seen, where), running(upstream=where, queue=1000) as url:
        assert asyncio.run(ask(url)) == [200] * crowd


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_who_leaves_stops_the_upstream(streamed, begun):
    """Before the answer, and in the middle of it, whether it is streamed or not."""
    asked, stopped = threading.Event(), threading.Event()

    def script(handler, _):
        if begun:
            handler.say(b'data: {"said": "a"}\n\n', content_length=1000)
        asked.set()
        if select.select([handler.connection], [], [], 20)[0] and not handler.connection.recv(1):
            stopped.set()

    with upstream(script) as (_, where), running(upstream=where) as url:
        with contextlib.suppress(httpx.TimeoutException):
            how = dict(json=chat(passed(), stream=streamed), timeout=httpx.Timeout(10, read=0.7))
            with stream("POST", f"{url}{CHAT}", **how) as answer:
                for _ in answer.iter_bytes():
                    pass
        assert asked.is_set()
        assert stopped.wait(5), "the upstream goes on"
        assert get(f"{url}/healthz").text == "ok"


class TestRefusals:
    @pytest.mark.parametrize("status", [413, 429])
    @pytest.mark.parametrize("streamed", [False, True])
    def test_one_that_is_no_json_keeps_its_status(self, status, streamed):
        """As a proxy before the upstream says it."""

        def script(handler, _):
            handler.say(b"<html>secret</html>", status, retry_after=7)

        with upstream(script) as (_, where), running(upstream=where) as url:
            answer = post(f"{url}{CHAT}", json=chat(passed(), stream=streamed))
        assert (answer.status_code, answer.headers["retry-after"]) == (status, "7")
        assert f"status {status}" in answer.json()["error"]["message"]
        assert "secret" not in answer.text

    @pytest.mark.parametrize("status", [200, 301])
    def test_an_answer_that_is_no_json_is_a_failure(self, status):
        def script(handler, _):
            handler.say(b"<html>", status)

        with upstream(script) as (_, where), running(upstream=where) as url:
            answer = post(f"{url}{CHAT}", json=chat(passed()))
        assert answer.status_code == 502
        assert "no JSON object" in answer.json()["error"]["message"]


class TestModels:
    def test_they_are_the_upstreams(self):
        def script(handler, _):
            assert handler.headers["authorization"] == "Bearer theirs"
            handler.say(json.dumps(MODELS).encode())

        how = dict(upstream_key="theirs", keys=["ours"])
        with upstream(script) as (seen, where), running(upstream=where, **how) as url:
            assert get(f"{url}/v1/models").status_code == 401
            found = get(f"{url}/v1/models", headers={"authorization": "Bearer ours"})
        assert found.json() == MODELS
        assert seen == ["/v1/models"]

    def test_nobody_is_there(self):
        with running(upstream="http://127.0.0.1:9/v1") as url:
            answer = get(f"{url}/v1/models")
        assert answer.status_code == 502
        assert "cannot be reached" in answer.json()["error"]["message"]


FIELDS = ("name", "age", "city")
SCHEMA = {"properties": {name: {"type": "string"} for name in FIELDS}, "required": [*FIELDS]}
PICTURE = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {}}]


class TestWhatItIsAsked:
    @pytest.mark.parametrize("policy", ["block", "shadow"])
    @pytest.mark.parametrize(
        "extra",
        [
            dict(temperature=2.5),
            dict(top_p=0),
            dict(stop=list("abcde")),
            dict(n=0),
            dict(max_tokens=0),
            dict(max_completion_tokens=-1),
            dict(seed=2**70),
        ],
        ids=str,
    )
    def test_ranges_are_the_upstreams_to_check(self, policy, extra):
        with upstream(answers) as (seen, where), running(upstream=where, policy=policy) as url:
            sent = post(f"{url}{CHAT}", json=chat(passed(), **extra))
            held = post(f"{url}{CHAT}", json=chat(flagged(), **extra))
        assert (sent.status_code, held.status_code) == (200, 200)
        let_through = [chat(passed(), **extra), chat(flagged(), **extra)]
        assert seen == (let_through[:1] if policy == "block" else let_through)

    @pytest.mark.parametrize(
        ("policy", "status"), [("block", 400), ("annotate", 400), ("shadow", 200)]
    )
    def test_only_a_shadow_lets_through_what_is_not_read(self, policy, status, tmp_path):
        """A field that nobody knows, a picture, and more messages than are read at once."""
        many = user(passed()) + [{"role": "user", "content": f"{n}"} for n in range(4)]
        bodies = [chat(passed(), guided_json=SCHEMA), chat(PICTURE), dict(messages=many)]
        audit = tmp_path / "audit.jsonl"
        how = dict(policy=policy, audit=audit, max_readings=3)
        with upstream(answers) as (seen, where), running(upstream=where, **how) as url:
            found = [post(f"{url}{CHAT}", json=body) for body in bodies]
            page = get(f"{url}/metrics").text
        assert [answer.status_code for answer in found] == [status] * 3
        assert seen == (bodies if policy == "shadow" else [])
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        unread = [line for line in lines if line["action"] == "unjudged"]
        assert [one["error"] for one in unread] == ["invalid_request"] * 3 * (policy == "shadow")
        assert ('action="unjudged",decision="none"' in page) == (policy == "shadow")
