"""Messages of a chat in OpenAI's schema: the fields that are accepted, and the texts in them.

A message holds nothing that the guard does not read: a field that is not listed here ends the
request with an error, unless it is empty. Parts of a message become one text, which is both what
the guard reads and what an upstream is sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from latentguard.prompts import Message, Prompt
from latentguard.serve.errors import BadRequest

NAME = re.compile(r"[\w.:@/-]{1,128}")
"""Names and ids: one word, too short and too plain for a request."""

PROSE = re.compile(r"\w\W+\w")
"""More than one word."""

READ_FIELDS = ("reasoning_content", "reasoning", "refusal")
"""Further texts of a message."""

NAME_FIELDS = ("name", "tool_call_id")

CALL_FIELDS = ("tool_calls", "function_call")

ID_FIELDS = ("id", "call_id", "tool_call_id")

DEPTH = 32
"""Levels of a value that is read."""

SCHEMA_WORDS = frozenset(
    "$ref $defs additionalProperties allOf anyOf array arguments auto boolean const custom default "
    "definitions description enum false format function id index input integer items json_object "
    "json_schema max maximum maxItems maxLength min minimum minItems minLength name none null "
    "number object oneOf parameters pattern properties required schema strict string text title "
    "true type".split()
)
"""Words that tools and schemas consist of; alone they say nothing."""


class ContentPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: str
    """Only ``text`` (also ``input_text``) can be read."""

    text: str | None = None
    """The text."""


class ChatMessage(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    """Who speaks."""

    content: str | list[ContentPart] | None = None
    """The text; None where an assistant only calls tools."""

    @property
    def text(self) -> str:
        """The content as one text.

        Raises:
            BadRequest: if a part of it is no text.
        """
        return self.content if isinstance(self.content, str) else text_of_parts(self.content or [])

    @property
    def speaker(self) -> Literal["system", "user", "assistant"]:
        """The role that every chat template knows; tools speak as users."""
        if self.role in ("system", "assistant"):
            return self.role
        return "system" if self.role == "developer" else "user"

    @property
    def side_texts(self) -> list[str]:
        """Reasoning and a refusal."""
        fields = self.model_extra or {}
        return [fields[name] for name in READ_FIELDS if fields.get(name)]

    @property
    def call_texts(self) -> list[str]:
        """Names and arguments of tools that are called."""
        fields = self.model_extra or {}
        return [text for name in CALL_FIELDS for text in texts_of(fields.get(name))]

    @property
    def other_texts(self) -> list[str]:
        """What the message holds beside its content."""
        return self.side_texts + self.call_texts

    def sanitized(self) -> dict[str, Any]:
        """The message as it is sent on: its parts joined, empty fields left out.

        Raises:
            BadRequest: if a field or a part cannot be read.
        """
        self.require_readable()
        extra_fields = {name: value for name, value in (self.model_extra or {}).items() if value}
        content = None if self.content is None else self.text
        return {"role": self.role, "content": content, **extra_fields}

    def require_readable(self) -> None:
        """Check that the message holds nothing but what the guard reads.

        Raises:
            BadRequest: if it does.
        """
        for name, value in (self.model_extra or {}).items():
            if not value:
                continue
            if name in NAME_FIELDS:
                require_name(name, value)
            elif name in READ_FIELDS:
                if not isinstance(value, str):
                    raise BadRequest(f"'{name}' of a message should be text.")
            elif name not in CALL_FIELDS:
                raise BadRequest(
                    f"'{name[:40]}' is no field of a message that this guard reads; leave it out."
                )


def require_name(field: str, value: Any) -> None:
    """Check that a value is a name of one word.

    Raises:
        BadRequest: if it is not.
    """
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise BadRequest(f"'{field}' should be one word of at most 128 letters, digits or ._:@/-")


def text_of_parts(parts: Sequence[ContentPart]) -> str:
    """The text of parts, joined by line ends.

    Raises:
        BadRequest: if one is no text: the guard cannot see images, and will not pretend to.
    """
    for part in parts:
        if part.type not in ("text", "input_text") or part.text is None:
            raise BadRequest(f"This guard reads text only; a part of type '{part.type[:40]}' came.")
        extra = [n for n, value in (part.model_extra or {}).items() if value]
        if unread := [name for name in extra if name != "cache_control"]:
            raise BadRequest(
                f"'{unread[0][:40]}' is no field of a text part that this guard reads; leave it out"
            )
    return "\n".join(part.text or "" for part in parts)


def texts_of(value: Any) -> list[str]:
    """What a JSON value says: each string of several words, and all of its strings together.

    Names of fields count as strings, since a request can be spelled out in them as well; ids and
    the words of JSON Schema do not.

    Raises:
        BadRequest: if it is nested too deeply.
    """
    words = [word for word in _strings(value, DEPTH) if word.strip() and word not in SCHEMA_WORDS]
    texts = [word for word in [*words, " ".join(words)] if PROSE.search(word)]
    return list(dict.fromkeys(texts))


def _strings(value: Any, depth: int) -> Iterator[str]:
    if depth == 0:
        raise BadRequest(f"A field is nested more than {DEPTH} levels deep.")
    if isinstance(value, str):
        yield value
        if value[:1] in ("{", "["):  # the arguments of a call are JSON in a string
            yield from _strings(_parsed(value), depth - 1)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name.replace("_", " ")
            if not (name in ID_FIELDS and isinstance(inner, str) and NAME.fullmatch(inner)):
                yield from _strings(inner, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, depth - 1)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
    except RecursionError:
        raise BadRequest(f"A field is nested more than {DEPTH} levels deep.") from None


def readable_text(messages: Sequence[ChatMessage]) -> Prompt:
    """What of a chat is text, for the log of one that cannot be judged."""
    parts = [[m.content] if isinstance(m.content, str) else m.content or [] for m in messages]
    texts = [one if isinstance(one, str) else one.text or "" for own in parts for one in own]
    return Prompt("\n".join(texts), id="chat")


def own_model_prompt(messages: Sequence[ChatMessage]) -> Prompt:
    """The one prompt of a chat that ends with a user's message; roles as they are.

    Raises:
        BadRequest: if it ends otherwise, or holds what only an upstream could answer.
    """
    *before, last = messages
    if last.role != "user" or any(m.role in ("tool", "function") for m in before):
        raise BadRequest("A chat has system, user and assistant messages; the last is the user's.")
    if not last.text.strip():
        raise BadRequest("The last message has no text.")
    history = tuple(Message(m.speaker, m.text) for m in before if m.text or m.role != "assistant")
    return Prompt(last.text, id="chat", history=history)
