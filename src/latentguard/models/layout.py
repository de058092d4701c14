"""Layout: one prompt as token ids, and which of them are what (paper, section 2); its frame."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from latentguard.errors import PromptError, TemplateError
from latentguard.prompts import Message, Prompt
from latentguard.states import MEAN_POSITIONS


@dataclass(frozen=True)
class Layout:
    """One prompt as the model sees it."""

    ids: tuple[int, ...]
    """Token ids, template included, ready for the reply."""

    t_inst: int
    """Index of the last token of the user's last message."""

    spans: tuple[tuple[int, int], ...] = ()
    """Which characters of that message each of its tokens stands for; the last is t_inst."""

    @property
    def t_post(self) -> int:
        """Index of the last token of the whole prompt."""
        return len(self.ids) - 1

    @property
    def instruction(self) -> range:
        """Indices of the tokens of the user's last message."""
        return range(self.t_inst + 1 - len(self.spans), self.t_inst + 1)

    def before(self, offset: int) -> list[int]:
        """Indices of the tokens of the last message that end at or before a character of it."""
        spans = zip(self.instruction, self.spans, strict=True)
        return [index for index, (_, end) in spans if end <= offset]

    def index(self, position: str) -> int:
        """Absolute index of ``t_inst``, ``t_post``, ``post+k`` or ``inst-k`` (k after, k before).

        Two positions are means over tokens, of which this is the last: ``mean`` over those of the
        instruction up to t_inst, ``post`` over those after it.

        Raises:
            PromptError: if there is no such position.
        """
        if position in MEAN_POSITIONS:
            return self.t_inst if position == "mean" else self.t_post
        if position in ("t_inst", "t_post"):
            return int(getattr(self, position))
        if (back := re.fullmatch(r"inst-(\d+)", position)) and int(back[1]) <= self.t_inst:
            return self.t_inst - int(back[1])
        found = re.fullmatch(r"post\+(\d+)", position)
        if found is None or not 1 <= int(found[1]) <= self.t_post - self.t_inst:
            most = self.t_post - self.t_inst
            raise PromptError(
                f"There is no position '{position}': this prompt has t_inst, t_post, post+1 to "
                f"post+{most} and inst-1 to inst-{self.t_inst}."
            )
        return self.t_inst + int(found[1])

    def start(self, position: str) -> int:
        """Absolute index of the first token that a position averages; ``index`` is the last."""
        if position == "post":
            return min(self.t_inst + 1, self.t_post)
        return self.instruction.start if position == "mean" else self.index(position)


Turn = tuple[str, str, bool]
"""A role, the text that its content begins with, and whether a slot follows."""


def turns_of(
    history: Sequence[Message], contents: Sequence[str], fronts: Sequence[str] = ()
) -> tuple[Turn, ...]:
    """The turns of a chat that a user's message ends.

    Blank contents stand as they are, without a slot: a template may ask whether there is any.

    Args:
        history: The earlier messages.
        contents: What of each is put into a slot.
        fronts: What of each stands before the slot, in the turn itself.
    """
    turns = [
        (message.role, front, True) if text.strip() else (message.role, front + text, False)
        for message, text, front in zip(
            history, contents, fronts or [""] * len(history), strict=True
        )
    ]
    return (*turns, ("user", "", True))


@dataclass(frozen=True)
class Frame:
    """A template around the messages of a chat: text, slot, text, slot, ..., text."""

    texts: tuple[str, ...]
    order: tuple[int, ...]
    """Which message each slot takes; templates may move the system message."""

    strips: tuple[tuple[str | None, str | None], ...]
    """What each slot strips on the left and on the right: an argument of ``str.strip``."""

    def same_text(self, other: Frame) -> bool:
        """Whether it says the same around the same messages."""
        return (self.texts, self.order) == (other.texts, other.order)


def strips_of(
    tight: list[str], spaced: list[str], lined: list[str]
) -> tuple[tuple[str | None, str | None], ...]:
    """What each slot strips, from the texts around slots without and with blanks at their edges.

    Raises:
        TemplateError: if the template writes more or less because of the blanks.
    """
    spaces, lines = (_kept(tight, wide) for wide in (spaced, lined))
    return tuple(
        (_stripped(left, line_left), _stripped(right, line_right))
        for (left, right), (line_left, line_right) in zip(spaces, lines, strict=True)
    )


def _kept(tight: list[str], wide: list[str]) -> list[tuple[bool, bool]]:
    """Whether each slot keeps the one blank that is put before it and the two after it."""
    extra = [len(b) - len(a) for a, b in zip(tight, wide, strict=True)]
    if not all(0 <= n <= 3 for n in extra):
        raise TemplateError("The chat template writes more or less depending on white space.")
    return [(n & 1 == 1, after & 2 == 2) for n, after in pairwise(extra)]


def _stripped(space_kept: bool, line_kept: bool) -> str | None:
    """What to give to ``str.strip``: None strips all white space, as templates mostly do."""
    dropped = " " * (not space_kept) + "\n" * (not line_kept)
    return None if dropped == " \n" else dropped


class Row:
    """One prompt of a batch: the tokens up to the last wanted position, and the positions."""

    def __init__(self, layout: Layout, positions: Sequence[str]) -> None:
        """Cut a layout behind the last of some positions."""
        self.spans = spans_of(layout, positions)
        self.length = max(last for _, last in self.spans) + 1
        self.first = min(first for first, _ in self.spans)
        self.ids = layout.ids[: self.length]

    def fits(self, prefix: tuple[int, ...]) -> bool:
        """Whether it begins so, and is read only after that."""
        return self.first >= len(prefix) and self.ids[: len(prefix)] == prefix


def spans_of(layout: Layout, positions: Sequence[str]) -> list[tuple[int, int]]:
    """The first and the last token of what each position averages; mostly the same token."""
    return [(layout.start(position), layout.index(position)) for position in positions]


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """With how many equal tokens two rows begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def least_tokens(prompt: Prompt) -> int:
    """How many tokens a prompt has at the least: each message that says something has one."""
    return 1 + sum(1 for message in prompt.history if message.content.strip())


def too_long(prompt: Prompt, size: str, most: int) -> PromptError:
    """What a model says that reads fewer tokens."""
    return PromptError(
        f"Prompt '{prompt.id}' is {size} tokens long with its template; this model reads at most "
        f"{most:,}. Shorten it or split it."
    )
