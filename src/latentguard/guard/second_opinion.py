"""Second opinions: what is asked of a prompt on which a guard is not sure.

A second opinion is another guard with its own model, a guard model (Llama Guard and others, see
``models/guard_models``), or an OpenAI-compatible endpoint. The last gets the text of each prompt
that it is asked of; the others keep it on this machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urldefrag, urlsplit

import httpx

from latentguard.errors import GuardError, LatentGuardError, ModelError
from latentguard.guard.artifact import JSON_FILE
from latentguard.guard.hub import find_guard
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.guard_models import LazyGuardModel, is_unsafe_reply
from latentguard.prompts import Prompt
from latentguard.states import no_progress

log = logging.getLogger("latentguard.second_opinion")

KEY = "LATENTGUARD_SECOND_OPINION_KEY"
"""Environment variable that holds the API key of an endpoint."""

SECONDS = httpx.Timeout(10.0, connect=5.0)
"""That an endpoint may take."""

CONNECTIONS = 16
"""Prompts of which an endpoint is asked at the same time."""

VERDICT_TOKENS = 16
"""Tokens in which a guard model puts its verdict; reasons may follow."""

MODERATIONS = "/moderations"
"""How the address of a moderation endpoint ends."""

TRIAL = Prompt("Hello.", id="trial")
"""Shows whether an endpoint answers."""


class SecondOpinion(Protocol):
    """Says of prompts whether they are to be blocked."""

    name: str
    """Which it is: a guard that was calibrated with another makes no promise."""

    at_once: int
    """How many threads may ask at the same time."""

    is_graded: bool
    """Whether its scores rank prompts; else they are 1 and -1."""

    def load(self) -> None:
        """Load its model, or try its endpoint.

        Raises:
            LatentGuardError: if it cannot give opinions.
        """

    def score(self, prompts: Sequence[Prompt]) -> list[float | None]:
        """A score of each prompt, over 0 where it would block; None where it fails."""


def open_second_opinion(source: str) -> SecondOpinion:
    """The second opinion of a name, not loaded.

    Args:
        source: A guard's folder or Hub id; the folder or Hub id of a guard model; the URL of a
            moderation endpoint, as ``https://host/v1/moderations``; or the URL of a chat endpoint
            and the name of a guard model there, as ``http://host:8000/v1#org/model``.

    Raises:
        LatentGuardError: if there is no such guard, model or URL.
    """
    if source.startswith(("http://", "https://")):
        return EndpointOpinion(source)
    folder = find_guard(source)
    if (folder / JSON_FILE).exists():
        return GuardOpinion(LatentGuard.load(folder))
    return GuardModelOpinion(source)


class GuardOpinion:
    """Another guard, which loads its own model."""

    at_once = 1
    is_graded = True

    def __init__(self, guard: LatentGuard) -> None:
        """Name the guard."""
        self._guard = guard
        self.name = f"guard {guard.digest[:12]} of {Path(guard.fingerprint.model).name}"

    def load(self) -> None:
        """Load and verify the model of the guard."""
        _ = self._guard.model

    def score(self, prompts: Sequence[Prompt]) -> list[float | None]:
        """How far the score of each prompt lies above the threshold of the guard."""
        try:
            verdicts = list(self._guard.scan(self._guard.model, prompts, progress=no_progress))
        except LatentGuardError as error:
            return _score_each(self, prompts, error)
        return [
            verdict.score
            - self._guard.threshold_for(prompt.segment, has_evidence=bool(verdict.evidence))
            for prompt, verdict in zip(prompts, verdicts, strict=True)
        ]


class GuardModelOpinion:
    """A guard model on this machine, such as Llama Guard."""

    at_once = 1
    is_graded = True

    def __init__(self, source: str) -> None:
        """Name the guard model.

        Raises:
            ModelError: if it is of no known family.
        """
        self._model = LazyGuardModel(source)
        self.name = f"guard model {source}"

    def load(self) -> None:
        """Load the model."""
        self._model.load()

    def score(self, prompts: Sequence[Prompt]) -> list[float | None]:
        """P(unsafe) - 0.5 of each prompt."""
        try:
            chances = self._model(prompts)
        except LatentGuardError as error:
            return _score_each(self, prompts, error)
        return [chance - 0.5 for chance in chances]


def _score_each(
    second: SecondOpinion, prompts: Sequence[Prompt], error: LatentGuardError
) -> list[float | None]:
    """One prompt at a time, so that one that cannot be read does no harm to the others."""
    if len(prompts) > 1:
        return [score for prompt in prompts for score in second.score([prompt])]
    log.warning("No second opinion of prompt %s: %s", prompts[0].id, error)
    return [None]


class EndpointOpinion:
    """A moderation endpoint, or a guard model behind a chat endpoint."""

    at_once = CONNECTIONS
    is_graded = False

    def __init__(self, address: str, *, key: str | None = None) -> None:
        """Name the endpoint.

        Args:
            address: Its URL; what follows ``#`` is the name of a model there, and is not sent as
                part of the URL.
            key: API key; that of the environment variable ``LATENTGUARD_SECOND_OPINION_KEY`` if
                None.

        Raises:
            GuardError: if it is no such URL, or the key is empty.
        """
        url, self._model = urldefrag(address)
        parts = urlsplit(url)
        self._is_moderation = parts.path.endswith(MODERATIONS)
        has_key = "@" in parts.netloc or parts.query  # the address is kept with the guard
        if not parts.hostname or has_key or not (self._is_moderation or self._model):
            raise GuardError(
                "The URL of a second opinion should end with /moderations, or with # and the name "
                "of a guard model, as http://localhost:8000/v1#org/model; it holds no key. Set the "
                f"key in {KEY}."
            )
        self._url = url if self._is_moderation else f"{url.rstrip('/')}/chat/completions"
        self.name = address
        key = key if key is not None else os.environ.get(KEY)
        if key is not None and not key.strip():
            raise GuardError(f"{KEY} holds no key; expected one, or no variable.")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=CONNECTIONS)
        self._client = httpx.Client(headers=headers, timeout=SECONDS, limits=limits)

    def load(self) -> None:
        """Ask of a greeting.

        Raises:
            GuardError: if there is no answer; says why.
        """
        try:
            self._is_blocked(TRIAL)
        except (httpx.HTTPError, LookupError, TypeError, ValueError, ModelError) as error:
            raise GuardError(
                f"The second opinion at {self._url} does not answer ({_reason(error)}). Check the "
                f"address, the name of the model, and the key in {KEY}."
            ) from None

    def score(self, prompts: Sequence[Prompt]) -> list[float | None]:
        """1 where it flags a prompt, else -1; each prompt is a request."""
        if len(prompts) < 2:
            return [self._score_one(prompt) for prompt in prompts]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(self._score_one, prompts))

    def _score_one(self, prompt: Prompt) -> float | None:
        try:
            return 1.0 if self._is_blocked(prompt) else -1.0
        except (httpx.HTTPError, LookupError, TypeError, ValueError, ModelError) as error:
            log.warning("No second opinion of prompt %s: %s", prompt.id, _reason(error))
            return None

    def _is_blocked(self, prompt: Prompt) -> bool:
        if self._is_moderation:
            [result] = self._post({"input": _whole_text(prompt)})["results"]
            if not isinstance(result["flagged"], bool):
                raise ValueError("'flagged' is not true or false")
            return result["flagged"]
        turns = [dict(role=turn.role, content=turn.content) for turn in prompt.history]
        messages = [*turns, dict(role="user", content=prompt.text)]
        answer = self._post(dict(messages=messages, temperature=0, max_tokens=VERDICT_TOKENS))
        return is_unsafe_reply(answer["choices"][0]["message"]["content"])

    def _post(self, body: dict[str, Any]) -> Any:
        if self._model:
            body["model"] = self._model
        response = self._client.post(self._url, json=body)
        response.raise_for_status()
        return response.json()


def _whole_text(prompt: Prompt) -> str:
    """A prompt with its history, as one text."""
    return "\n\n".join([*(turn.content for turn in prompt.history), prompt.text])


def _reason(error: Exception) -> str:
    """Why there is no answer, without a word of what was sent."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    if isinstance(error, httpx.HTTPError | ModelError):
        return str(error) or type(error).__name__
    return "not an answer of a moderation or chat endpoint"
