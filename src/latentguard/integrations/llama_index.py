"""LlamaIndex: a model behind the guard, and a filter of what was retrieved.

```python
from latentguard.integrations.llama_index import GuardedLLM, GuardedNodes

guard = dict(url="http://127.0.0.1:8400")
engine = index.as_query_engine(
    llm=GuardedLLM(llm, **guard), node_postprocessors=[GuardedNodes(**guard)]
)
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.llms import LLM, CustomLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from pydantic import PrivateAttr

from latentguard.errors import LatentGuardError
from latentguard.integrations.service_client import REFUSAL, GuardService, ServedVerdict

READ_BLOCKS = ("text", "tool_call", "thinking")
"""Types of blocks in a message that are read."""


class GuardedLLM(CustomLLM):
    """Asks another model, unless what it would be sent is flagged; the retrieved texts, too."""

    _llm: LLM = PrivateAttr()
    _service: GuardService = PrivateAttr()
    _refusal: str = PrivateAttr()

    def __init__(
        self, llm: LLM, *, url: str, key: str | None = None, refusal: str = REFUSAL
    ) -> None:
        """Prepare.

        Args:
            llm: What answers.
            url: Where ``latentguard serve`` listens.
            key: Its API key, if it asks for one.
            refusal: What a flagged request is answered with.
        """
        super().__init__(callback_manager=llm.callback_manager)
        self._llm = llm
        self._service = GuardService(url, key=key)
        self._refusal = refusal

    @classmethod
    def class_name(cls) -> str:
        """As LlamaIndex names it."""
        return "latentguard_llm"

    @property
    def metadata(self) -> LLMMetadata:
        """Of the model that answers."""
        return self._llm.metadata

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt."""
        verdict = self._service.score_chat(_user(prompt))
        if verdict.flagged:
            return self._completion(verdict)
        return self._llm.complete(prompt, formatted=formatted, **kwargs)

    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Complete a prompt, piece by piece."""
        verdict = self._service.score_chat(_user(prompt))
        if verdict.flagged:
            return iter([self._completion(verdict)])
        return self._llm.stream_complete(prompt, formatted=formatted, **kwargs)

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a chat."""
        verdict = self._service.score_chat(_messages(messages))
        return self._reply(verdict) if verdict.flagged else self._llm.chat(messages, **kwargs)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a chat, piece by piece."""
        verdict = self._service.score_chat(_messages(messages))
        if verdict.flagged:
            return iter([self._reply(verdict)])
        return self._llm.stream_chat(messages, **kwargs)

    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """Complete a prompt."""
        verdict = await self._service.score_chat_async(_user(prompt))
        if verdict.flagged:
            return self._completion(verdict)
        return await self._llm.acomplete(prompt, formatted=formatted, **kwargs)

    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Complete a prompt, piece by piece."""
        verdict = await self._service.score_chat_async(_user(prompt))
        if verdict.flagged:
            return _only(self._completion(verdict))
        return await self._llm.astream_complete(prompt, formatted=formatted, **kwargs)

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a chat."""
        verdict = await self._service.score_chat_async(_messages(messages))
        if verdict.flagged:
            return self._reply(verdict)
        return await self._llm.achat(messages, **kwargs)

    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """Answer a chat, piece by piece."""
        verdict = await self._service.score_chat_async(_messages(messages))
        if verdict.flagged:
            return _only(self._reply(verdict))
        return await self._llm.astream_chat(messages, **kwargs)

    def _completion(self, verdict: ServedVerdict) -> CompletionResponse:
        note = {"latentguard": dict(verdict.fields)}
        return CompletionResponse(text=self._refusal, delta=self._refusal, additional_kwargs=note)

    def _reply(self, verdict: ServedVerdict) -> ChatResponse:
        message = ChatMessage(role="assistant", content=self._refusal)
        note = {"latentguard": dict(verdict.fields)}
        return ChatResponse(message=message, delta=self._refusal, additional_kwargs=note)


class GuardedNodes(BaseNodePostprocessor):
    """Leaves out retrieved texts that are flagged."""

    _service: GuardService = PrivateAttr()

    def __init__(self, *, url: str, key: str | None = None) -> None:
        """Prepare.

        Args:
            url: Where ``latentguard serve`` listens.
            key: Its API key, if it asks for one.
        """
        super().__init__()
        self._service = GuardService(url, key=key)

    @classmethod
    def class_name(cls) -> str:
        """As LlamaIndex names it."""
        return "latentguard_nodes"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        texts = [node.get_content() for node in nodes]
        spoken = [text for text in texts if text.strip()]
        verdicts = dict(zip(spoken, self._service.score_texts(spoken), strict=True))
        return [
            node
            for node, text in zip(nodes, texts, strict=True)
            if text not in verdicts or not verdicts[text].flagged
        ]


async def _only(response: Any) -> Any:
    yield response


def _user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages in OpenAI's schema.

    Raises:
        LatentGuardError: if a block of one cannot be read.
    """
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> dict[str, Any]:
    blocks = {kind: [b for b in message.blocks if b.block_type == kind] for kind in READ_BLOCKS}
    if unread := [b.block_type for b in message.blocks if b.block_type not in READ_BLOCKS]:
        raise LatentGuardError(f"The guard reads text only; found a block of type {unread[0]}.")
    calls = [
        {"name": block.tool_name, "arguments": block.tool_kwargs} for block in blocks["tool_call"]
    ]
    calls += [_plain(call) for call in message.additional_kwargs.get("tool_calls") or ()]
    role = str(message.role.value)
    fields = {
        "role": "assistant" if role in ("chatbot", "model") else role,
        "content": "\n".join(block.text for block in blocks["text"]),
        "reasoning": "\n".join(block.content or "" for block in blocks["thinking"]),
        "tool_calls": calls,
    }
    return {name: value for name, value in fields.items() if value or name == "content"}


def _plain(call: Any) -> Any:
    """A call as JSON has it."""
    return call.model_dump() if hasattr(call, "model_dump") else call
