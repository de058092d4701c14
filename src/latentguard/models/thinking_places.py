"""Where the thinking of a reply ends: the last token inside it, and the first token behind it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

OPEN = "<think>"
"""How thinking begins; some chat templates open it before the reply."""

CLOSE = "</think>"
"""How it ends; what follows the last one is the answer."""

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, the names of special tokens included."""


@dataclass(frozen=True)
class ThinkingPlaces:
    """Two tokens of a reply, counted from its first token."""

    last_thought: int
    """The last token before the end of the thinking is written."""

    after: int
    """The first token behind the whole of that end."""


def find_thinking(decode: Decode, ids: Sequence[int]) -> ThinkingPlaces | None:
    """Find both tokens; None if the reply has no thought, no end of it, or nothing behind it.

    The end may be one token or several; the last end counts, as for the final answer.
    """
    ends = decode(ids).count(CLOSE)
    if not ends:
        return None
    after = bisect_left(range(len(ids) + 1), ends, key=lambda n: decode(ids[:n]).count(CLOSE))
    begin = max(n for n in range(after) if CLOSE in decode(ids[n:after]))
    thoughts = decode(ids[:begin]).replace(OPEN, "").replace(CLOSE, "")
    if after == len(ids) or not thoughts.strip():
        return None
    return ThinkingPlaces(begin - 1, after)
