"""Tests marked ``vllm`` start a real engine, and are skipped where there is none."""

import asyncio
import importlib.util
from types import SimpleNamespace

import httpx
import pytest

from inside_vllm.fake_server import Besides, LastTokens
from latentguard.integrations.vllm import middleware as module
from latentguard.integrations.vllm.chat_guard import ChatGuard
from latentguard.integrations.vllm.middleware import GuardMiddleware
from serve.running import tiny_guard, tiny_model

THERE = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not THERE:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make vllm-env"))


@pytest.fixture
def served(monkeypatch):
    """Ask a guarded fake server: ``served(server, path, json)`` -> response."""
    now = {}

    async def opened(state, rate_of):
        chat_guard = ChatGuard(now["guard"], tiny_model().tokenizer, rate_of=rate_of)
        chat_guard.score = Besides(*now["besides"])
        chat_guard.score_last_token = LastTokens(now["last"])
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
        last=None,
        state=None,
    ):
        now.update(guard=guard or tiny_guard(), besides=besides, last=last)
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
                assert guarded._chat_guard._logs == {}
                guarded._chat_guard.close()
            return answer

        return asyncio.run(go())

    return ask
