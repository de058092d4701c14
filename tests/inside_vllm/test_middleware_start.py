"""The middleware does not begin with a guard, a model or a policy that does not fit."""

import asyncio
from dataclasses import replace

import pytest

from inside_vllm.fake_server import Server, chat
from latentguard.errors import GuardError
from latentguard.integrations.vllm import middleware as module
from latentguard.integrations.vllm.chat_guard import ChatGuard
from latentguard.integrations.vllm.middleware import GuardMiddleware
from latentguard.integrations.vllm.score_channel import post
from latentguard.integrations.vllm.score_request import ScoreRequest
from serve.running import passed, tiny_guard, tiny_model


def test_another_tokenizer_closes_every_chat(monkeypatch, caplog):
    from latentguard.errors import ModelMismatch
    from models.families import FAMILIES

    async def go():
        with pytest.raises(ModelMismatch, match="template"):
            ChatGuard(tiny_guard(), FAMILIES["llama-3"].tokenizer)

    asyncio.run(go())


def test_a_guard_that_does_not_fit_closes_every_chat(served, monkeypatch):
    from latentguard.errors import ModelMismatch

    async def opened(state, rate_of):
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


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        *(("LATENTGUARD_POLICY", value, "block or annotate") for value in ("Block", "shadow", "")),
        *(("LATENTGUARD_RATE_OF", value, "chat or text") for value in ("Text", "message", "")),
        *(("LATENTGUARD_REPLY_POLICY", value, "cut or block or") for value in ("Cut", "")),
        *(("LATENTGUARD_HOLD_TOKENS", value, "a whole number") for value in ("-1", "some", "")),
    ],
)
def test_an_unknown_choice_stops_the_start(monkeypatch, variable, value, expected):
    monkeypatch.setenv(variable, value)
    with pytest.raises(GuardError, match=f"expected {expected}"):
        GuardMiddleware(Server())
