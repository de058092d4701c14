"""Disguises: a guard reads what is disguised twice, as it stands and undone (``uncover``).

The more harmful reading counts. So nothing that is flagged as it stands is missed for it, and what
does not look disguised costs nothing and scores as ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from latentguard.parts import Part, Verdict
from latentguard.prompts import Message, Prompt
from latentguard.uncover import DISGUISES, uncover

R = TypeVar("R")

Told = Callable[[Verdict], Verdict]
"""The verdict on what lies beneath a prompt -> one on the prompt, which names what was undone."""


@dataclass(frozen=True)
class Disguises(Part):
    """Reads what is disguised once more, undone."""

    name: ClassVar[str] = "disguises"

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See ``Part``."""
        return {}, {}

    @classmethod
    def unpack(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part``."""
        return cls()

    def notes(self) -> list[str]:
        """See ``Part``."""
        return [
            f"Text that looks disguised ({', '.join(DISGUISES)}) is read as it stands and once "
            "more undone; the more harmful reading counts, and the verdict names what was undone."
        ]


def beneath(prompt: Prompt) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt with all that the user says uncovered, and the names of the disguises."""
    text, names = uncover(prompt.text)
    history = list[Message]()
    for turn in prompt.history:
        said, more = uncover(turn.content) if turn.role == "user" else (turn.content, ())
        history.append(replace(turn, content=said))
        names += more
    return replace(prompt, text=text, history=tuple(history)), tuple(dict.fromkeys(names))


def read_both(
    part: Disguises | None,
    prompts: Iterable[Prompt],
    read: Callable[[Iterator[Prompt]], Iterator[R]],
    choose: Callable[[R, R, Told], R],
) -> Iterator[R]:
    """Yield what is read of each prompt, in order; of disguised ones, the chosen of two readings.

    Args:
        part: The guard's; without it, each is read as it stands.
        prompts: Consumed lazily.
        read: Yields one result a prompt, in order.
        choose: Of the result as the prompt stands, that of what lies beneath, and what to make of
            a verdict on the latter.
    """
    asked = deque[tuple[Prompt, tuple[str, ...]]]()

    def each() -> Iterator[Prompt]:
        for prompt in prompts:
            other, names = beneath(prompt) if part else (prompt, ())
            asked.append((prompt, names))
            yield prompt
            if names:
                yield other

    results = read(each())
    for one in results:
        prompt, names = asked.popleft()
        yield choose(one, next(results), told(prompt, names)) if names else one


def worse(one: Verdict, other: Verdict, named: Told) -> Verdict:
    """The verdict with the greater score."""
    return named(other) if other.score > one.score else one


def told(prompt: Prompt, names: tuple[str, ...]) -> Told:
    """Evidence then tells the turn alone: places in the text beneath are not those of the text."""
    said = [*(turn.content for turn in prompt.history), prompt.text]

    def named(verdict: Verdict) -> Verdict:
        evidence = (replace(e, start=0, end=len(said[e.message])) for e in verdict.evidence)
        return replace(verdict, disguises=names, evidence=tuple(evidence))

    return named
