"""Which texts of a chat the guard reads: whatever a client supplied, wherever it stands.

History is the client's to write, so no turn counts as read before. Of a chat are read

- the chat up to its last user or tool message, the last turn in its context;
- each message by itself, those of trusted roles left out;
- messages that one speaker sends in a row, joined, as a template may join them;
- calls of tools, reasoning and refusals in messages, descriptions of tools, schemas of replies.

Equal texts are read once. The chat is flagged if one of its readings is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from latentguard.prompts import Message, Prompt
from latentguard.serve.errors import BadRequest
from latentguard.serve.messages import ChatMessage


@dataclass(frozen=True)
class ChatReading:
    """One text of a chat that is read."""

    prompt: Prompt
    """What the guard is given."""

    is_newest: bool
    """Whether it is of the newest turn: the messages after the assistant's last."""


def chat_readings(
    messages: Sequence[ChatMessage],
    *,
    context: Prompt | None = None,
    trusted_roles: Iterable[str] = (),
    other_texts: Iterable[str] = (),
) -> list[ChatReading]:
    """What is read of a chat; the first is the chat in context.

    Args:
        messages: The chat.
        context: The chat as its model will be given it; None joins what one speaker sends in a row.
        trusted_roles: Roles whose messages the client does not write; read in context only.
        other_texts: What the request says beside its messages.

    Raises:
        BadRequest: if no user speaks, or a part of a message is no text.
    """
    turns = _turns(messages)
    ends = [n for n, turn in enumerate(turns, start=1) if turn[0].speaker == "user"]
    if not ends:
        raise BadRequest("No message of a user has any text.")
    readings = [ChatReading(context or _in_context(turns[: ends[-1]]), is_newest=True)]
    trusted = frozenset(trusted_roles)
    for number, turn in enumerate(turns, start=1):
        texts = _texts_of_turn([m for m in turn if m.role not in trusted])
        newest = number >= ends[-1]
        readings += [ChatReading(Prompt(text, id="part"), newest) for text in texts]
    calls = [text for m in messages if m.role not in trusted for text in m.other_texts]
    for text in (*calls, *other_texts):
        readings.append(ChatReading(Prompt(text, id="part"), is_newest=False))
    return _distinct(readings)


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


def _texts_of_turn(turn: Sequence[ChatMessage]) -> list[str]:
    texts = [message.text for message in turn]
    return [*texts, _joined(turn)] if len(texts) > 1 else texts


def _distinct(readings: Iterable[ChatReading]) -> list[ChatReading]:
    """Each text once; it counts as newest if it is of the newest turn anywhere."""
    readings_by_text = dict[tuple[str, tuple[Message, ...]], ChatReading]()
    for reading in readings:
        if not reading.prompt.text.strip():
            continue
        key = reading.prompt.text, reading.prompt.history
        if key not in readings_by_text or (
            reading.is_newest and not readings_by_text[key].is_newest
        ):
            readings_by_text[key] = reading
    return list(readings_by_text.values())
