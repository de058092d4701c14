"""Layout: one prompt as token ids with t_inst and t_post (paper, section 2); template frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from latentguard.errors import PromptError, TemplateError
from latentguard.prompts import Message, Prompt
from latentguard.states import ATTENDED


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

        Some positions are means over tokens, of which this is the last: ``mean`` and ``attended+k``
        over those of the instruction up to t_inst, ``post`` over those after it.

        Raises:
            PromptError: if there is no such position.
        """
        if is_instruction_mean(position):
            return self.t_inst
        if position == "post":
            return self.t_post
        if position in ("t_inst", "t_post"):
            return int(getattr(self, position))
        before = re.fullmatch(r"inst-(\d+)", position)
        if before is not None and int(before[1]) <= self.t_inst:
            return self.t_inst - int(before[1])
        count = self.t_post - self.t_inst
        after = re.fullmatch(r"post\+(\d+)", position)
        if after is None or not 1 <= int(after[1]) <= count:
            raise PromptError(
                f"There is no position '{position}': this prompt has t_inst, t_post, post+1 to "
                f"post+{count} and inst-1 to inst-{self.t_inst}."
            )
        return self.t_inst + int(after[1])

    def start(self, position: str) -> int:
        """Absolute index of the first token that a position averages; ``index`` is the last."""
        if position == "post":
            return min(self.t_inst + 1, self.t_post)
        return self.instruction.start if is_instruction_mean(position) else self.index(position)


def is_instruction_mean(position: str) -> bool:
    """Whether a position is a mean, weighted or not, over the instruction's tokens."""
    return position == "mean" or position.startswith(ATTENDED)


@dataclass(frozen=True)
class Turn:
    """One message of a chat, as a template is tried with it."""

    role: str
    """``system``, ``user`` or ``assistant``."""

    front: str
    """The text that its content begins with."""

    has_slot: bool
    """Whether a slot for the message follows that text."""


def chat_turns(
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
        Turn(message.role, front, True) if text.strip() else Turn(message.role, front + text, False)
        for message, text, front in zip(
            history, contents, fronts or [""] * len(history), strict=True
        )
    ]
    return (*turns, Turn("user", "", True))


@dataclass(frozen=True)
class TemplateFrame:
    """A template around the messages of a chat: text, slot, text, slot, ..., text."""

    texts: tuple[str, ...]
    """The template's own text before, between and after the slots."""

    order: tuple[int, ...]
    """Which message each slot takes; templates may move the system message."""

    strips: tuple[tuple[str | None, str | None], ...]
    """What each slot strips on the left and on the right: an argument of ``str.strip``."""

    def has_same_text(self, other: TemplateFrame) -> bool:
        """Whether it says the same around the same messages."""
        return (self.texts, self.order) == (other.texts, other.order)


def infer_strips(
    plain: list[str], spaced: list[str], lined: list[str]
) -> tuple[tuple[str | None, str | None], ...]:
    """What each slot strips, from the template's text around slots of different edges.

    Args:
        plain: The text around slots whose messages have no blank at their edges.
        spaced: The same with one blank before and two after each message.
        lined: The same with line ends in place of the blanks.

    Raises:
        TemplateError: if the template writes more or less because of the blanks.
    """
    spaces = _kept_edges(plain, spaced)
    lines = _kept_edges(plain, lined)
    return tuple(
        (_strip_argument(left, line_left), _strip_argument(right, line_right))
        for (left, right), (line_left, line_right) in zip(spaces, lines, strict=True)
    )


def _kept_edges(plain: list[str], padded: list[str]) -> list[tuple[bool, bool]]:
    """Whether each slot keeps the one blank that is put before it and the two after it."""
    extra = [len(b) - len(a) for a, b in zip(plain, padded, strict=True)]
    if not all(0 <= n <= 3 for n in extra):
        raise TemplateError("The chat template writes more or less depending on white space.")
    return [(n & 1 == 1, after & 2 == 2) for n, after in pairwise(extra)]


def _strip_argument(space_kept: bool, line_kept: bool) -> str | None:
    """What to give to ``str.strip``: None strips all white space, as templates mostly do."""
    dropped = " " * (not space_kept) + "\n" * (not line_kept)
    return None if dropped == " \n" else dropped


@dataclass(frozen=True)
class CaptureRow:
    """One row of a batch: the tokens up to the last wanted one, and what is wanted."""

    ids: tuple[int, ...]
    """Token ids, none behind the last wanted one."""

    spans: tuple[tuple[int, int], ...]
    """The first and the last token of what each position averages; mostly the same token."""

    @staticmethod
    def of(layout: Layout, positions: Sequence[str]) -> CaptureRow:
        """A prompt, cut behind the last of some positions."""
        return CaptureRow.of_spans(layout.ids, position_spans(layout, positions))

    @staticmethod
    def of_spans(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> CaptureRow:
        """Tokens, cut behind the last of some spans."""
        length = max(last for _, last in spans) + 1
        return CaptureRow(tuple(ids[:length]), tuple(spans))

    @property
    def length(self) -> int:
        """How many tokens are read."""
        return len(self.ids)

    def continues(self, prefix: tuple[int, ...]) -> bool:
        """Whether it begins with these tokens, and is read only after them."""
        first = min(begin for begin, _ in self.spans)
        return first >= len(prefix) and self.ids[: len(prefix)] == prefix


@dataclass(frozen=True)
class ReplyLayout:
    """A prompt and a reply to it as the model sees them."""

    ids: tuple[int, ...]
    """Token ids of both, template included."""

    start: int
    """Index of the first token of the reply."""

    @property
    def reply(self) -> range:
        """Indices of the reply's tokens."""
        return range(self.start, len(self.ids))

    def cut(self, tokens: int) -> ReplyLayout:
        """The same with so many tokens of the reply at most."""
        return ReplyLayout(self.ids[: self.start + tokens], self.start)


def position_spans(layout: Layout, positions: Sequence[str]) -> list[tuple[int, int]]:
    """The first and the last token of what each position averages; mostly the same token."""
    return [(layout.start(position), layout.index(position)) for position in positions]


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """With how many equal tokens two rows begin."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def min_token_count(prompt: Prompt) -> int:
    """How many tokens a prompt has at the least: each message that is not blank has one."""
    return 1 + sum(1 for message in prompt.history if message.content.strip())


def too_long_error(prompt: Prompt, size: str, limit: int) -> PromptError:
    """The error for a prompt of more tokens than the model reads."""
    return PromptError(
        f"Prompt '{prompt.id}' is {size} tokens long with its template; this model reads at most "
        f"{limit:,}. Shorten it or split it."
    )
