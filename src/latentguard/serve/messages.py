"""Messages of a chat in OpenAI's schema -> prompts that the guard reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from pydantic import BaseModel, ConfigDict

from latentguard.prompts import Message, Prompt
from latentguard.serve.errors import BadRequest


class ContentPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: str
    """Only ``text`` (also ``input_text``) can be read."""

    text: str | None = None
    """What is said."""


class ChatMessage(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    """Who speaks."""

    content: str | list[ContentPart] | None = None
    """What is said; None where an assistant only calls tools."""

    @property
    def text(self) -> str:
        """What is said, as one text."""
        return self.content if isinstance(self.content, str) else text_of_parts(self.content or [])

    @property
    def speaker(self) -> str:
        """The role that the guard's chat template knows."""
        known = {"developer": "system", "tool": "user", "function": "user"}
        return known.get(self.role, self.role)


def text_of_parts(parts: Sequence[ContentPart]) -> str:
    """The text of parts.

    Raises:
        BadRequest: if one is no text: the guard cannot see images, and will not pretend to.
    """
    for part in parts:
        if part.type not in ("text", "input_text") or part.text is None:
            raise BadRequest(f"This guard reads text only; a part of type '{part.type[:40]}' came.")
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


def chat_prompts(messages: Sequence[ChatMessage]) -> list[Prompt]:
    """What the guard reads of any chat; it is flagged if one of these is.

    The first is the chat up to its last user or tool message; tools speak as users, and messages
    that one role sends in a row are joined, since templates want roles to take turns. Of the last
    turn, each message is also read by itself, and so are the user's last own words, and what the
    assistant says after them.

    Raises:
        BadRequest: if no user speaks.
    """
    said = [m for m in messages if m.text.strip()]
    ends = [n for n, m in enumerate(said, start=1) if m.speaker == "user"]
    if not ends:
        raise BadRequest("No message of a user has any text.")
    heard, tail = said[: ends[-1]], said[ends[-1] :]
    groups = [list(group) for _, group in groupby(heard, key=lambda m: m.speaker)]
    turns = [Message(g[0].speaker, "\n\n".join(m.text for m in g)) for g in groups]
    own = [m for m in heard if m.role == "user"][-1:]
    texts = dict.fromkeys(m.text for m in (*groups[-1], *own, *tail))
    alone = [Prompt(text, id="part") for text in texts if text != turns[-1].content]
    return [Prompt(turns[-1].content, id="chat", history=tuple(turns[:-1])), *alone]
