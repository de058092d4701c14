"""Which texts of a chat the guard reads: whatever a client supplied, wherever it stands.

History is the client's to write, so no turn counts as read before. Of a chat are read

- the chat up to its last user or tool message, the last turn in its context;
- each message by itself, those of trusted roles left out; its parts however a template joins them;
- messages that one speaker sends in a row, joined, as a template may join them;
- calls of tools, reasoning and refusals in messages, descriptions of tools, schemas of replies,
  and names that hold several words.

Equal texts of one source are read once. The chat is flagged if one of its readings is. An operator
may choose the sources that are read; a guard calibrated by source has a threshold for each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from latentguard.prompts import Message, Prompt
from latentguard.serve.config import SOURCES, Source
from latentguard.serve.errors import BadRequest
from latentguard.serve.json_texts import joined_words
from latentguard.serve.messages import ChatMessage


@dataclass(frozen=True)
class ChatReading:
    """One text of a chat that is read."""

    prompt: Prompt
    """What the guard is given."""

    is_newest: bool
    """Whether it is of the newest turn: the messages after the assistant's last."""

    source: Source = "user"
    """Who says it."""


OtherText = tuple[Source, str]
"""A text beside the messages, and its source."""


def chat_readings(
    messages: Sequence[ChatMessage],
    *,
    context: Prompt | None = None,
    trusted_roles: Iterable[str] = (),
    sources: Collection[Source] = SOURCES,
    other_texts: Iterable[OtherText] = (),
) -> list[ChatReading]:
    """What is read of a chat; the first is the chat in context, unless its source is not read.

    Args:
        messages: The chat.
        context: The chat as its model will be given it; None joins what one speaker sends in a row.
        trusted_roles: Roles whose messages the client does not write; read in context only.
        sources: Whose texts are read.
        other_texts: What the request says beside its messages.

    Raises:
        BadRequest: if no user speaks, or a part of a message is no text.
    """
    turns = _turns(messages)
    newest = _last_user_turn(turns)
    readings = _in_chosen_context(turns[:newest], context, sources)
    readings += separate_readings(
        messages, trusted_roles=trusted_roles, sources=sources, other_texts=other_texts
    )
    return _distinct(readings)


def separate_readings(
    messages: Sequence[ChatMessage],
    *,
    trusted_roles: Iterable[str] = (),
    sources: Collection[Source] = SOURCES,
    other_texts: Iterable[OtherText] = (),
) -> list[ChatReading]:
    """What is read of a chat without its context, as in ``chat_readings``.

    Raises:
        BadRequest: if a part of a message is no text.
    """
    turns = _turns(messages)
    newest = _newest_turn(turns)
    readings = list[ChatReading]()
    trusted = frozenset(trusted_roles)
    for number, turn in enumerate(turns, start=1):
        own = [m for m in turn if m.role not in trusted and source_of(m) in sources]
        for source, text in _texts_of_turn(own):
            readings.append(ChatReading(Prompt(text, id="part"), number >= newest, source))
    untrusted = [message for message in messages if message.role not in trusted]
    inner = [text for message in untrusted for text in _inner_texts(message)]
    words = joined_words(word for message in untrusted for word in message.single_words)
    inner += [("call", text) for text in words]
    for source, text in (*inner, *other_texts):
        if source in sources:
            readings.append(ChatReading(Prompt(text, id="part"), is_newest=False, source=source))
    return _distinct(readings)


def chat_in_context(messages: Sequence[ChatMessage]) -> Prompt:
    """A chat up to its last user or tool message.

    Raises:
        BadRequest: if no user speaks, or a part of a message is no text.
    """
    turns = _turns(messages)
    return _in_context(turns[: _last_user_turn(turns)])


def source_of(message: ChatMessage) -> Source:
    """Whose text a message is."""
    if message.role in ("tool", "function"):
        return "tool"
    return message.speaker


def _last_user_turn(turns: Sequence[Sequence[ChatMessage]]) -> int:
    """The number of the last turn of a user or a tool, from 1."""
    end = _newest_turn(turns)
    if not end:
        raise BadRequest("No message of a user has any text.")
    return end


def _newest_turn(turns: Sequence[Sequence[ChatMessage]]) -> int:
    """The number of the last turn of a user or a tool; 0 if there is none."""
    ends = [n for n, turn in enumerate(turns, start=1) if turn[0].speaker == "user"]
    return max(ends, default=0)


def _in_chosen_context(
    turns: Sequence[Sequence[ChatMessage]], context: Prompt | None, sources: Collection[Source]
) -> list[ChatReading]:
    """The chat up to the last message of a user or a tool that is read, if there is one."""
    if context is not None:
        return [ChatReading(context, is_newest=True)]
    for end in range(len(turns), 0, -1):
        chosen = [m for m in turns[end - 1] if source_of(m) in sources]
        if chosen and chosen[0].speaker == "user":
            prompt = _in_context([*turns[: end - 1], chosen])
            return [ChatReading(prompt, end == len(turns), _joint_source(chosen))]
    return []


def _joint_source(turn: Sequence[ChatMessage]) -> Source:
    """The source of messages that are read as one; a user's is that of all."""
    sources = [source_of(message) for message in turn]
    return "user" if "user" in sources else sources[0]


def _inner_texts(message: ChatMessage) -> list[OtherText]:
    """Calls in a message, and its reasoning and refusal."""
    calls: list[OtherText] = [("call", text) for text in message.call_texts]
    return [*[(source_of(message), text) for text in message.side_texts], *calls]


def _turns(messages: Sequence[ChatMessage]) -> list[list[ChatMessage]]:
    """Messages with a text, those of one speaker in a row together."""
    spoken = [message for message in messages if message.text.strip()]
    return [list(group) for _, group in groupby(spoken, key=lambda m: m.speaker)]


def _joined(turn: Sequence[ChatMessage]) -> str:
    return "\n\n".join(message.text for message in turn)


def _in_context(turns: Sequence[Sequence[ChatMessage]]) -> Prompt:
    *before, last = turns
    history = tuple(Message(turn[0].speaker, _joined(turn)) for turn in before)
    return Prompt(_joined(last), id="chat", history=history)


def _texts_of_turn(turn: Sequence[ChatMessage]) -> list[OtherText]:
    texts = [
        (source_of(message), text)
        for message in turn
        for text in (message.text, *message.other_joinings)
    ]
    return [*texts, (_joint_source(turn), _joined(turn))] if len(turn) > 1 else texts


def _distinct(readings: Iterable[ChatReading]) -> list[ChatReading]:
    """Each text of a source once; it is newest if it is of the newest turn anywhere."""
    readings_by_key = dict[tuple[str, str, tuple[Message, ...]], ChatReading]()
    for reading in readings:
        if not reading.prompt.text.strip():
            continue
        key = reading.source, reading.prompt.text, reading.prompt.history
        if key not in readings_by_key or (reading.is_newest and not readings_by_key[key].is_newest):
            readings_by_key[key] = reading
    return list(readings_by_key.values())
