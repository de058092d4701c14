"""How an upstream writes its answers: where their texts are, and how an answer ends or is refused.

One format for ``/v1/chat/completions`` and one for ``/v1/responses``; each follows one answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from latentguard.serve.errors import UpstreamError
from latentguard.serve.replies import sse_event
from latentguard.serve.reply_texts import choice_text, shown_strings, unreadable_kinds

END = b"data: [DONE]"

ENDS = ("response.completed", "response.incomplete", "response.failed", "error")
"""Types of the last event of a response."""


@dataclass(frozen=True)
class StreamEvent:
    """One server-sent event."""

    lines: tuple[bytes, ...]
    """As they came, without the blank line at its end."""

    @cached_property
    def data(self) -> dict[str, Any]:
        """The object of its data; an empty one if there is none.

        Raises:
            UpstreamError: if the data is no JSON.
        """
        content = b"\n".join(line[5:] for line in self.lines if line.startswith(b"data:"))
        if not content.strip() or content.strip() == b"[DONE]":
            return {}
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            raise UpstreamError("An event of the upstream's stream is no JSON.") from None
        return data if isinstance(data, dict) else {}

    @property
    def content(self) -> bytes:
        """The event as it is sent."""
        return b"".join(line + b"\n" for line in self.lines) + b"\n"

    def with_data(self, data: Mapping[str, Any]) -> StreamEvent:
        """The event with another object.

        Raises:
            UpstreamError: if the object is no strict JSON.
        """
        others = [line for line in self.lines if not line.startswith(b"data:")]
        return StreamEvent((*others, b"data: " + strict_json(data)))

    def with_reply_score(self, score: float) -> StreamEvent:
        """The event with the running score of the reply after it."""
        note = dict(self.data.get("latentguard") or {}) | {"reply_score": score}
        return self.with_data(self.data | {"latentguard": note})


def strict_json(body: Mapping[str, Any]) -> bytes:
    """An answer as strict JSON.

    Raises:
        UpstreamError: if it holds what strict JSON does not know.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # NaN, lone surrogates, thousands of levels
        raise UpstreamError("The upstream's answer is no strict JSON.") from None


async def stream_events(lines: AsyncIterator[bytes]) -> AsyncIterator[StreamEvent]:
    """Lines of a stream as events: each ends with a blank line."""
    buffer = list[bytes]()
    async for line in lines:
        if line.strip():
            buffer.append(line)
        elif buffer:
            yield StreamEvent(tuple(buffer))
            buffer = []
    if buffer:
        yield StreamEvent(tuple(buffer))


class AnswerFormat(Protocol):
    """What of an answer depends on the endpoint that it answers."""

    def new_texts(self, data: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Texts of an event that no event before it held, each with the choice it belongs to."""
        ...

    def deltas(self, data: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Texts that an event adds to what its client shows."""
        ...

    def texts(self, body: Mapping[str, Any]) -> list[tuple[int, str]]:
        """All texts of an answer in one, each with the choice it belongs to."""
        ...

    def unreadable(self, data: Mapping[str, Any]) -> list[str]:
        """Names of what in an event or an answer may be no plain text."""
        ...

    def is_last(self, event: StreamEvent) -> bool:
        """Whether an event ends the answer."""
        ...

    def show(self, events: Sequence[StreamEvent]) -> None:
        """Take note of events that were sent on."""
        ...

    def with_verdict(self, event: StreamEvent, note: Mapping[str, Any]) -> StreamEvent:
        """An event with what is noted of the chat, where this format notes it."""
        ...

    def closing(self, last: StreamEvent, notes: Mapping[str, Any]) -> list[StreamEvent]:
        """The last event with what is noted of the reply."""
        ...

    def cut(
        self, choices: Sequence[int], refusal: str | None, notes: Mapping[str, Any]
    ) -> list[StreamEvent]:
        """The end of a stream that stops here; None says nothing instead of the rest."""
        ...

    def refused(
        self, body: Mapping[str, Any], choices: Sequence[int], refusal: str
    ) -> dict[str, Any]:
        """An answer in one, with a refusal in place of some of its choices."""
        ...


class ChatFormat:
    """Answers to ``/v1/chat/completions``."""

    def __init__(self) -> None:
        """Begin before the first event."""
        self._head: dict[str, Any] = {}
        self._is_noted = False

    def new_texts(self, data: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Of each choice's delta."""
        texts = self.deltas(data)
        if texts:
            self._head = {name: data[name] for name in ("id", "created", "model") if name in data}
        return texts

    def deltas(self, data: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Of each choice's delta."""
        return _texts_of_choices(data)

    def texts(self, body: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Of each choice's message."""
        return _texts_of_choices(body)

    def unreadable(self, data: Mapping[str, Any]) -> list[str]:
        """In its choices."""
        return list(unreadable_kinds(data.get("choices")))

    def is_last(self, event: StreamEvent) -> bool:
        """Whether it says that the stream is done."""
        return event.lines[-1].strip() == END

    def show(self, events: Sequence[StreamEvent]) -> None:
        """Each event stands by itself."""

    def with_verdict(self, event: StreamEvent, note: Mapping[str, Any]) -> StreamEvent:
        """The first object has it."""
        if not note or self._is_noted or not event.data:
            return event
        self._is_noted = True
        return event.with_data(event.data | dict(note))

    def closing(self, last: StreamEvent, notes: Mapping[str, Any]) -> list[StreamEvent]:
        """A chunk before the last event has it."""
        return [self._chunk([], notes), last]

    def cut(
        self, choices: Sequence[int], refusal: str | None, notes: Mapping[str, Any]
    ) -> list[StreamEvent]:
        """A chunk with the reason, and the last event."""
        delta = {} if refusal is None else {"content": refusal}
        ends = [dict(index=i, delta=delta, finish_reason="content_filter") for i in choices]
        return [self._chunk(ends, notes), StreamEvent((END,))]

    def refused(
        self, body: Mapping[str, Any], choices: Sequence[int], refusal: str
    ) -> dict[str, Any]:
        """The message of each such choice is the refusal."""
        message = {"role": "assistant", "content": refusal, "refusal": refusal}
        end = {"message": message, "finish_reason": "content_filter", "logprobs": None}
        answers = [
            choice | end if int(choice.get("index", 0)) in choices else choice
            for choice in body["choices"]
        ]
        return dict(body) | {"choices": answers}

    def _chunk(self, choices: list[dict[str, Any]], notes: Mapping[str, Any]) -> StreamEvent:
        head = self._head | {"object": "chat.completion.chunk", "choices": choices}
        return _event_of(sse_event(head | dict(notes)))


class ResponsesFormat:
    """Answers to ``/v1/responses``: one reply, whose items are read in the order they come in."""

    def __init__(self) -> None:
        """Begin before the first event."""
        self._response: dict[str, Any] = {}
        self._text = ""
        self._shown = ""
        self._number = 0

    def new_texts(self, data: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Deltas, and whatever else an event says that was not said before."""
        if isinstance(data.get("response"), dict):
            self._response = data["response"]
        if isinstance(data.get("sequence_number"), int):
            self._number = data["sequence_number"]
        added = list(shown_strings(data.get("delta")))
        self._text += "".join(added)
        response = data.get("response")
        source = {name: value for name, value in data.items() if name != "delta"}
        if isinstance(response, dict):
            source = {"output": response.get("output")}
        elif data.get("type") == "error":  # the upstream's own words
            source = {}
        fresh = [text for text in shown_strings(source) if text not in self._text]
        self._text += "".join(fresh)
        return [(0, text) for text in (*added, *fresh)]

    def deltas(self, data: Mapping[str, Any]) -> list[tuple[int, str]]:
        """The one text of an event that adds some."""
        delta = data.get("delta")
        return [(0, delta)] if isinstance(delta, str) and delta else []

    def texts(self, body: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Of all items."""
        return [(0, text) for text in shown_strings({"output": body.get("output")})]

    def unreadable(self, data: Mapping[str, Any]) -> list[str]:
        """In an event, or in the items of a response."""
        kind = data.get("type")
        sound = [kind] if isinstance(kind, str) and kind.endswith("audio.delta") else []
        response = data.get("response")
        if isinstance(response, dict):
            data = {"output": response.get("output")}
        elif "output" in data:  # a response in one, beside its request's tools
            data = {"output": data["output"]}
        return [*sound, *unreadable_kinds(data)]

    def is_last(self, event: StreamEvent) -> bool:
        """Whether its type ends a response."""
        return event.data.get("type") in ENDS

    def show(self, events: Sequence[StreamEvent]) -> None:
        """Keep what was shown of the message, for the object at a cut."""
        for event in events:
            if event.data.get("type") == "response.output_text.delta":
                self._shown += str(event.data.get("delta") or "")

    def with_verdict(self, event: StreamEvent, note: Mapping[str, Any]) -> StreamEvent:
        """Each event with the response has it."""
        response = event.data.get("response")
        if not note or not isinstance(response, dict):
            return event
        return event.with_data(event.data | {"response": _noted(response, note)})

    def closing(self, last: StreamEvent, notes: Mapping[str, Any]) -> list[StreamEvent]:
        """The response in the last event has it."""
        response = last.data.get("response")
        if not isinstance(response, dict):
            return [last]
        return [last.with_data(last.data | {"response": _noted(response, notes)})]

    def cut(
        self, choices: Sequence[int], refusal: str | None, notes: Mapping[str, Any]
    ) -> list[StreamEvent]:
        """An incomplete response: what was shown, or the refusal."""
        content = text_content(self._shown) if refusal is None else refusal_content(refusal)
        response = _noted(self._response | incomplete_response([content]), notes)
        kind = "response.incomplete"
        data = dict(type=kind, sequence_number=self._number + 1, response=response)
        return [_event_of(f"event: {kind}\n{sse_event(data)}")]

    def refused(
        self, body: Mapping[str, Any], choices: Sequence[int], refusal: str
    ) -> dict[str, Any]:
        """All items give way to the refusal."""
        return dict(body) | incomplete_response([refusal_content(refusal)])


def text_content(text: str) -> dict[str, Any]:
    """A text in a message of a response."""
    return dict(type="output_text", text=text, annotations=[])


def refusal_content(text: str) -> dict[str, Any]:
    """A refusal in a message of a response."""
    return dict(type="refusal", refusal=text)


def incomplete_response(content: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a response that was filtered."""
    message = dict(
        type="message", id="msg_0", role="assistant", status="incomplete", content=content
    )
    return dict(
        status="incomplete", incomplete_details=dict(reason="content_filter"), output=[message]
    )


def _noted(response: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, Any]:
    note = dict(notes.get("latentguard", {})) | dict(response.get("latentguard") or {})
    return dict(response) | ({"latentguard": note} if note else {})


def _event_of(text: str) -> StreamEvent:
    return StreamEvent(tuple(text.encode().strip().split(b"\n")))


def _texts_of_choices(answer: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The index of each choice, and all of its text.

    Raises:
        UpstreamError: if the choices are of another shape than OpenAI's, or cannot be read.
    """
    try:
        return [
            (int(choice.get("index", 0)), choice_text(choice))
            for choice in answer.get("choices") or ()
        ]
    except (AttributeError, TypeError, ValueError):
        raise UpstreamError("The upstream's choices cannot be read.") from None
