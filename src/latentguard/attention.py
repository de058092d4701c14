"""Attention: learnt queries that say which tokens of an instruction a guard looks at.

Axis names in shapes: h queries, d width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import GuardError

ATTENDED = "attended+"
"""With the number of a query behind it, from 1 on, the name of the position where it looks."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Weights of tokens: the softmax, over the instruction, of states times a query.

    The state at the position ``attended+k`` of a layer is the mean of the states of the
    instruction's tokens there, with the weights of query k.
    """

    layer: int
    """Of the states that queries are compared with; weights hold for it and for those above."""

    queries: Float[Tensor, "h d"]
    """Float32."""

    @property
    def positions(self) -> tuple[str, ...]:
        """The name of each query's position."""
        return tuple(f"{ATTENDED}{k + 1}" for k in range(len(self.queries)))

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        return {"layer": self.layer}, {"queries": self.queries}

    @staticmethod
    def from_dict(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Attention:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        queries = tensors["queries"]
        if queries.ndim != 2 or not len(queries) or not torch.isfinite(queries).all():
            raise ValueError("the queries are not finite numbers, a row for each")
        return Attention(int(record["layer"]), queries)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        content = self.queries.contiguous().numpy().tobytes()
        return hashlib.sha256(f"{self.layer}:".encode() + content).hexdigest()


@dataclass(frozen=True, eq=False)
class AttendedSlots:
    """Which of the positions of a capture are attended, and by which queries."""

    slots: tuple[int, ...]
    """Numbers of the positions."""

    queries: Float[Tensor, "a d"]
    """A query for each of them."""


def attended_slots(
    positions: Sequence[str], layers: Sequence[int], attention: Attention | None
) -> AttendedSlots | None:
    """The attended ones of some positions; None if there are none.

    Raises:
        GuardError: if there is no such query, or its layer is not the lowest of ``layers``.
    """
    slots = tuple(n for n, position in enumerate(positions) if position.startswith(ATTENDED))
    if not slots:
        return None
    if attention is None:
        raise GuardError(
            f"The position '{positions[slots[0]]}' is where a guard's query looks; found no "
            "queries. Capture it with the guard's own: attention=guard.reading.attention."
        )
    names = attention.positions
    if unknown := [positions[slot] for slot in slots if positions[slot] not in names]:
        raise GuardError(
            f"There is no position '{unknown[0]}': expected one of {', '.join(names)}."
        )
    if min(layers) != attention.layer:
        raise GuardError(
            f"Queries look at layer {attention.layer}, so it has to be the lowest that is read; "
            f"found layer {min(layers)}."
        )
    wanted = [names.index(positions[slot]) for slot in slots]
    return AttendedSlots(slots, attention.queries[torch.tensor(wanted)])
