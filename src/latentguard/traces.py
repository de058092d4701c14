"""Traces: what one pass over a long prompt or a chat leaves of every turn and of every token.

Axis names in shapes: k turns of the user, t tokens of a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.prompts import Prompt
from latentguard.readouts import Readout
from latentguard.states import Backend, States


@dataclass(frozen=True, eq=False)
class Turn:
    """One message of the user, token by token."""

    message: int
    """Which message of the chat, counted from 0; the prompt's own text comes after its history."""

    spans: tuple[tuple[int, int], ...]
    """Which characters of the message each of its t tokens stands for."""

    scores: Float[Tensor, "t"]
    """The probe's score of each token, float32."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One pass over a prompt, and over each chat that ended in an earlier turn of it."""

    states: States
    """A row for each of the k turns: what capture gives of the chat up to that turn."""

    turns: tuple[Turn, ...]
    """The k turns of the user, oldest first; the last is the prompt's own text."""

    @property
    def last(self) -> States:
        """The row of the prompt itself."""
        return replace(
            self.states, values=self.states.values[-1:], prompts=self.states.prompts[-1:]
        )


@runtime_checkable
class Tracer(Backend, Protocol):
    """A backend that reads long prompts; what the windows of a guard need of a model."""

    def count(self, prompt: Prompt) -> int:
        """How many tokens the prompt's own text has.

        Raises:
            PromptError: if it is empty.
        """

    def trace(
        self, prompt: Prompt, *, positions: Sequence[str], layers: Sequence[int], probe: Readout
    ) -> Trace:
        """Read the states of each turn at some positions and layers, and score each token.

        Raises:
            PromptError: if a turn is empty, or the prompt is longer than the model can read.
        """


def require_tracer(backend: Backend) -> Tracer:
    """The backend, if it reads long prompts.

    Raises:
        GuardError: if it does not: read as a short one, a long prompt could hide what it asks.
    """
    if isinstance(backend, Tracer):
        return backend
    raise GuardError(
        f"This guard reads long prompts by windows, which {type(backend).__name__} cannot: score "
        "them on transformers (ChatModel), or fit a guard without '--long'."
    )
