"""A client of ``latentguard serve`` for programs that guard what they send to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from latentguard.errors import LatentGuardError
from latentguard.serve.config import ServeConfig

REFUSAL = ServeConfig.refusal
"""What a flagged chat is answered with, as by the service."""


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
        return self._ask({"input": list(texts)}, len(texts)) if texts else []

    def score_chat(self, messages: Sequence[Mapping[str, Any]]) -> ServedVerdict:
        """The verdict on a chat of messages in OpenAI's schema.

        Raises:
            LatentGuardError: if the service gives none.
        """
        return self._ask({"messages": list(messages)}, 1)[0]

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
        return _verdicts(answer, 1)[0]

    def _ask(self, body: Mapping[str, Any], count: int) -> list[ServedVerdict]:
        try:
            answer = httpx.post(self._url, json=body, headers=self._headers, timeout=self._timeout)
        except httpx.HTTPError as error:
            raise _no_verdict(type(error).__name__) from None
        return _verdicts(answer, count)


def _verdicts(answer: httpx.Response, count: int) -> list[ServedVerdict]:
    if answer.status_code != 200:
        raise _no_verdict(_reason(answer))
    try:
        body: dict[str, Any] = answer.json()
        verdicts = [_verdict(one, body["model"]) for one in body["results"]]
    except (ValueError, LookupError, TypeError):
        raise _no_verdict("its answer is not that of 'latentguard serve'.") from None
    if len(verdicts) != count:
        raise _no_verdict(f"{count} verdicts were expected; found {len(verdicts)}.")
    return verdicts


def _verdict(one: Mapping[str, Any], guard: str) -> ServedVerdict:
    """A verdict of the service; TypeError if its decision is no yes or no."""
    if not isinstance(one["flagged"], bool):
        raise TypeError("flagged")
    return ServedVerdict(one["flagged"], float(one["probability"]), one["category"], guard, one)


def _no_verdict(reason: str) -> LatentGuardError:
    return LatentGuardError(f"The guard gave no verdict: {reason}")


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"status {answer.status_code}"
