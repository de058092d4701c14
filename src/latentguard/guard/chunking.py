"""Windows: how a guard reads long prompts and chats, where evidence may lie anywhere.

What the user says is cut into pieces, sentences and lines of up to ``size`` characters of one
paragraph, and each is scored as a prompt of its own, as the guard scores any; so is the whole.
Both are put on one scale, on which harmless material has mean 0 and standard deviation 1 whatever
its size: a longer text has more pieces, and so a higher maximum. The greatest of all is held
against one threshold, so that the stated rate is that of both readings together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from torch import Tensor

from latentguard.errors import GuardError, PromptError
from latentguard.guard.verdict import Evidence, Part
from latentguard.prompts import Prompt
from latentguard.stats.bounds import Bound

SIZE, FLOOR, OVER = 120, 20, 500
"""Defaults of ``Windows.size``, ``Windows.floor`` and ``Windows.over``."""

R = TypeVar("R")

BATCH = 256
"""Prompts among which long ones are looked for at a time."""

BREAK = re.compile(r"(?<=[.!?;:])[^\S\n]+|(?<=[\u3002\uff01\uff1f])|\n+")
"""Where sentences and lines end."""


@dataclass(frozen=True)
class Piece:
    """Some characters of what the user says."""

    message: int
    """Which message of the chat, counted from 0; the prompt's own text comes after its history."""

    start: int
    """The first character."""

    end: int
    """The first character after it."""

    text: str
    """The characters themselves."""


@dataclass(frozen=True)
class Norm:
    """How a score is distributed on harmless material, by the number of pieces."""

    mean: float = 0.0
    """Where there is one piece."""

    slope: float = 0.0
    """By how much it grows when their number is multiplied by e."""

    spread: float = 1.0
    """Standard deviation around that line."""

    def __call__(self, value: float, size: float) -> float:
        """The value in standard deviations over what is usual at this size."""
        return (value - self.mean - self.slope * math.log(size)) / self.spread

    @staticmethod
    def fit(values: Sequence[float], sizes: Sequence[float]) -> Norm:
        """A least-squares line through ln(size); flat if there is only one size, or it would fall.

        Raises:
            GuardError: if there are fewer than three values, or they do not differ.
        """
        x, y = np.log(sizes), np.asarray(values, dtype=np.float64)
        slope = max(float(np.polyfit(x, y, 1)[0]), 0.0) if len(set(sizes)) > 1 else 0.0
        mean = float(y.mean() - slope * x.mean())
        spread = float((y - mean - slope * x).std()) if len(y) > 2 else 0.0
        if not spread > 1e-6 * float(np.abs(y).mean()):
            raise GuardError(f"{len(y)} scores of harmless texts do not show how scores vary.")
        return Norm(mean, slope, spread)


@dataclass(frozen=True, eq=False)
class Windows(Part):
    """Reads long prompts and chats."""

    name: ClassVar[str] = "windows"

    piece: Norm = field(default_factory=Norm)
    """Of the most harmful piece."""

    whole: Norm = field(default_factory=Norm)
    """Of the whole, read as ever."""

    threshold: float = math.inf
    """In standard deviations; a long prompt or a chat is flagged if its greatest is over it."""

    bound: Bound | None = None
    """What calibration promises of the threshold; None before."""

    size: int = SIZE
    """Characters in a piece, at the most; blanks do not count."""

    floor: int = FLOOR
    """From so many characters on, a blank line ends a piece: a request that has a paragraph of its
    own is not read together with the next, and tiny paragraphs do not cost a piece each."""

    over: int = OVER
    """A prompt without earlier turns is read as ever up to so many characters."""

    fitted: dict[str, Any] | None = None
    """Provenance: digests of the data."""

    def needed(self, prompt: Prompt) -> bool:
        """Whether a prompt is long, or a chat in which the user has spoken before."""
        size = max(len(prompt.text), prompt.undone_from)
        return size > self.over or any(m.role == "user" for m in prompt.history)

    def pieces(self, prompt: Prompt) -> list[Piece]:
        """What the user says, cut up; a turn that says nothing has no piece.

        Raises:
            PromptError: if the prompt's own text says nothing.
        """
        if not prompt.text.strip():
            raise PromptError(f"Prompt '{prompt.id}' has no text; expected at least a word.")
        turns = [(n, m.content) for n, m in enumerate(prompt.history) if m.role == "user"]
        return [
            Piece(number, start, end, text[start:end])
            for number, text in [*turns, (len(prompt.history), prompt.text)]
            for start, end in cut(text, self.size, self.floor)
        ]

    def find(self, pieces: Sequence[Piece], scores: Sequence[float]) -> list[Evidence]:
        """The most harmful piece of each turn, in standard deviations.

        Args:
            pieces: What was read.
            scores: The guard's, packs included, of the whole and then of each piece.

        Raises:
            GuardError: if a score is not finite.
        """
        if not all(map(math.isfinite, scores)):
            raise GuardError("A piece's score is not a finite number; use bfloat16 or float32.")
        best = dict[int, Evidence]()
        for piece, score in zip(pieces, scores[1:], strict=True):
            told = self.piece(score, len(pieces))
            if piece.message not in best or told > best[piece.message].score:
                best[piece.message] = Evidence(piece.message, piece.start, piece.end, told)
        last, whole = pieces[-1], self.whole(scores[0], len(pieces))
        if whole > best[last.message].score:
            first = next(p for p in pieces if p.message == last.message)
            best[last.message] = Evidence(last.message, first.start, last.end, whole)
        return list(best.values())

    def evidence(
        self, pieces: Sequence[Piece], scores: Sequence[float], threshold: float, spread: float
    ) -> list[Evidence]:
        """What ``find`` finds, in the unit of a guard with this threshold and spread."""
        return [
            replace(e, score=threshold + spread * (e.score - self.threshold))
            for e in self.find(pieces, scores)
        ]

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See ``Part``."""
        return asdict(self), {}

    @classmethod
    def unpack(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part``."""
        piece, whole = (Norm(**record[name]) for name in ("piece", "whole"))
        numbers = [record["threshold"], *asdict(piece).values(), *asdict(whole).values()]
        if (
            not all(map(math.isfinite, numbers))
            or min(record[name] for name in ("size", "floor", "over")) < 1
        ):
            raise ValueError("a number of the windows is out of range")
        bound = Bound(**record["bound"]) if record["bound"] else None
        return cls(**{**record, "piece": piece, "whole": whole, "bound": bound})

    def rebound(self) -> Windows:
        """See ``Part``."""
        return replace(self, bound=None)

    def notes(self) -> list[str]:
        """See ``Part``."""
        promise = str(self.bound) if self.bound else "not calibrated, so nothing is promised"
        return [
            f"Prompts of more than {self.over} characters, and chats with earlier turns of the "
            f"user, are read whole and by pieces of up to {self.size} characters. Of these: "
            f"{promise}."
        ]


def with_pieces(prompt: Prompt, pieces: Sequence[Piece]) -> tuple[Prompt, ...]:
    """What is read of a long prompt: itself, and each piece as a prompt of its own."""
    return (prompt, *(Prompt(piece.text, id=prompt.id) for piece in pieces))


def read_apart(
    windows: Windows | None,
    prompts: Iterator[Prompt],
    short: Callable[[Iterator[Prompt]], Iterator[R]],
    long: Callable[[Prompt], R],
) -> Iterator[R]:
    """Yield what is read of each prompt, in order: of long ones and chats one by one.

    Args:
        windows: The guard's; without them, all are short.
        prompts: Consumed lazily.
        short: Yields one result a prompt, in order.
        long: The result of one prompt.
    """
    while windows and (batch := tuple(islice(prompts, BATCH))):
        apart = [windows.needed(prompt) for prompt in batch]
        results = short(p for p, longer in zip(batch, apart, strict=True) if not longer)
        for prompt, longer in zip(batch, apart, strict=True):
            yield long(prompt) if longer else next(results)
    yield from short(prompts)


def cut(text: str, size: int, floor: int = FLOOR) -> Iterator[tuple[int, int]]:
    """Sentences and lines of a paragraph, as many together as fit; longer ones in parts.

    Parts end at a blank, and paragraphs of less than ``floor`` characters go with the next. Blanks
    do not count, so that a text has no more pieces than what it says calls for.
    """
    start, end, filled = 0, 0, 0
    for first, last in _parts(text, size):
        own = last - first - sum(map(str.isspace, text[first:last]))
        apart = filled >= floor and text.count("\n", end, first) > 1
        if filled and (apart or filled + own > size):
            yield start, end
            filled = 0
        start, end, filled = (start if filled else first), last, filled + own
    if filled:
        yield start, end


def _parts(text: str, size: int) -> Iterator[tuple[int, int]]:
    """Sentences and lines; longer ones in parts; none of them blank."""
    first = 0
    for last, after in [*(m.span() for m in BREAK.finditer(text)), (len(text), len(text))]:
        while last - first > size:
            blank = text.rfind(" ", first + 1, first + size + 1)
            stop = blank if blank > 0 else first + size
            if not text[first:stop].isspace():
                yield first, stop
            first = stop + (blank > 0)
        if text[first:last].strip():
            yield first, last
        first = after
