"""Replies in the objects of OpenAI's ``/v1/responses``: whole, or as its events."""

from __future__ import annotations

from collections.abc import Mapping
from time import time
from typing import Any, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from latentguard.serve.replies import sse_event
from latentguard.serve.upstream_formats import refusal_content, text_content

INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why a chat's reply ended -> why a response is incomplete; any other end is complete."""


class ResponseObject(BaseModel):
    """OpenAI's answer."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]


class ResponseWriter:
    """Puts a reply into the objects of ``/v1/responses``."""

    def __init__(
        self, mark: str, name: str, note: Mapping[str, Any], *, echo: Mapping[str, Any]
    ) -> None:
        """Begin a response.

        Args:
            mark: Names it.
            name: Of the model.
            note: What is said of the verdict on the chat.
            echo: Parameters of the request that the response repeats.
        """
        self._note = dict(note.get("latentguard", {}))
        self._message = f"msg_{mark}"
        self._number = -1
        self._content: dict[str, Any] | None = None
        """The part that is being written."""

        self._response = dict(
            id=f"resp_{mark}",
            object="response",
            created_at=int(time()),
            model=name,
            error=None,
            parallel_tool_calls=False,
            tool_choice="none",
            tools=[],
            store=False,
            previous_response_id=None,
            **echo,
        )

    def whole(
        self,
        text: str,
        finish: str,
        usage: dict[str, int],
        *,
        refusal: str | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> Response:
        """The response in one, and what is to be noted of the reply."""
        self._content = text_content(text) if refusal is None else refusal_content(refusal)
        return JSONResponse(self._finished(finish, usage, note))

    def first(self) -> str:
        """A response without output."""
        response = self._at("in_progress", [])
        kinds = ("response.created", "response.in_progress")
        return "".join(self._event(kind, response=response) for kind in kinds)

    def piece(self, text: str, note: Mapping[str, Any] | None = None) -> str:
        """A piece of text, and what is to be noted of it."""
        begin = self._begin(text_content(""))
        assert self._content is not None
        self._content["text"] += text
        delta = dict(self._place, delta=text, logprobs=[]) | dict(note or {})
        return begin + self._event("response.output_text.delta", **delta)

    def refusal(self, text: str) -> str:
        """A refusal, in one piece."""
        begin = self._begin(refusal_content(""))
        assert self._content is not None
        self._content["refusal"] = text
        return begin + self._event("response.refusal.delta", **self._place, delta=text)

    def last(
        self, finish: str, usage: dict[str, int], note: Mapping[str, Any] | None = None
    ) -> str:
        """The last events, and what is to be noted of the whole reply."""
        begin = self._begin(text_content(""))
        response = self._finished(finish, usage, note)
        part = self._content
        assert part is not None
        if part["type"] == "refusal":
            ends = self._event("response.refusal.done", **self._place, refusal=part["refusal"])
        else:
            text = dict(text=part["text"], logprobs=[])
            ends = self._event("response.output_text.done", **self._place, **text)
        ends += self._event("response.content_part.done", **self._place, part=part)
        item = response["output"][0]
        ends += self._event("response.output_item.done", output_index=0, item=item)
        return begin + ends + self._event(f"response.{response['status']}", response=response)

    @property
    def _place(self) -> dict[str, Any]:
        return dict(item_id=self._message, output_index=0, content_index=0)

    def _begin(self, part: dict[str, Any]) -> str:
        """Begin the message with an empty part, unless it has begun."""
        if self._content is not None:
            return ""
        self._content = part
        item = self._item("in_progress", [])
        added = self._event("response.output_item.added", output_index=0, item=item)
        return added + self._event("response.content_part.added", **self._place, part=part)

    def _finished(
        self, finish: str, usage: dict[str, int], note: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        status = "incomplete" if finish in INCOMPLETE else "completed"
        response = self._at(status, [self._item(status, [self._content])])
        if finish in INCOMPLETE:
            response["incomplete_details"] = dict(reason=INCOMPLETE[finish])
        notes = self._note | dict((note or {}).get("latentguard", {}))
        return response | dict(usage=_usage(usage)) | ({"latentguard": notes} if notes else {})

    def _at(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        note = {"latentguard": self._note} if self._note else {}
        state = dict(status=status, output=output, incomplete_details=None, usage=None)
        return self._response | state | note

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        return dict(
            type="message", id=self._message, role="assistant", status=status, content=content
        )

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        data = dict(type=kind, sequence_number=self._number, **fields)
        return f"event: {kind}\n{sse_event(data)}"


def _usage(chat: Mapping[str, int]) -> dict[str, Any]:
    """Tokens, by the names of a response."""
    return dict(
        input_tokens=chat["prompt_tokens"],
        input_tokens_details=dict(cached_tokens=0),
        output_tokens=chat["completion_tokens"],
        output_tokens_details=dict(reasoning_tokens=0),
        total_tokens=chat["total_tokens"],
    )
