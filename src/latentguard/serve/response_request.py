"""A request to ``/v1/responses``: as an upstream is sent it, and what the guard reads of it.

Its items become messages of a chat, which are read as in ``/v1/chat/completions``. An item is sent
on rebuilt from what was read. Whatever names texts that are not in the request is refused: an
earlier response, a stored prompt or conversation, an item by its id, reasoning that is encrypted,
tools that fetch texts on the upstream's side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from latentguard.prompts import Prompt
from latentguard.serve.chat_readings import ChatReading, OtherText, chat_in_context, chat_readings
from latentguard.serve.chat_request import ForwardedChat, require_few, sanitized_message
from latentguard.serve.config import ServeConfig
from latentguard.serve.control_tokens import ControlTokens
from latentguard.serve.errors import BadRequest
from latentguard.serve.json_texts import require_name
from latentguard.serve.messages import ChatMessage, readable_text
from latentguard.serve.parameters import (
    RESPONSE_CHECKS,
    SETTING,
    require_known,
    strings_in,
    texts_in,
)
from latentguard.serve.request_errors import describe_errors

UNSEEN_HISTORY = ("previous_response_id", "conversation", "prompt")
"""Parameters that name texts which the service has not seen."""

OWN_TOOLS = ("function", "custom")
"""Types of tools that the client runs itself: what they return comes back in a request."""

TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")

UNREAD_IN_PARTS = ("annotations", "logprobs")
"""Fields of a text part that are not sent on."""


def _one_word(value: str) -> str:
    require_name("An id or name of an item", value)
    return value


Word = Annotated[str, AfterValidator(_one_word)]


class Item(BaseModel, ABC):
    """One item of the input; ids and states are not sent on."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    status: str | None = None

    @abstractmethod
    def message(self) -> dict[str, Any]:
        """The item as a message of a chat."""

    @abstractmethod
    def rebuilt(self, message: ChatMessage) -> dict[str, Any]:
        """The item as it is sent on, from the message that was read."""


class MessageItem(Item):
    """Something that was said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    phase: Annotated[str, Field(pattern=rf"^(?:{SETTING.pattern})$")] | None = None

    def message(self) -> dict[str, Any]:
        """The same."""
        return {"role": self.role, "content": _content(self.content)}

    def rebuilt(self, message: ChatMessage) -> dict[str, Any]:
        """With one text."""
        phase = {"phase": self.phase} if self.phase else {}
        return {"type": self.type, "role": self.role, "content": message.text, **phase}


class CallItem(Item):
    """A tool that was called; the texts are its name and arguments."""

    type: Literal["function_call", "custom_tool_call"]
    call_id: Word
    name: Word
    arguments: str | None = None
    input: str | None = None

    def message(self) -> dict[str, Any]:
        """An assistant's message with a call."""
        call = dict(id=self.call_id, name=self.name, arguments=self.arguments, input=self.input)
        return {"role": "assistant", "content": None, "tool_calls": [_without_none(call)]}

    def rebuilt(self, message: ChatMessage) -> dict[str, Any]:
        """The same, without its id."""
        return _without_none(self.model_dump(exclude={"id", "status"}))


class CallOutputItem(Item):
    """What a tool returned."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Word
    output: str | list[dict[str, Any]]

    def message(self) -> dict[str, Any]:
        """A tool's message."""
        return {"role": "tool", "content": _content(self.output), "tool_call_id": self.call_id}

    def rebuilt(self, message: ChatMessage) -> dict[str, Any]:
        """With one text."""
        return {"type": self.type, "call_id": self.call_id, "output": message.text}


class ReasoningItem(Item):
    """What a model thought."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] = []
    content: list[dict[str, Any]] | None = None

    def message(self) -> dict[str, Any]:
        """An assistant's message with nothing but reasoning."""
        parts = [part["text"] for part in _content([*self.summary, *(self.content or [])])]
        return {"role": "assistant", "content": None, "reasoning": "\n".join(parts)}

    def rebuilt(self, message: ChatMessage) -> dict[str, Any]:
        """With one summary."""
        texts = [{"type": "summary_text", "text": text} for text in message.reasoning_texts]
        return {"type": self.type, "summary": texts}


ITEMS: dict[str, type[Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "custom_tool_call": CallItem,
    "function_call_output": CallOutputItem,
    "custom_tool_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}
"""Types of items that are read."""


class ResponseRequest(BaseModel):
    """What the guard reads; everything else is checked against the list of known parameters."""

    model_config = ConfigDict(extra="allow")

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    model: str | None = None
    stream: bool | None = None


@dataclass(frozen=True)
class ReadRequest:
    """A request whose every text is known."""

    messages: list[ChatMessage]
    """Instructions and input, in the order in which a model is shown them."""

    items: list[dict[str, Any]]
    """The input as it is sent on."""

    instructions: str | None
    """As they are sent on."""

    parameters: dict[str, Any]
    """The other parameters."""

    other_texts: list[str]
    """What they say."""

    def readings(self, config: ServeConfig, *, context: Prompt | None = None) -> list[ChatReading]:
        """What the guard reads; instructions too, as no gateway is known to write them.

        Args:
            config: Which roles are trusted, and which sources are read.
            context: The chat as its model will be given it.

        Raises:
            BadRequest: if no user speaks.
        """
        others: list[OtherText] = [("schema", text) for text in self.other_texts]
        if self.instructions is not None:
            others.append(("system", self.instructions))
        return chat_readings(
            self.messages,
            context=context,
            trusted_roles=config.trusted_roles,
            sources=config.sources,
            other_texts=others,
        )


def read_request(
    request: ResponseRequest, config: ServeConfig, control_tokens: ControlTokens
) -> ReadRequest:
    """Check a request, and find its texts.

    Raises:
        BadRequest: if it holds or names something that the guard does not read.
    """
    parameters = _known_parameters(request.model_extra or {}, config)
    checked = {"model": request.model, "stream": request.stream}
    parameters |= _without_none(require_known(checked, RESPONSE_CHECKS))
    shown = _tools_and_schema(parameters)
    others = texts_in(shown, config.tools)
    first = [] if request.instructions is None else [_instructions(request.instructions)]
    items = [_item(one) for one in input_items(request.input)]
    messages = [
        sanitized_message(one, config, control_tokens)
        for one in (*first, *(_message(item) for item in items))
    ]
    spoken = messages[len(first) :]
    if config.control_tokens != "forward":
        inner = [text for message in messages for text in message.side_strings]
        control_tokens.require_none([*inner, *strings_in(shown, config.tools)])
    return ReadRequest(
        messages,
        [item.rebuilt(message) for item, message in zip(items, spoken, strict=True)],
        messages[0].text if first else None,
        parameters,
        others,
    )


def forwarded_response(
    request: ResponseRequest, config: ServeConfig, control_tokens: ControlTokens
) -> ForwardedChat:
    """Check a request and build what is sent on.

    Raises:
        BadRequest: if it holds or names something that the guard does not read.
    """
    read = read_request(request, config, control_tokens)
    readings = read.readings(config)
    require_few(readings, config)
    body = {"input": read.items, "instructions": read.instructions, **read.parameters}
    return ForwardedChat(_without_none(body), readings, chat_in_context(read.messages))


def readable_request(request: ResponseRequest) -> Prompt:
    """What of a request is text, for the log of one that cannot be judged."""
    items = input_items(request.input)
    texts = [item["content"] for item in items if isinstance(item.get("content"), str)]
    return readable_text([ChatMessage(role="user", content=text) for text in texts])


def _known_parameters(extra: Mapping[str, Any], config: ServeConfig) -> dict[str, Any]:
    unread = config.unread_parameters
    for name in UNSEEN_HISTORY:
        if extra.get(name) and name not in unread:
            raise BadRequest(
                f"'{name}' names texts that this guard has not seen; send all of them as 'input'."
            )
    allowed = require_known(extra, RESPONSE_CHECKS, unread=unread)
    if "tools" not in unread:
        _require_own_tools(allowed.get("tools") or [])
    return allowed


def _require_own_tools(tools: Any) -> None:
    """Check that what each tool returns comes back in a request.

    Raises:
        BadRequest: if one is run by the upstream, or is no object.
    """
    for tool in tools if isinstance(tools, list) else [tools]:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind not in OWN_TOOLS:
            raise BadRequest(
                "Tools should be of type 'function' or 'custom': what the upstream's own tools "
                "return is not read."
            )


def _tools_and_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that models are shown, by the names of a chat."""
    texts = {name: parameters[name] for name in ("tools", "tool_choice") if name in parameters}
    schema = (parameters.get("text") or {}).get("format")
    return texts if schema is None else texts | {"response_format": schema}


def input_items(content: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input as items; a text alone is what a user says."""
    return [{"role": "user", "content": content}] if isinstance(content, str) else list(content)


def _instructions(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _item(row: Mapping[str, Any]) -> Item:
    kind = row.get("type", "message")
    item_class = ITEMS.get(kind) if isinstance(kind, str) else None
    if item_class is None:
        raise BadRequest(
            f"'{str(kind)[:40]}' is no type of item that this guard reads: {', '.join(ITEMS)}."
        )
    fields = {
        name: value for name, value in row.items() if value or name in item_class.model_fields
    }
    try:
        return item_class.model_validate(fields)
    except ValidationError as error:
        raise BadRequest(f"An item of type '{kind}': {describe_errors(error.errors())}") from None


def _message(item: Item) -> dict[str, Any]:
    return item.message()


def _content(content: str | list[dict[str, Any]]) -> Any:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part as a chat has it: text, or an error."""
    kind = part.get("type")
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind not in (*TEXT_PARTS, "refusal") or not isinstance(text, str):
        raise BadRequest(f"This guard reads text only; a part of type '{str(kind)[:40]}' came.")
    names = ("type", "text", "refusal", *UNREAD_IN_PARTS)
    extra = {name: value for name, value in part.items() if name not in names}
    return {"type": "text", "text": text, **extra}


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
