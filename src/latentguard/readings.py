"""Readings: where, and after which change of the text, a guard reads the states.

``t_inst`` and ``t_post`` are the paper's. ``post+k`` is the k-th token after the instruction.
``sealed`` is t_inst after the instruction's ending is made uniform, so that its last character
cannot leak the label. ``span`` is t_inst and every token after it, read together. ``pooled`` is
t_inst, t_post and two means: ``post`` over the tokens after the instruction, where the model sums
up what it was asked, and ``mean`` over the instruction's own, so that evidence far from its end
counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from latentguard.errors import GuardError
from latentguard.prompts import Prompt

NAMES = "t_inst, t_post, post+1, post+2, ..., sealed, span or pooled"
DEFAULT = "pooled"

MEANS = ("mean", "post")
"""Positions that are means over tokens."""


@dataclass(frozen=True)
class Reading:
    """Where a guard reads."""

    name: str
    """One of ``NAMES``."""

    positions: tuple[str, ...]
    """The positions to capture."""

    @staticmethod
    def of(name: str, post: int) -> Reading:
        """The reading of that name on a template with ``post`` post-instruction tokens.

        Raises:
            GuardError: if there is no such reading.
        """
        known: dict[str, tuple[str, ...]] = {"t_inst": ("t_inst",), "t_post": ("t_post",)}
        known["sealed"] = ("t_inst",)
        known["span"] = ("t_inst", *(f"post+{k}" for k in range(1, post)), "t_post")
        known["pooled"] = ("t_inst", "post", "t_post", "mean")
        known |= {f"post+{k}": (f"post+{k}",) for k in range(1, post + 1)}
        if name not in known:
            raise GuardError(
                f"There is no reading '{name}' here: expected {NAMES}, with k up to {post}."
            )
        return Reading(name, known[name])

    def prepare(self, prompt: Prompt) -> Prompt:
        """The prompt as it is read: its ending made uniform if the reading is sealed."""
        return replace(prompt, text=seal(prompt.text)) if self.name == "sealed" else prompt


def seal(text: str) -> str:
    """Replace closing white space and ``. ? !`` by one full stop."""
    return re.sub(r"(?<![\s.?!])[\s.?!]+$", "", text) + "."  # looks at each run of blanks once
