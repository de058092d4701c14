"""Interventions: what is changed in a model while it reads a prompt, and while it replies.

Layers count as in ``states``: layer k is the residual stream after k blocks.
Axis names in shapes: d width, p positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from latentguard.errors import PromptError
from latentguard.prompts import Prompt

Tokens = Literal["instruction", "before", "all", "t_inst"]
"""Which prompt tokens are steered: those of the last user message; of these, those that lie before
the inversion question; every token, template included; or t_inst alone."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """A vector that is added to the residual stream at one layer: h + c v.

    It is added while the prompt is read; while the reply is made only if that is asked for. It need
    not be of the layer where it is added, nor the same for every prompt.

    Examples:
        >>> axis = guard.axes[0]
        >>> push = lg.Intervention(axis.layers[0], axis.direction[0], coefficient=2.0)
        >>> replies = model.sweep([lg.Prompt("Hello.")], [None, push], max_new_tokens=2)
        >>> len(replies)
        2
    """

    layer: int
    """Which layer; 0 is the embedding output."""

    vector: Float[Tensor, "d"] | Mapping[Prompt, Float[Tensor, "d"]]
    """What is added, such as the direction of an axis; to every prompt the same, or its own."""

    coefficient: float = 1.0
    """How often; negative steers the other way, 0 changes nothing."""

    tokens: Tokens = "instruction"
    """Where."""

    label: str = ""
    """What replies are marked with."""

    while_replying: bool = False
    """Whether it is added at each token of the reply, too."""

    def __post_init__(self) -> None:
        if self.tokens not in get_args(Tokens):
            raise ValueError(f"tokens is one of {get_args(Tokens)}; found '{self.tokens}'")

    @property
    def vectors(self) -> list[Float[Tensor, "d"]]:
        """All that is added to some prompt."""
        return list(self.vector.values()) if isinstance(self.vector, Mapping) else [self.vector]

    def vector_of(self, prompt: Prompt) -> Float[Tensor, "d"]:
        """What is added to a prompt.

        Raises:
            PromptError: if prompts have vectors of their own, and this one has none.
        """
        if not isinstance(self.vector, Mapping):
            return self.vector
        if prompt not in self.vector:
            raise PromptError(f"Prompt '{prompt.id}' has no vector of its own to be steered along.")
        return self.vector[prompt]


@dataclass(frozen=True, eq=False)
class Ablation:
    """A direction that is projected out of the residual stream at every layer: h - (h u) u.

    The stream is projected where blocks hand it on, so a block sees no component of it at its
    input; what its attention adds before its MLP is projected behind the block. Weights stay as
    they are.
    """

    vector: Float[Tensor, "d"]
    """The direction; its length does not matter, but one of length 0 changes nothing."""

    tokens: Tokens = "all"
    """Where; with ``all`` also at each token of the reply."""

    label: str = ""
    """What replies are marked with."""


@dataclass(frozen=True, eq=False)
class Patch:
    """States of another run that take the place of a prompt's own while it is read."""

    layer: int
    """Which layer; 0 is the embedding output."""

    positions: tuple[str, ...]
    """Where, such as ``t_inst``; names as in ``Layout.index``."""

    states: Mapping[Prompt, Float[Tensor, "p d"]]
    """What takes the place of each prompt's own states."""

    label: str = ""
    """What replies are marked with."""


Keys = Literal["t_inst", "instruction", "all but t_inst", "random", "all but random"]
"""Tokens of the last user message that are not seen; ``random`` is one of those before t_inst."""


@dataclass(frozen=True)
class Knockout:
    """Attention that is cut: tokens behind t_inst, and the reply, do not see some tokens."""

    blocks: tuple[int, ...]
    """In which blocks, from 1 on: block k makes layer k of layer k - 1."""

    keys: Keys = "t_inst"
    """What is not seen."""

    readers: Literal["after", "t_post"] = "after"
    """Who does not see it: each token behind t_inst and the reply, or t_post alone."""

    draw: int = 0
    """Of the random token."""

    label: str = ""
    """What replies are marked with."""


Edit = Intervention | Ablation | Patch | Knockout
"""All that can be changed in a run of the model."""
