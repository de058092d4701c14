"""Messages of a chat in OpenAI's schema: the fields that are accepted, and the texts in them.

A message holds nothing that the guard does not read: a field that is not listed here ends the
request with an error, unless it is empty. Parts of a message become one text, which is both what
the guard reads and what an upstream is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from latentguard.prompts import Message, Prompt
from latentguard.serve.errors import BadRequest
from latentguard.serve.json_texts import (
    require_name,
    single_words,
    strings_of,
    text_of_name,
    texts_of,
)

READ_FIELDS = ("reasoning_content", "reasoning", "refusal")
"""Further texts of a message."""

NAME_FIELDS = ("name", "tool_call_id")

CALL_FIELDS = ("tool_calls", "function_call")


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
    def other_joinings(self) -> list[str]:
        """Its parts as other templates join them; none of a single text."""
        if isinstance(self.content, str) or len(self.content or []) < 2:
            return []
        texts = [part.text or "" for part in self.content or []]
        return ["".join(texts), " ".join(texts)]

    @property
    def side_texts(self) -> list[str]:
        """Reasoning and a refusal, and what a name or an id says."""
        return [*self._read_fields, *self._name_texts]

    @property
    def call_texts(self) -> list[str]:
        """Names and arguments of tools that are called."""
        return [text for call in self._calls for text in texts_of(call)]

    @property
    def reasoning_texts(self) -> list[str]:
        """Reasoning and a refusal."""
        return self._read_fields

    @property
    def single_words(self) -> list[str]:
        """Words of calls that say something beside others only."""
        return [word for call in self._calls for word in single_words(call)]

    @property
    def side_strings(self) -> list[str]:
        """All strings beside the content: what control tokens are looked for in."""
        return [*self._read_fields, *(text for call in self._calls for text in strings_of(call))]

    @property
    def _read_fields(self) -> list[str]:
        fields = self.model_extra or {}
        return [text for name in READ_FIELDS if isinstance(text := fields.get(name), str) and text]

    @property
    def _calls(self) -> list[Any]:
        fields = self.model_extra or {}
        return [fields[name] for name in CALL_FIELDS if fields.get(name)]

    @property
    def _name_texts(self) -> list[str]:
        fields = self.model_extra or {}
        names = [(fields[name], name != "name") for name in NAME_FIELDS if fields.get(name)]
        texts = [text_of_name(n, is_id=is_id) for n, is_id in names if isinstance(n, str)]
        return [text for text in texts if text is not None]

    def with_one_text(self) -> ChatMessage:
        """The message with its parts joined, as it is read.

        Raises:
            BadRequest: if a part of it is no text.
        """
        content = None if self.content is None else self.text
        return self.model_copy(update={"content": content})

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
