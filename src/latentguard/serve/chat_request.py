"""A chat request as an upstream is sent it, and what of it the guard reads: the same texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentguard.prompts import Prompt
from latentguard.serve.chat_readings import ChatReading, chat_in_context, chat_readings
from latentguard.serve.config import ServeConfig
from latentguard.serve.control_tokens import ControlTokens
from latentguard.serve.errors import BadRequest
from latentguard.serve.messages import ChatMessage
from latentguard.serve.parameters import CHAT_CHECKS, require_known, strings_in, texts_in


@dataclass(frozen=True)
class ForwardedChat:
    """What an upstream is sent, and what the guard reads of it."""

    body: dict[str, Any]
    """The request."""

    readings: list[ChatReading]
    """Every text in it of the sources that are read."""

    context: Prompt
    """The chat up to its last user or tool message."""


def forwarded_chat(
    body: Mapping[str, Any], config: ServeConfig, control_tokens: ControlTokens
) -> ForwardedChat:
    """Check a request and build what is sent on.

    Args:
        body: As it was parsed.
        config: What is let through.
        control_tokens: Of the guard's tokenizer and common families.

    Raises:
        BadRequest: if it holds something that the guard does not read.
    """
    messages = [sanitized_message(one, config, control_tokens) for one in body["messages"]]
    parameters = {name: value for name, value in body.items() if name != "messages"}
    allowed = require_known(parameters, CHAT_CHECKS, unread=config.unread_parameters)
    others = texts_in(allowed, config.tools)
    if config.control_tokens != "forward":
        inner = [text for message in messages for text in message.side_strings]
        control_tokens.require_none([*inner, *strings_in(allowed, config.tools)])
    readings = chat_readings(
        messages,
        trusted_roles=config.trusted_roles,
        sources=config.sources,
        other_texts=[("schema", text) for text in others],
    )
    require_few(readings, config)
    sent = {"messages": [message.sanitized() for message in messages], **allowed}
    return ForwardedChat(sent, readings, chat_in_context(messages))


def require_few(readings: list[ChatReading], config: ServeConfig) -> None:
    """Check that a chat has no more texts than are read.

    Raises:
        BadRequest: if it has.
    """
    if len(readings) > config.max_readings:
        raise BadRequest(
            f"The chat has {len(readings)} texts that would be read each by itself; at most "
            f"{config.max_readings} are. Send fewer messages or tools."
        )


def sanitized_message(
    message: Mapping[str, Any], config: ServeConfig, control_tokens: ControlTokens
) -> ChatMessage:
    """A message with nothing in it but what is read, its control tokens broken up if so wanted.

    Raises:
        BadRequest: if it holds something else, or a control token.
    """
    plain = ChatMessage.model_validate(ChatMessage.model_validate(message).sanitized())
    if config.control_tokens == "forward":
        return plain
    if config.control_tokens == "escape" and plain.content is not None:
        plain = plain.model_copy(update={"content": control_tokens.escape(plain.text)})
    control_tokens.require_none([plain.text])
    return plain
