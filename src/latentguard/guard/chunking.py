"""Chunking: how a guard reads long prompts and chats, where evidence may lie anywhere.

What the user says is cut into chunks: sentences and lines of one paragraph, up to ``max_chars``
characters together. Each chunk is scored as a prompt of its own, and so is the whole. Both scores
are put on one scale, on which harmless material has mean 0 and standard deviation 1 whatever its
size, because a longer text has more chunks and so a higher maximum. The greatest of all is compared
with one threshold, so that the stated rate is that of both readings together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from latentguard.errors import GuardError, PromptError
from latentguard.guard.verdict import Evidence
from latentguard.prompts import Prompt
from latentguard.stats.bounds import Bound

MAX_CHARS = 120
MIN_CHARS = 20
LONGER_THAN = 500
"""Defaults of ``Chunking``."""

BREAK = re.compile(r"(?<=[.!?;:])[^\S\n]+|(?<=[\u3002\uff01\uff1f])|\n+")
"""Where sentences and lines end."""


@dataclass(frozen=True)
class Chunk:
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
class LengthNorm:
    """How a score is distributed on harmless material, by the number of chunks."""

    mean: float = 0.0
    """Where there is one chunk."""

    slope: float = 0.0
    """By how much it grows when their number is multiplied by e."""

    spread: float = 1.0
    """Standard deviation around that line."""

    def __call__(self, value: float, chunks: float) -> float:
        """The value in standard deviations over what is usual for so many chunks."""
        return (value - self.mean - self.slope * math.log(chunks)) / self.spread

    @staticmethod
    def fit(values: Sequence[float], chunks: Sequence[float]) -> LengthNorm:
        """A least-squares line through ln(chunks); flat if there is one size, or it would fall.

        Raises:
            GuardError: if there are fewer than three values, or they do not differ.
        """
        x = np.log(chunks)
        y = np.asarray(values, dtype=np.float64)
        slope = max(float(np.polyfit(x, y, 1)[0]), 0.0) if len(set(chunks)) > 1 else 0.0
        mean = float(y.mean() - slope * x.mean())
        spread = float((y - mean - slope * x).std()) if len(y) > 2 else 0.0
        if not spread > 1e-6 * float(np.abs(y).mean()):
            raise GuardError(f"{len(y)} scores of harmless texts do not show how scores vary.")
        return LengthNorm(mean, slope, spread)


@dataclass(frozen=True, eq=False)
class Chunking:
    """Which prompts are cut into chunks, and what counts as harmful among their scores."""

    chunk_norm: LengthNorm = field(default_factory=LengthNorm)
    """Of the most harmful chunk."""

    whole_norm: LengthNorm = field(default_factory=LengthNorm)
    """Of the whole, read as a short prompt is."""

    threshold: float = math.inf
    """In standard deviations; a long prompt or a chat is flagged if its greatest is over it."""

    bound: Bound | None = None
    """What calibration promises of the threshold; None before."""

    max_chars: int = MAX_CHARS
    """Characters in a chunk, at the most; blanks do not count."""

    min_chars: int = MIN_CHARS
    """From so many characters on, a blank line ends a chunk: a request that has a paragraph of its
    own is not read together with the next, and tiny paragraphs do not cost a chunk each."""

    longer_than: int = LONGER_THAN
    """A prompt without earlier turns is read whole, and only whole, up to so many characters."""

    fitted: dict[str, Any] | None = None
    """Provenance: digests of the data."""

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether a prompt is long, or a chat in which the user has spoken before."""
        length = max(len(prompt.text), prompt.decoded_from_length)
        return length > self.longer_than or any(m.role == "user" for m in prompt.history)

    def chunks(self, prompt: Prompt) -> list[Chunk]:
        """What the user says, cut up; a turn that says nothing has no chunk.

        Raises:
            PromptError: if the prompt's own text says nothing.
        """
        if not prompt.text.strip():
            raise PromptError(f"Prompt '{prompt.id}' has no text; expected at least a word.")
        turns = [(n, m.content) for n, m in enumerate(prompt.history) if m.role == "user"]
        return [
            Chunk(number, start, end, text[start:end])
            for number, text in [*turns, (len(prompt.history), prompt.text)]
            for start, end in cut(text, self.max_chars, self.min_chars)
        ]

    def find_evidence(
        self, chunks: Sequence[Chunk], whole: float, scores: Sequence[float]
    ) -> list[Evidence]:
        """The most harmful chunk of each turn, in standard deviations.

        Args:
            chunks: What was read.
            whole: The guard's score, packs included, of the whole prompt.
            scores: The same of each chunk.

        Raises:
            GuardError: if a score is not finite.
        """
        if not all(map(math.isfinite, (whole, *scores))):
            raise GuardError("A chunk's score is not a finite number; use bfloat16 or float32.")
        best = dict[int, Evidence]()
        for chunk, score in zip(chunks, scores, strict=True):
            normed = self.chunk_norm(score, len(chunks))
            if chunk.message not in best or normed > best[chunk.message].score:
                best[chunk.message] = Evidence(chunk.message, chunk.start, chunk.end, normed)
        last = chunks[-1]
        normed = self.whole_norm(whole, len(chunks))
        if normed > best[last.message].score:
            first = next(chunk for chunk in chunks if chunk.message == last.message)
            best[last.message] = Evidence(last.message, first.start, last.end, normed)
        return list(best.values())

    def in_guard_units(self, evidence: Sequence[Evidence], threshold: float) -> list[Evidence]:
        """Evidence in the unit of the guard's scores, moved so that this threshold is its own.

        So a chunk's evidence is its own score but for a shift, and ranks among scores of short
        prompts; it is over the guard's threshold exactly if it is over the threshold here.
        """
        unit = self.chunk_norm.spread
        return [
            replace(one, score=threshold + unit * (one.score - self.threshold)) for one in evidence
        ]

    def without_promise(self) -> Chunking:
        """The same, where the guard is bound to another model."""
        return replace(self, bound=None)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Chunking:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        norms = {name: LengthNorm(**record[name]) for name in ("chunk_norm", "whole_norm")}
        bound = Bound.from_dict(record["bound"]) if record["bound"] else None
        chunking = Chunking(**{**record, **norms, "bound": bound})
        numbers = [chunking.threshold]
        for norm in norms.values():
            numbers += asdict(norm).values()
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a number of the chunking is not finite")
        if min(chunking.max_chars, chunking.min_chars, chunking.longer_than) < 1:
            raise ValueError("a size of the chunking is less than 1")
        return chunking

    def notes(self) -> list[str]:
        """A paragraph for the model card."""
        promise = str(self.bound) if self.bound else "not calibrated, so nothing is promised"
        return [
            f"Prompts of more than {self.longer_than} characters, and chats with earlier turns of "
            f"the user, are read whole and by chunks of up to {self.max_chars} characters. Of "
            f"these: {promise}."
        ]


def cut(text: str, max_chars: int, min_chars: int = MIN_CHARS) -> Iterator[tuple[int, int]]:
    """Yield start and end of each chunk: sentences and lines of a paragraph, as many as fit.

    Longer sentences are cut at a blank, and paragraphs of less than ``min_chars`` characters go
    with the next. Blanks do not count, so that a text has no more chunks than its words call for.
    """
    start = 0
    end = 0
    filled = 0
    for first, last in _sentences(text, max_chars):
        size = last - first - sum(map(str.isspace, text[first:last]))
        new_paragraph = filled >= min_chars and text.count("\n", end, first) > 1
        if filled and (new_paragraph or filled + size > max_chars):
            yield start, end
            filled = 0
        if not filled:
            start = first
        end = last
        filled += size
    if filled:
        yield start, end


def _sentences(text: str, max_chars: int) -> Iterator[tuple[int, int]]:
    """Sentences and lines; longer ones in parts; none of them blank."""
    first = 0
    for last, after in [*(m.span() for m in BREAK.finditer(text)), (len(text), len(text))]:
        while last - first > max_chars:
            blank = text.rfind(" ", first + 1, first + max_chars + 1)
            stop = blank if blank > 0 else first + max_chars
            if not text[first:stop].isspace():
                yield first, stop
            first = stop + (blank > 0)
        if text[first:last].strip():
            yield first, last
        first = after
