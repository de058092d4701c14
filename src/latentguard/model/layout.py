"""Layout: one prompt as token ids, and which of them are what (paper, section 2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from latentguard.errors import PromptError
from latentguard.readings import MEANS


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
        if position in MEANS:
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
