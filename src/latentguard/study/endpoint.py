"""A chat model behind an OpenAI-compatible endpoint, which says something of replies.

What it is asked goes to the address that the user names, and nowhere else. Its key comes from the
environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from latentguard.errors import StudyError

KEY = "LATENTGUARD_JUDGE_KEY"
"""Environment variable that holds the API key."""

REJECTED = (400, 413, 422)
"""Of this request, such as by a content filter; other errors are of every request."""

LONGEST_WAIT = 30.0
"""Seconds between two tries."""

T = TypeVar("T")


class UnreadReply(StudyError):
    """Of this reply the model cannot say anything."""


class Endpoint:
    """Asks one model, again where it is busy."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        timeout: float = 30.0,
        tries: int = 4,
    ) -> None:
        """Name the endpoint.

        Args:
            url: Its base, such as ``http://localhost:8000/v1``.
            model: The name of the model there.
            key: API key; that of the environment variable ``LATENTGUARD_JUDGE_KEY`` if None.
            timeout: Seconds to wait for an answer.
            tries: How often to ask if the endpoint is busy or out of reach.

        Raises:
            StudyError: if the address is not one, or no model is named.
        """
        if not url.startswith(("http://", "https://")) or not model:
            raise StudyError(
                "A judge model needs an address, such as http://localhost:8000/v1, and the name "
                f"of a model there; found '{url}' and '{model}'."
            )
        self.url, self.model, self.tries = f"{url.rstrip('/')}/chat/completions", model, tries
        key = key if key is not None else os.environ.get(KEY, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout)

    @property
    def about(self) -> dict[str, Any]:
        """Which model it is, without a key."""
        at = urlsplit(self.url)
        return dict(host=at.hostname, path=at.path, model=self.model)

    def ask(
        self, task: str, question: str, *, max_tokens: int, read: Callable[[str], T], expected: str
    ) -> T:
        """What the model answers.

        Args:
            task: The system message.
            question: The user's message.
            max_tokens: The longest answer.
            read: Makes something of the answer; raises ValueError or KeyError of an odd one.
            expected: What an answer should be, for people.

        Raises:
            UnreadReply: if it rejects this request, or answers otherwise.
            StudyError: if the endpoint cannot be reached, or rejects every request.
        """
        messages = [{"role": "system", "content": task}, {"role": "user", "content": question}]
        body = dict(model=self.model, messages=messages, temperature=0, max_tokens=max_tokens)
        response = self._post(body)
        content: Any = None
        try:
            content = response.json()["choices"][0]["message"]["content"]
            return read(content)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            content_kind = (
                f"{len(content)} other characters" if isinstance(content, str) else "no text"
            )
            raise UnreadReply(
                f"The judge model '{self.model}' at {self.url} should answer {expected}; found "
                f"{content_kind}. Use a model that follows instructions and does not think aloud."
            ) from error

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        failure, kind = "no answer", StudyError
        for n in range(self.tries):
            wait = min(0.5 * 2**n, LONGEST_WAIT)
            try:
                response = self._client.post(self.url, json=body)
            except httpx.TransportError as error:
                failure = str(error) or type(error).__name__
            else:
                if response.is_success:
                    return response
                failure = f"status {response.status_code}: {response.text[:200]}"
                if response.status_code in REJECTED:
                    kind = UnreadReply
                if response.status_code != 429 and response.status_code < 500:
                    break  # asking again does not help
                wait = _wait(response, wait)
            if n + 1 < self.tries:
                time.sleep(wait)
        raise kind(
            f"The judge model '{self.model}' at {self.url} did not answer ({failure}). Check the "
            f"address, the name of the model, and the key in {KEY}."
        )


def require_endpoint_table(name: str, table: Mapping[str, Any]) -> tuple[str, str]:
    """Address and model of a table ``[judge]`` or ``[rubric]`` of the configuration.

    Raises:
        StudyError: if it holds anything else.
    """
    if set(table) != {"url", "model"}:
        raise StudyError(
            f"The table [{name}] needs 'url' and 'model', and nothing else; found "
            f"{', '.join(sorted(table))}. The key comes from the environment: {KEY}."
        )
    return str(table["url"]), str(table["model"])


def _wait(response: httpx.Response, otherwise: float) -> float:
    """Seconds that a busy endpoint asks for."""
    retry_after = response.headers.get("Retry-After", "")
    return min(float(retry_after), LONGEST_WAIT) if retry_after.isdecimal() else otherwise
