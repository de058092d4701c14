"""Middleware for LangChain's agents: what is about to reach the model is read first.

```python
from langchain.agents import create_agent
from latentguard.integrations.langchain import LatentGuardMiddleware

agent = create_agent(model, tools, middleware=[LatentGuardMiddleware("http://127.0.0.1:8400")])
```
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages

from latentguard.integrations.service_client import REFUSAL, GuardService, ServedVerdict


class LatentGuardMiddleware(AgentMiddleware):
    """Answers a flagged chat with a refusal, so that the agent ends; tool results are read, too.

    Put it last: the last middleware sees what the others made of the request.
    """

    def __init__(
        self, url: str, *, key: str | None = None, refusal: str = REFUSAL, timeout: float = 60.0
    ) -> None:
        """Prepare.

        Args:
            url: Where ``latentguard serve`` listens.
            key: Its API key, if it asks for one.
            refusal: What a flagged chat is answered with.
            timeout: Seconds for one request.
        """
        super().__init__()
        self._service = GuardService(url, key=key, timeout=timeout)
        self._refusal = refusal

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """Call the model, unless the chat is flagged.

        Raises:
            LatentGuardError: if there is no verdict.
        """
        verdict = self._service.score_chat(_messages(request))
        return self._refused(verdict) if verdict.flagged else handler(request)

    async def awrap_model_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """Call the model, unless the chat is flagged.

        Raises:
            LatentGuardError: if there is no verdict.
        """
        verdict = await self._service.score_chat_async(_messages(request))
        return self._refused(verdict) if verdict.flagged else await handler(request)

    def _refused(self, verdict: ServedVerdict) -> AIMessage:
        note = {"finish_reason": "content_filter", "latentguard": dict(verdict.fields)}
        return AIMessage(content=self._refusal, response_metadata=note)


def _messages(request: Any) -> list[dict[str, Any]]:
    """The chat of a request in OpenAI's schema, its system message first."""
    first: Sequence[BaseMessage] = [request.system_message] if request.system_message else []
    messages = convert_to_openai_messages([*first, *request.messages])
    return [dict(message) for message in messages]
