"""Obfuscations: a guard reads what is disguised as it stands and undone (``uncover``).

The worst reading counts. So nothing that is flagged as it stands is missed for it, and what does
not look disguised costs nothing and scores as ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar, get_args

from torch import Tensor

from latentguard.guard.verdict import Decision, Part, Verdict
from latentguard.prompts import Message, Prompt
from latentguard.text.deobfuscation import OBFUSCATIONS, RULES, uncover

R = TypeVar("R")

Told = Callable[[Verdict], Verdict]
"""The verdict on what lies beneath a prompt -> one on the prompt, which names what was undone."""


@dataclass(frozen=True)
class Obfuscations(Part):
    """Reads what is disguised once more for each text beneath."""

    name: ClassVar[str] = "obfuscations"

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See ``Part``; with the rules as they are now, so that other ones are another digest."""
        return {"rules": RULES}, {}

    @classmethod
    def unpack(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part``."""
        return cls()

    def notes(self) -> list[str]:
        """See ``Part``."""
        return [
            f"Text that looks obfuscated ({', '.join(OBFUSCATIONS)}) is read as it stands and "
            "undone; the worst reading counts, and the verdict names what was undone."
        ]


Beneath = tuple[Prompt, tuple[str, ...]]
"""A prompt as it is undone, and the names of the obfuscations."""


def beneath(prompt: Prompt, wanted: bool = True) -> list[Beneath]:
    """The prompt with all that the user says undone: once for each text beneath, if there is any.

    Nothing if it is not wanted, since the guard has no ``Obfuscations``.

    Where several turns are disguised, the first texts beneath go together, and so on.
    """
    if not wanted:
        return []
    turns = [*prompt.history, Message("user", prompt.text)]
    found = [list(uncover(t.content).items()) if t.role == "user" else [] for t in turns]
    return [_undone(prompt, turns, found, at) for at in range(max(map(len, found)))]


def _undone(
    prompt: Prompt,
    turns: Sequence[Message],
    found: Sequence[Sequence[tuple[str, tuple[str, ...]]]],
    at: int,
) -> Beneath:
    names, said = dict[str, None](), list[Message]()
    for turn, texts in zip(turns, found, strict=True):
        text, known = texts[min(at, len(texts) - 1)] if texts else (turn.content, ())
        names |= dict.fromkeys(known)
        said.append(replace(turn, content=text))
    text, size = said[-1].content, len(prompt.text)
    return replace(prompt, text=text, history=tuple(said[:-1]), undone_from=size), tuple(names)


def read_through(
    wanted: bool,
    prompts: Iterable[Prompt],
    read: Callable[[Iterator[Prompt]], Iterator[R]],
    choose: Callable[[R, R, Told], R],
) -> Iterator[R]:
    """Yield what is read of each prompt, in order; of disguised ones, the chosen of all readings.

    Args:
        wanted: Whether the guard has ``Obfuscations``; if not, each is read as it stands.
        prompts: Consumed lazily.
        read: Yields one result a prompt, in order.
        choose: Of the result so far, that of what lies beneath, and what to make of a verdict on
            the latter.
    """
    asked = deque[tuple[Prompt, list[Beneath]]]()

    def each() -> Iterator[Prompt]:
        for prompt in prompts:
            others = beneath(prompt, wanted)
            asked.append((prompt, others))
            yield prompt
            yield from (other for other, _ in others)

    results = read(each())
    for result in results:
        prompt, others = asked.popleft()
        for _, names in others:
            result = choose(result, next(results), told(prompt, names))  # noqa: PLW2901
        yield result


def worse(one: Verdict, other: Verdict, named: Told) -> Verdict:
    """The other verdict if it is the worse: by its flag, its decision, and then its score.

    Scores alone would not do: a short text and a long one have thresholds of their own.
    """
    return named(other) if _badness(other) > _badness(one) else one


def _badness(verdict: Verdict) -> tuple[bool, int, float]:
    return verdict.flagged, get_args(Decision).index(verdict.decision), verdict.score


def told(prompt: Prompt, names: tuple[str, ...]) -> Told:
    """Evidence then tells the turn alone: places in the text beneath are not those of the text."""
    said = [*(turn.content for turn in prompt.history), prompt.text]

    def named(verdict: Verdict) -> Verdict:
        evidence = (replace(e, start=0, end=len(said[e.message])) for e in verdict.evidence)
        return replace(verdict, obfuscations=names, evidence=tuple(evidence))

    return named
