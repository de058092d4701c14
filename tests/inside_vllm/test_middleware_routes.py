"""The middleware leaves no other way open, and reads nothing for strangers."""

import asyncio
from types import SimpleNamespace

import pytest

from inside_vllm.fake_server import Server, chat
from latentguard.integrations.vllm.chat_guard import ChatGuard
from latentguard.integrations.vllm.middleware import GuardMiddleware
from latentguard.serve.errors import BadRequest
from serve.running import passed, tiny_guard, tiny_model


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
