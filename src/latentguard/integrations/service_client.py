"""A client of ``latentguard serve`` for programs that guard what they send to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from latentguard.errors import LatentGuardError

REFUSAL = "I'm sorry, but I can't help with that."
"""What a flagged chat is answered with."""


@dataclass(frozen=True)
class ServedVerdict:
    """What the service says of a text or a chat."""

    flagged: bool
    """Whether its score is above the threshold."""

    probability: float
    """That it is harmful."""

    category: str | None
    """The nearest risk category of a flagged one."""

    guard: str
    """Which guard says so."""

    fields: Mapping[str, Any]
    """All that the service says."""


class GuardService:
    """Asks a running service; whatever is no verdict is an error, so that nothing passes unread."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60.0) -> None:
        """Prepare.

        Args:
            url: Where ``latentguard serve`` listens.
            key: Its API key, if it asks for one.
            timeout: Seconds for one request.
        """
        self._url = f"{url.rstrip('/')}/v1/score"
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout = timeout

    def score_texts(self, texts: Sequence[str]) -> list[ServedVerdict]:
        """The verdict on each text.

        Raises:
            LatentGuardError: if the service gives none.
        """
        return self._ask({"input": list(texts)}) if texts else []

    def score_chat(self, messages: Sequence[Mapping[str, Any]]) -> ServedVerdict:
        """The verdict on a chat of messages in OpenAI's schema.

        Raises:
            LatentGuardError: if the service gives none.
        """
        return self._ask({"messages": list(messages)})[0]

    async def score_chat_async(self, messages: Sequence[Mapping[str, Any]]) -> ServedVerdict:
        """The same, without blocking an event loop.

        Raises:
            LatentGuardError: if the service gives no verdict.
        """
        body = {"messages": list(messages)}
        try:
            async with httpx.AsyncClient(timeout=self._timeout) as client:
                answer = await client.post(self._url, json=body, headers=self._headers)
        except httpx.HTTPError as error:
            raise _no_verdict(type(error).__name__) from None
        return _verdicts(answer)[0]

    def _ask(self, body: Mapping[str, Any]) -> list[ServedVerdict]:
        try:
            answer = httpx.post(self._url, json=body, headers=self._headers, timeout=self._timeout)
        except httpx.HTTPError as error:
            raise _no_verdict(type(error).__name__) from None
        return _verdicts(answer)


def _verdicts(answer: httpx.Response) -> list[ServedVerdict]:
    if answer.status_code != 200:
        raise _no_verdict(_reason(answer))
    body: dict[str, Any] = answer.json()
    return [
        ServedVerdict(
            bool(one["flagged"]), float(one["probability"]), one["category"], body["model"], one
        )
        for one in body["results"]
    ]


def _no_verdict(reason: str) -> LatentGuardError:
    return LatentGuardError(f"The guard gave no verdict: {reason}")


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"status {answer.status_code}"
