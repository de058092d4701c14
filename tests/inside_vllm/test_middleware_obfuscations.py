"""The middleware reads what lies beneath a disguise, and stops when the client leaves."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest

from inside_vllm.fake_server import HIDDEN, SAID, Hidden, chat, values_of
from latentguard.integrations.vllm import middleware as module
from latentguard.integrations.vllm.chat_guard import ChatGuard
from latentguard.integrations.vllm.middleware import GuardMiddleware
from serve.running import flagged, offline, passed, tiny_guard, tiny_model


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

    async def opened(state, rate_of):
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
