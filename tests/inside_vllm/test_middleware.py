"""The middleware before a fake server: no token without a verdict, and no other way is open."""

import asyncio
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest

from latentguard.errors import GuardError
from latentguard.guard.chunking import Chunking
from latentguard.integrations.vllm import middleware as module
from latentguard.integrations.vllm.chat_guard import ChatGuard
from latentguard.integrations.vllm.middleware import GuardMiddleware
from latentguard.integrations.vllm.score_channel import post
from latentguard.integrations.vllm.score_request import ScoreRequest, digest_ids
from latentguard.prompts import Prompt
from latentguard.serve.errors import BadRequest
from serve.running import band_guard, flagged, offline, passed, tiny_guard, tiny_model

SAID = "The first token of a reply"


class Server:
    """As vLLM's: answers a chat, and posts what was read before its first token."""

    def __init__(self, *, read="right", status=200, stream_parts=4):
        self.read, self.status, self.parts = read, status, stream_parts
        self.model, self.guard = tiny_model(), tiny_guard()
        self.seen, self.stopped = [], False

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await send({"type": "websocket.accept"})
            return
        body = (await receive())["body"]
        if scope["path"] != "/v1/chat/completions":
            await self.reply(send, 200, b'{"route": "open"}')
            return
        headers = dict(scope["headers"])
        assert headers[b"content-length"] == str(len(body)).encode()
        asked = json.loads(body)
        self.seen.append(asked)
        if self.status != 200:
            await self.reply(send, self.status, b'{"error": {"message": "no"}}')
            return
        if asked.get("stream"):
            await self.stream(asked, receive, send)
        else:
            self.answer(asked)
            await asyncio.sleep(0.01)
            choice = {"index": 0, "message": {"role": "assistant", "content": SAID}}
            await self.reply(send, 200, json.dumps({"choices": [choice]}).encode())

    async def stream(self, asked, receive, send):
        head = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for n in range(self.parts):
            if n == 1:
                self.answer(asked)
            event = b"data: " + json.dumps({"choices": [{"delta": {"content": SAID}}]}).encode()
            await send({"type": "http.response.body", "body": event + b"\n\n", "more_body": True})
            await asyncio.sleep(0.01)
        gone = asyncio.ensure_future(receive())
        await asyncio.sleep(0.01)
        self.stopped = gone.done() and gone.result()["type"] == "http.disconnect"
        gone.cancel()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def answer(self, asked):
        ask = ScoreRequest(**asked["kv_transfer_params"]["latentguard"])
        text = asked["messages"][-1]["content"]
        layout = self.model.chat([SimpleNamespace(text=text, id="", history=())])[0]
        if self.read == "nothing":
            return
        if self.read == "other" or digest_ids(layout.ids) != ask.ids:
            post([(ask, None)])
            return
        width = len(self.guard.reading.positions)
        score = (offline()[text].score - self.guard.probe.bias) / width
        values = [score] * width + [0.5] * len(self.guard.axes)
        post([(ask, [math.nan] * len(values) if self.read == "nan" else values)])

    async def reply(self, send, status, content):
        head = [(b"content-type", b"application/json")]
        head.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": content})


class Besides:
    """In the place of the engine: what it reads in passes of their own."""

    def __init__(self, *values):
        self.values, self.asked = list(values), []

    async def __call__(self, prompt):
        self.asked.append(prompt.text)
        value = self.values.pop(0)
        if isinstance(value, Exception):
            raise value
        return value


@pytest.fixture
def served(monkeypatch):
    """ScoreRequest a guarded fake server: ``served(server, path, json)`` -> response."""
    now = {}

    async def opened(state):
        chat_guard = ChatGuard(now["guard"], tiny_model().tokenizer)
        chat_guard.score = Besides(*now["besides"])
        return chat_guard

    monkeypatch.setattr(module, "open_chat_guard", opened)

    def ask(
        server,
        path="/v1/chat/completions",
        body=None,
        *,
        policy="block",
        method="POST",
        headers=None,
        guard=None,
        besides=(),
        state=None,
    ):
        now.update(guard=guard or tiny_guard(), besides=besides)
        monkeypatch.setenv("LATENTGUARD_POLICY", policy)
        monkeypatch.setenv("LATENTGUARD_SEGMENT_HEADER", "X-Traffic")
        guarded = GuardMiddleware(server)

        async def app(scope, receive, send):
            await guarded(scope | {"app": SimpleNamespace(state=state)}, receive, send)

        async def go():
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                answer = await client.request(method, path, json=body, headers=headers)
            if guarded._chat_guard is not None:
                assert guarded._chat_guard._waiting == {}
                guarded._chat_guard.close()
            return answer

        return asyncio.run(go())

    return ask


def chat(text, **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def test_a_harmless_chat_is_answered_with_its_verdict(served):
    answer = served(Server(), body=chat(passed()))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == SAID
    found = answer.json()["latentguard"]
    assert found["flagged"] is False
    assert found["score"] == pytest.approx(offline()[passed()].score, abs=1e-5)
    assert set(found) >= {"score", "probability", "beliefs", "threshold", "decision"}


def test_a_flagged_chat_is_refused_and_its_generation_stopped(served):
    server = Server(stream_parts=8)
    answer = served(server, body=chat(flagged(), stream=True))
    assert SAID not in answer.text
    assert '"finish_reason": "content_filter"' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"flagged": true' in answer.text.split("\n\n")[0]
    assert server.stopped


def test_a_flagged_chat_that_is_not_streamed(served):
    answer = served(Server(), body=chat(flagged()))
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["refusal"] == choice["message"]["content"] != SAID
    assert answer.json()["latentguard"]["flagged"] is True


def test_a_streamed_chat_has_its_verdict_in_the_first_event(served):
    answer = served(Server(), body=chat(passed(), stream=True))
    first, *rest = answer.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["latentguard"]["flagged"] is False
    assert "latentguard" not in "".join(rest)
    assert answer.text.count(SAID) == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("read", ["nothing", "nan"])
@pytest.mark.parametrize("policy", ["block", "annotate"])
def test_a_chat_without_a_score_is_never_answered(served, stream, read, policy):
    answer = served(Server(read=read), body=chat(passed(), stream=stream), policy=policy)
    assert answer.status_code == 503
    assert SAID not in answer.text


def test_other_tokens_than_those_laid_out_are_an_error(served):
    answer = served(Server(read="other"), body=chat(passed()))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unreadable_prompt"


def test_annotate_answers_what_is_flagged_or_unreadable(served):
    answer = served(Server(), body=chat(flagged()), policy="annotate")
    assert answer.json()["latentguard"]["flagged"] is True
    assert answer.json()["choices"][0]["message"]["content"] == SAID
    answer = served(Server(read="other"), body=chat(passed()), policy="annotate")
    assert answer.json()["latentguard"] == {"error": "unreadable_prompt"}


def test_what_a_client_sends_as_transfer_parameters_is_dropped(served):
    server = Server()
    request = {"channel": "x", "key": "y", "ids": "z", "at": [0]}
    forged = {"latentguard": request, "do_remote_prefill": 1}
    body = chat(passed(), kv_transfer_params=forged, vllm_xargs={"kv_transfer_params": "x"})
    assert served(server, body=body).status_code == 200
    assert set(server.seen[0]["kv_transfer_params"]) == {"latentguard"}
    assert server.seen[0]["kv_transfer_params"]["latentguard"]["channel"] != "x"
    assert "vllm_xargs" not in server.seen[0]


def values_of(score, guard=None):
    """What an engine reads where the score is this."""
    guard = guard or tiny_guard()
    width = len(guard.reading.positions)
    return [(score - guard.probe.bias) / width] * width + [0.5] * len(guard.axes)


HIDDEN = "\u0336".join(passed())


class Hidden(Server):
    """Reads a disguised chat as the least harmful."""

    def answer(self, asked):
        ask = ScoreRequest(**asked["kv_transfer_params"]["latentguard"])
        post([(ask, values_of(offline()[passed()].score))])


@pytest.mark.parametrize("stream", [False, True])
def test_what_lies_beneath_a_disguise_blocks(served, stream):
    high = values_of(offline()[flagged()].score)
    answer = served(Hidden(), body=chat(HIDDEN, stream=stream), besides=[high])
    assert SAID not in answer.text
    assert "content_filter" in answer.text
    assert "unseen characters" in answer.text


def test_a_harmless_text_beneath_lets_through(served):
    low = values_of(offline()[passed()].score - 1)
    answer = served(Hidden(), body=chat(HIDDEN), besides=[low]).json()
    assert answer["latentguard"]["obfuscations"] == []
    assert answer["choices"][0]["message"]["content"] == SAID


@pytest.mark.parametrize("read", [None, [math.nan] * 9, RuntimeError("the engine is dead")])
@pytest.mark.parametrize("policy", ["block", "annotate"])
def test_without_a_reading_beneath_no_chat_is_answered(served, read, policy):
    if isinstance(read, list):
        read = read[: len(values_of(0))]
    answer = served(Hidden(), body=chat(HIDDEN), besides=[read], policy=policy)
    assert answer.status_code == 503
    assert SAID not in answer.text


class Left(Hidden):
    """Its client leaves while what lies beneath is read."""

    async def __call__(self, scope, receive, send):
        self.answer(json.loads((await receive())["body"]))
        self.stopped = (await receive())["type"] == "http.disconnect"


@pytest.mark.parametrize("server", [Left(), Hidden()], ids=["at work", "done with its reply"])
def test_a_client_that_leaves_stops_what_was_begun_for_it(monkeypatch, server):
    begun, stopped, sent = [], [], []

    async def opened(state):
        chat_guard = ChatGuard(tiny_guard(), tiny_model().tokenizer)
        chat_guard.score = read
        return chat_guard

    async def read(prompt):
        begun.append(prompt.text)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append(prompt.text)
            raise

    async def receive():
        if not asked:
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": asked.pop()}

    async def send(message):
        sent.append(message)

    monkeypatch.setattr(module, "open_chat_guard", opened)
    asked = [json.dumps(chat(HIDDEN)).encode()]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    guarded = GuardMiddleware(server)

    async def go():
        await guarded(scope | {"app": SimpleNamespace(state=None)}, receive, send)
        assert guarded._chat_guard._waiting == {}
        guarded._chat_guard.close()

    asyncio.run(go())
    assert begun == stopped == [passed()]
    assert server.stopped == isinstance(server, Left)
    assert [one.get("status") for one in sent] == [499, None]  # and nobody reads it


def test_pieces_of_a_long_chat_are_read(served):
    guard = replace(tiny_guard(), chunking=Chunking(threshold=1e-3, max_chars=20, longer_than=10))
    low, high = (values_of(offline()[text].score) for text in (passed(), flagged()))
    count = len(guard.chunking.chunks(Prompt(passed())))
    assert count > 1
    calm, alarmed = [low] * count, [*[low] * (count - 1), high]
    told = [
        served(Server(), body=chat(passed()), guard=guard, besides=besides).json()["latentguard"]
        for besides in (calm, alarmed)
    ]
    assert told[0]["score"] < told[1]["score"]


def test_the_segment_that_the_header_names(served):
    guard = band_guard()
    part = guard.thresholds
    strict = replace(part.common.block, threshold=offline()[passed()].score - 1)
    segments = {"strict": replace(part.common, block=strict, review=None)}
    guard = replace(guard, thresholds=replace(part, segments=segments))
    answer = served(Server(), body=chat(passed()), guard=guard, headers={"x-traffic": "strict"})
    found = answer.json()["latentguard"]
    assert (found["flagged"], found["threshold"]) == (True, strict.threshold)
    answer = served(Server(), body=chat(passed()), guard=guard, headers={"x-traffic": "other"})
    assert answer.json()["latentguard"]["threshold"] == guard.threshold


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/",
        "/V1/chat/completions",
        "/v1/chat/completions/render",
        "/inference/v1/generate",
        "/generative_scoring",
        "/invocations",
        "/v1/audio/transcriptions",
        "/v2/chat",
        "/collective_rpc",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/a/route/of/tomorrow",
    ],
)
def test_every_other_route_is_closed(served, path):
    answer = served(Server(), path, chat(passed()))
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "route_not_guarded"


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models", "/metrics"])
def test_what_generates_nothing_is_open(served, path):
    assert served(Server(), path, method="GET").json() == {"route": "open"}


@pytest.mark.parametrize("path", ["/v1/responses/id", "/v1/models/x", "/v1/chat/completions"])
def test_other_things_to_get_are_closed(served, path):
    assert served(Server(), path, method="GET").status_code == 403


def test_a_web_socket_is_closed_before_it_opens():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(
        GuardMiddleware(Server())({"type": "websocket", "path": "/v1/realtime"}, None, send)
    )
    assert [m["type"] for m in sent] == ["websocket.close"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "text"},
        {"model": "m"},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": ""}]},
        chat("hello", use_beam_search=True),
        chat("hello", stop=["a"] * 30_000),
        ["no object"],
    ],
)
def test_what_the_guard_cannot_read_is_an_error_of_the_client(served, body):
    server = Server()
    answer = served(server, body=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert server.seen == []


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), ("Bearer other", 401), ("Basic secret", 401), ("Bearer secret", 200)],
)
@pytest.mark.parametrize("by", ["option", "variable"])
def test_the_servers_own_key_is_asked_for_before_a_chat_is_read(
    served, monkeypatch, header, status, by
):
    server, laid_out, pending = Server(), [], ChatGuard.begin

    async def noted(chat_guard, *given):
        laid_out.append(given)
        return await pending(chat_guard, *given)

    monkeypatch.setattr(ChatGuard, "begin", noted)
    monkeypatch.setenv("VLLM_API_KEY", "secret" if by == "variable" else "another")
    state = SimpleNamespace(args=SimpleNamespace(api_key=["secret"] if by == "option" else None))
    headers = {"authorization": header} if header else {}
    answer = served(server, body=chat(passed()), headers=headers, state=state)
    assert answer.status_code == status
    assert len(laid_out) == len(server.seen) == (status == 200)


def test_more_messages_than_tokens_are_not_laid_out():
    async def go():
        chat_guard = ChatGuard(tiny_guard(), tiny_model().tokenizer, most=8)
        chat_guard.chat._render = None
        said = [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(9)]
        with pytest.raises(BadRequest, match=r"at least 9 tokens .* at most 8"):
            await chat_guard.begin({"messages": said})
        chat_guard.close()

    asyncio.run(go())


def test_an_error_of_the_server_is_handed_on(served):
    answer = served(Server(status=422), body=chat(passed()))
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, "no")


def test_another_tokenizer_closes_every_chat(monkeypatch, caplog):
    from latentguard.errors import ModelMismatch
    from models.families import FAMILIES

    async def go():
        with pytest.raises(ModelMismatch, match="template"):
            ChatGuard(tiny_guard(), FAMILIES["llama-3"].tokenizer)

    asyncio.run(go())


def test_a_guard_that_does_not_fit_closes_every_chat(served, monkeypatch):
    from latentguard.errors import ModelMismatch

    async def opened(state):
        raise ModelMismatch("other weights")

    monkeypatch.setattr(module, "open_chat_guard", opened)
    answer = served(Server(), body=chat(passed()))
    assert answer.status_code == 503
    assert "weights" not in answer.text


def test_canaries_that_moved_stop_the_gate(monkeypatch):
    pytest.importorskip("vllm")

    class Engine:
        async def generate(self, tokens, how, request_id):
            ask = ScoreRequest.from_sampling(how)
            post([(ask, [1e3] * len(ask.at))])
            yield None

    async def go():
        from latentguard.errors import ModelMismatch

        chat_guard = ChatGuard(replace(tiny_guard()), tiny_model().tokenizer, Engine())
        with pytest.raises(ModelMismatch, match="canary"):
            await chat_guard.check()
        chat_guard.close()

    asyncio.run(go())


def test_an_earlier_message_is_read_by_itself(served):
    """A harmful request in the history, then a harmless last message: the chat is refused."""
    harmful = flagged()
    score = 2 * abs(offline()[harmful].score) + tiny_guard().threshold + 100
    guard = tiny_guard()
    width = len(guard.reading.positions)
    high = [score / width] * width + [0.5] * len(guard.axes)
    low = [-score / width] * width + [0.5] * len(guard.axes)
    body = {
        "model": "m",
        "messages": [
            {"role": "user", "content": harmful},
            {"role": "assistant", "content": "Pardon?"},
            {"role": "user", "content": passed()},
        ],
    }

    class Low(Server):
        def answer(self, asked):
            post([(ScoreRequest(**asked["kv_transfer_params"]["latentguard"]), low)])

    besides = [low, low, low]
    assert served(Low(), body=body, besides=besides).json()["latentguard"]["flagged"] is False
    answer = served(Low(), body=body, besides=[high, low, low])
    assert answer.json()["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("policy", ["Block", "shadow", ""])
def test_an_unknown_policy_stops_the_start(monkeypatch, policy):
    monkeypatch.setenv("LATENTGUARD_POLICY", policy)
    with pytest.raises(GuardError, match="expected block or annotate"):
        GuardMiddleware(Server())
