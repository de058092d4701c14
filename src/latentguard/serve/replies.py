"""Replies in OpenAI's objects: whole, or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from time import time
from typing import Any, Literal, Protocol

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from latentguard.guard.replies import ReplyVerdict
from latentguard.serve.config import ReplyPolicy
from latentguard.serve.errors import ApiError
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.service import RequestContext

ScoredOrError = ScoredPrompt | ApiError
"""A verdict, or why there is none though the chat is answered."""


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(BaseModel):
    """The reply."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class Choice(BaseModel):
    """The one reply."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: None


class ChatResponse(BaseModel):
    """OpenAI's answer."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ReplyWriter(Protocol):
    """Writes one reply as an endpoint's objects: in one, or as server-sent events."""

    def whole(
        self,
        text: str,
        finish: str,
        usage: dict[str, int],
        *,
        refusal: str | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> Response:
        """The answer in one, and what is to be noted of the reply."""
        ...

    def first(self) -> str:
        """The first events of a stream."""
        ...

    def piece(self, text: str, note: Mapping[str, Any] | None = None) -> str:
        """A piece of text, and what is to be noted of it."""
        ...

    def refusal(self, text: str) -> str:
        """A refusal in place of the text."""
        ...

    def last(
        self, finish: str, usage: dict[str, int], note: Mapping[str, Any] | None = None
    ) -> str:
        """The last events, and what is to be noted of the whole reply."""
        ...


class ChatWriter:
    """Puts a reply into the objects of ``/v1/chat/completions``."""

    def __init__(self, mark: str, name: str, note: Mapping[str, Any], *, usage: bool) -> None:
        """Begin the reply ``mark`` of the model ``name``, with what is told of its verdict."""
        self._note, self._usage = note, usage
        self._head = dict(id=f"chatcmpl-{mark}", created=int(time()), model=name)

    def whole(
        self,
        text: str,
        finish: str,
        usage: dict[str, int],
        *,
        refusal: str | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> Response:
        """The answer in one, and what is to be noted of the reply."""
        message = dict(role="assistant", content=text, refusal=refusal)
        choice = dict(index=0, message=message, finish_reason=finish, logprobs=None)
        body = self._head | dict(object="chat.completion", choices=[choice], usage=usage)
        notes = dict(self._note.get("latentguard", {})) | dict((note or {}).get("latentguard", {}))
        return JSONResponse(body | ({"latentguard": notes} if notes else {}))

    def first(self) -> str:
        """The first event of a stream."""
        return self._chunk(dict(role="assistant", content=""), None, self._note)

    def piece(self, text: str, note: Mapping[str, Any] | None = None) -> str:
        """A piece of text, and what is to be noted of it."""
        return self._chunk(dict(content=text), None, note)

    def refusal(self, text: str) -> str:
        """A refusal, as a piece."""
        return self.piece(text)

    def last(
        self, finish: str, usage: dict[str, int], note: Mapping[str, Any] | None = None
    ) -> str:
        """The last events, and what is to be noted of the whole reply."""
        end = self._chunk({}, finish, note)
        if self._usage:
            end += sse_event(self._part([]) | dict(usage=usage))
        return f"{end}data: [DONE]\n\n"

    def _chunk(
        self, delta: dict[str, Any], finish: str | None, note: Mapping[str, Any] | None = None
    ) -> str:
        choice = dict(index=0, delta=delta, finish_reason=finish, logprobs=None)
        return sse_event(self._part([choice]) | dict(note or {}))

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | dict(object="chat.completion.chunk", choices=choices)


def refused_reply(writer: ReplyWriter, text: str, *, is_stream: bool) -> Response:
    """The answer to a blocked chat: a refusal, in one or as the events of a stream."""
    finish, usage = "content_filter", token_usage(0, 0)
    if not is_stream:
        return writer.whole(text, finish, usage, refusal=text)
    events = [writer.first(), writer.refusal(text), writer.last(finish, usage)]
    return Response("".join(events), media_type="text/event-stream")


def verdict_note(context: RequestContext, judged: ScoredOrError) -> dict[str, Any]:
    """What an answer says of its verdict; a shadow says nothing."""
    if context.service.config.policy == "shadow":
        return {}
    if isinstance(judged, ApiError):
        return {"latentguard": {"error": judged.code}}
    fields = judged.to_dict()
    del fields["id"]
    if context.service.config.on_review == "pass":
        del fields["decision"]
    return {"latentguard": fields}


def reply_note(policy: ReplyPolicy, verdict: ReplyVerdict | None) -> dict[str, Any]:
    """What an answer says of the verdict on its reply; a shadow says nothing."""
    if verdict is None or policy == "shadow":
        return {}
    fields = verdict.to_dict()
    del fields["id"]
    return {"latentguard": {"reply": fields}}


def token_usage(prompt: int, reply: int) -> dict[str, int]:
    """Tokens."""
    return dict(prompt_tokens=prompt, completion_tokens=reply, total_tokens=prompt + reply)


def sse_event(content: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
