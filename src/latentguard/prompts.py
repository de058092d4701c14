"""Prompts: what is asked of a model, with what is known of it; and what it replied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

from latentguard.errors import PromptError

Group = Literal["refused_harmful", "accepted_harmful", "refused_harmless", "accepted_harmless"]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One earlier turn of a chat.

    Examples:
        >>> lg.Message("user", "Hello.")
        Message(role='user', content='Hello.')
    """

    role: str
    """``system``, ``user`` or ``assistant``."""

    content: str
    """The text."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:  # a template writes roles as they are
            raise PromptError(f"A role is one of {', '.join(ROLES)}; found '{self.role}'.")
        if not isinstance(self.content, str):
            raise PromptError(
                f"The content of a message should be text; found a {type(self.content).__name__}."
            )


@dataclass(frozen=True)
class Prompt:
    """One instruction for a chat model, with what is known of it.

    Examples:
        >>> prompt = lg.Prompt("Go on.", history=(lg.Message("user", "Tell me a story."),))
        >>> prompt.text, len(prompt.history)
        ('Go on.', 1)
    """

    text: str
    """The user's last message: the instruction that ends in ``t_inst``."""

    id: str = ""
    """Unique in its file; ``FILE-ROW`` where the row has none."""

    harmful: bool | None = None
    """The label; None if unknown."""

    refused: bool | None = None
    """Whether the model refused it; None if not asked."""

    category: str | None = None
    """Risk category."""

    source: str | None = None
    """Where the text comes from."""

    pair: str | None = None
    """What its form-matched twin shares; pairs never straddle folds or splits."""

    history: tuple[Message, ...] = ()
    """Earlier turns, oldest first; a system message comes first."""

    question_at: int | None = None
    """Where in ``text`` the inversion question begins (section 3.5); None if there is none."""

    segment: str | None = None
    """Which part of the traffic it belongs to: a language, a product, a client."""

    decoded_from_length: int = 0
    """Characters of the obfuscated text that this is decoded from; 0 if it is as it was asked.
    What is decoded from a long text is read as long ones are."""

    @property
    def group(self) -> Group | None:
        """The paper's group (section 3.2); None unless both labels are known."""
        if self.harmful is None or self.refused is None:
            return None
        if self.harmful:
            return "refused_harmful" if self.refused else "accepted_harmful"
        return "refused_harmless" if self.refused else "accepted_harmless"

    @property
    def fold_group(self) -> str:
        """What it shares with prompts that must be in the same fold: its pair, or else its text."""
        return self.pair or self.text


@dataclass(frozen=True)
class Reply:
    """What a model said to a prompt, decoded greedily or given in a file.

    Examples:
        >>> reply = model.generate(["Hello."], max_new_tokens=2)[0]
        >>> reply.prompt.text, len(reply.ids)
        ('Hello.', 2)
    """

    prompt: Prompt
    """What was asked."""

    text: str
    """The text, without special tokens."""

    ids: tuple[int, ...] = ()
    """Its tokens; the end token included, if it came. None where only the text is given."""

    finished: bool = True
    """Whether the model ended it; False if it was cut at the most tokens allowed."""

    label: str = ""
    """The label of the intervention; empty if there was none."""

    watched: tuple[tuple[str, float], ...] = ()
    """Words, and the log-probability with which the reply begins with the first token of each."""

    harmful: bool | None = None
    """The label of the reply; None if unknown."""


Turn = Message | Mapping[str, Any]
"""One turn of a chat: a ``Message``, or an object with ``role`` and ``content``."""

PromptLike = Prompt | str | Sequence[Turn]
"""What stands for a prompt: itself, its text, or a chat whose last turn is the user's."""


def as_prompt(item: PromptLike, id: str = "") -> Prompt:
    """Make a prompt of a text or a chat; a prompt stays as it is.

    Args:
        item: A prompt, a text, or the turns of a chat.
        id: Of a prompt that is made here.

    Raises:
        PromptError: if it is something else, or a chat does not end with the user.
    """
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return Prompt(item, id=id)
    return replace(parse_chat(item, f"prompt {id}" if id else "the prompt"), id=id)


def is_one_prompt(items: object) -> TypeGuard[PromptLike]:
    """Whether this stands for one prompt, rather than for several: a text, a prompt or a chat."""
    if isinstance(items, str | Prompt):
        return True
    return isinstance(items, Sequence) and bool(items) and isinstance(items[0], Message | Mapping)


def as_prompts(items: Iterable[PromptLike]) -> Iterator[Prompt]:
    """Make prompts of texts and chats; the id of each is its number, from 1.

    Raises:
        PromptError: if ``items`` is one text or one chat, of which each part would be read as a
            prompt.
    """
    if isinstance(items, str):
        raise PromptError("Prompts are a list; found one text. Put it in a list: [text].")
    for number, item in enumerate(items, start=1):
        if isinstance(item, Message | Mapping):
            raise PromptError("Prompts are a list; found one chat. Put it in a list: [messages].")
        yield as_prompt(item, str(number))


def parse_chat(turns: Any, where: str) -> Prompt:
    """The last turn of a chat as a prompt, and those before it as its history.

    Args:
        turns: Messages, or objects with ``role`` and ``content``.
        where: Names the chat in errors.

    Raises:
        PromptError: if they are no such list, or the last turn is not the user's.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise PromptError(
            f"{where}: expected a text, a Prompt or a list of messages; found "
            f"{'an empty list' if turns == [] else f'a {type(turns).__name__}'}."
        )
    messages = parse_turns(turns, f"{where}: a message")
    if messages[-1].role != "user":
        raise PromptError(
            f"{where}: the last message of a chat is the user's; found one of "
            f"'{messages[-1].role}'."
        )
    return Prompt(messages[-1].content, history=messages[:-1])


def parse_reply(turns: Any, where: str) -> Reply:
    """The last turn of a chat as a reply to those before it.

    Args:
        turns: Messages, or objects with ``role`` and ``content``.
        where: Names the chat in errors.

    Raises:
        PromptError: if they are no such list, or do not end with a user and then the assistant.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) < 2:
        raise PromptError(f"{where}: expected messages that end with a user and the assistant.")
    *_, last = parse_turns(turns, f"{where}: a message")
    if last.role != "assistant":
        raise PromptError(
            f"{where}: the last message is the reply, the assistant's; found one of '{last.role}'."
        )
    return Reply(parse_chat(turns[:-1], where), last.content)


def parse_turns(turns: Any, what: str) -> tuple[Message, ...]:
    """The turns of a chat.

    Args:
        turns: Messages, or objects with ``role`` and ``content``; none if it is empty.
        what: Names a turn in errors.

    Raises:
        PromptError: if one is no turn.
    """
    try:
        return tuple(
            turn if isinstance(turn, Message) else Message(turn["role"], turn["content"])
            for turn in turns or ()
        )
    except (PromptError, TypeError, KeyError, IndexError) as error:
        raise PromptError(
            f"{what} should be an object with 'role' and 'content' ({error})"
        ) from None
