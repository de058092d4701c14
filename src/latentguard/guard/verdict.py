"""What a guard says of a prompt, and the optional parts that add to it.

A part is one frozen dataclass in a module of its own: what it needs beyond the core of a guard, how
it is packed, and what it adds to a verdict. To add one:

1. subclass ``Part`` with a ``name`` (it is the key in ``guard.json`` and the prefix of its tensors)
   and write ``pack`` and ``unpack``;
2. override what it needs of ``positions``, ``adjust``, ``judge`` and ``notes``;
3. add the class to ``PARTS`` in ``packing.py``, whose order is the order of judging, and the module
   to the layers in ``pyproject.toml`` (below ``packing``);
4. make guards with it by ``guard.with_part(part)``; read it by ``guard.part(MyPart)``, which is
   None where a guard has none.

Saving, loading, the digest and the model card follow from that; ``guard.py`` need not change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from jaxtyping import Float
from torch import Tensor

from latentguard.states import States

Decision = Literal["allow", "review", "block"]


@dataclass(frozen=True)
class Evidence:
    """The most harmful piece of one turn of a long prompt or a chat."""

    message: int
    """Which message of the chat, counted from 0; the prompt's own text comes after its history."""

    start: int
    """The first character of the piece in that message."""

    end: int
    """The first character after it."""

    score: float
    """Its score; the unit is that of the verdict."""


@dataclass(frozen=True)
class Verdict:
    """What a guard says of one prompt."""

    id: str
    """Of the prompt."""

    score: float
    """Higher is more harmful; the unit is the probe's own."""

    probability: float
    """Probability of harmful where both classes are equally frequent."""

    flagged: bool
    """Whether the score is above the threshold."""

    beliefs: dict[str, float]
    """Delta of each axis (equations 3 and 4), over the guard's layers."""

    decision: Decision = "allow"
    """``block`` if flagged; ``review`` between two calibrated thresholds; else ``allow``."""

    category: str | None = None
    """The likely risk category; None if the guard knows none."""

    category_scores: dict[str, float] = field(default_factory=dict)
    """Of each category that the guard knows."""

    quadrant: str | None = None
    """What both beliefs together say; None without a refusal axis."""

    evidence: tuple[Evidence, ...] = ()
    """Of a long prompt or a chat: the most harmful piece of each turn of the user, oldest first.
    The greatest of their scores is the score. Empty for a short prompt."""

    obfuscations: tuple[str, ...] = ()
    """What was undone to find this score; empty where the text as it stands scores as high."""


class Part(ABC):
    """An optional part of a guard; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    """Its key in ``guard.json``; its tensors are called ``NAME.TENSOR``."""

    @property
    def positions(self) -> tuple[str, ...]:
        """What it reads beyond the guard's own positions, at the guard's layers."""
        return ()

    @abstractmethod
    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""

    @classmethod
    @abstractmethod
    def unpack(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The part that was packed so.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged; the guard is then not loaded.
        """

    def adjust(self, states: States, scores: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The scores of ``states.prompts``, before any threshold, as this part changes them."""
        return scores

    def judge(self, states: States, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts on ``states.prompts`` with what this part adds, in the same order.

        What reads states here may only name what was decided: where states are not seen (vLLM) it
        is left out. What can flag belongs into ``adjust``; there, it is then refused.
        """
        return list(verdicts)

    def rebound(self) -> Self:
        """What is left of it where the guard is bound to another model: no promise, no figure."""
        return self

    def notes(self) -> list[str]:
        """Paragraphs and tables for the model card and ``latentguard show``, in Markdown."""
        return []
