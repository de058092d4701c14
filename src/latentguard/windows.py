"""Windows: what a guard needs to read long prompts and chats, where evidence may lie anywhere.

Two readings of one pass. A *probe* scores each token of what the user says; the mean over each run
of ``size`` tokens is the score of that stretch. And each turn of the user is scored at its end by
the guard's own readout, as if the chat had ended there. Both are put on one scale, on which
harmless material has mean 0 and standard deviation 1 whatever its size: a longer text has more
stretches, and so a higher maximum. The greatest of all is held against one threshold, so that the
stated rate is that of both readings together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.metrics import Bound
from latentguard.parts import Evidence, Part
from latentguard.prompts import Prompt
from latentguard.readouts import Readout
from latentguard.states import Backend
from latentguard.traces import Trace, Turn, require_tracer

SIZE, OVER = 8, 128
"""Defaults of ``Windows.size`` and ``Windows.over``."""


@dataclass(frozen=True)
class Norm:
    """How a maximum is distributed on harmless material, by the size of what it is taken over."""

    mean: float = 0.0
    """At size 1."""

    slope: float = 0.0
    """By how much it grows when the size is multiplied by e."""

    spread: float = 1.0
    """Standard deviation around that line."""

    def __call__(self, value: float, size: float) -> float:
        """The value in standard deviations over what is usual at this size."""
        return (value - self.mean - self.slope * math.log(size)) / self.spread

    @staticmethod
    def fit(values: Sequence[float], sizes: Sequence[float]) -> Norm:
        """A least-squares line through ln(size); flat if there is only one size.

        Raises:
            GuardError: if there are fewer than three values, or they do not differ.
        """
        x, y = np.log(sizes), np.asarray(values, dtype=np.float64)
        slope = float(np.polyfit(x, y, 1)[0]) if len(set(sizes)) > 1 else 0.0
        mean = float(y.mean() - slope * x.mean())
        spread = float((y - mean - slope * x).std()) if len(y) > 2 else 0.0
        if not spread > 1e-6 * float(np.abs(y).mean()):
            raise GuardError(f"{len(y)} scores of harmless texts do not show how scores vary.")
        return Norm(mean, max(slope, 0.0), spread)


@dataclass(frozen=True, eq=False)
class Windows(Part):
    """Reads long prompts and chats."""

    name: ClassVar[str] = "windows"

    probe: Readout
    """Scores the state of a token, float32 [l d]."""

    stretch: Norm = field(default_factory=Norm)
    """Of the most harmful stretch, by tokens over ``over``."""

    turn: Norm = field(default_factory=Norm)
    """Of the guard's own scores at the ends of short turns, by their number."""

    end: Norm = field(default_factory=Norm)
    """Of the guard's own score at the end of a long turn."""

    threshold: float = math.inf
    """In standard deviations; a long prompt or a chat is flagged if its greatest is over it."""

    bound: Bound | None = None
    """What calibration promises of the threshold; None before."""

    size: int = SIZE
    """Tokens in a stretch."""

    over: int = OVER
    """A prompt without earlier turns is read as ever up to so many tokens of its own text."""

    fitted: dict[str, Any] | None = None
    """Provenance: counts, choices, digests of the data."""

    def needed(self, backend: Backend, prompt: Prompt) -> bool:
        """Whether a prompt is long, or a chat in which the user has spoken before."""
        if any(message.role == "user" for message in prompt.history):
            return True
        short = (
            len(prompt.text.encode("utf-8", "replace")) <= self.over
        )  # no more tokens than bytes
        return not short and require_tracer(backend).count(prompt) > self.over

    def find(self, trace: Trace, scores: Sequence[float]) -> list[Evidence]:
        """The most harmful stretch of each turn, in standard deviations.

        Args:
            trace: What was read.
            scores: The guard's own score at the end of each turn.

        Raises:
            GuardError: if a score is not finite.
        """
        sizes = [len(turn.scores) for turn in trace.turns]
        tokens = max(1.0, sum(sizes) / self.over)
        short = max(1, sum(size <= self.over for size in sizes))
        found = []
        for turn, score in zip(trace.turns, scores, strict=True):
            value, start, end = best_stretch(turn, self.size)
            at_end = (self.turn, short) if len(turn.scores) <= self.over else (self.end, 1)
            whole, stretch = at_end[0](score, at_end[1]), self.stretch(value, tokens)
            if not math.isfinite(whole + stretch):
                raise GuardError("A token's score is not a finite number; use bfloat16 or float32.")
            if whole > stretch:
                start, end = turn.spans[0][0], turn.spans[-1][1]
            found.append(Evidence(turn.message, start, end, max(whole, stretch)))
        return found

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See ``Part``."""
        probe = dict(layers=self.probe.layers, bias=self.probe.bias)
        norms = {name: asdict(getattr(self, name)) for name in ("stretch", "turn", "end")}
        bound = asdict(self.bound) if self.bound else None
        record = dict(probe=probe, **norms, threshold=self.threshold, bound=bound)
        return record | dict(size=self.size, over=self.over, fitted=self.fitted), {
            "weight": self.probe.weight
        }

    @classmethod
    def unpack(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See ``Part``."""
        probe, weight = record["probe"], tensors["weight"]
        stretch, turn, end = (Norm(**record[name]) for name in ("stretch", "turn", "end"))
        numbers = [probe["bias"], record["threshold"]]
        numbers += [n for norm in (stretch, turn, end) for n in asdict(norm).values()]
        if not torch.isfinite(weight).all() or not all(map(math.isfinite, numbers)):
            raise ValueError("a number of the windows is not finite")
        if (
            weight.ndim != 2
            or len(weight) != len(probe["layers"])
            or min(record["size"], record["over"]) < 1
        ):
            raise ValueError("the windows' probe has another shape than its layers say")
        return cls(
            probe=Readout("linear", tuple(probe["layers"]), weight, float(probe["bias"])),
            stretch=stretch,
            turn=turn,
            end=end,
            threshold=float(record["threshold"]),
            bound=Bound(**record["bound"]) if record["bound"] else None,
            size=record["size"],
            over=record["over"],
            fitted=record["fitted"],
        )

    def rebound(self) -> Windows:
        """See ``Part``."""
        return replace(self, bound=None)

    def notes(self) -> list[str]:
        """See ``Part``."""
        promise = str(self.bound) if self.bound else "not calibrated, so nothing is promised"
        return [
            f"Prompts of more than {self.over} tokens, and chats with earlier turns of the user, "
            f"are read by stretches of {self.size} tokens and at the end of each turn, at layers "
            f"{min(self.probe.layers)} to {max(self.probe.layers)}. Of these: {promise}."
        ]


def stretches(scores: Float[Tensor, "t"], size: int) -> Float[Tensor, "w"]:
    """The mean over each run of ``size`` tokens, or over all if there are fewer; float64."""
    return scores.double().unfold(0, min(size, len(scores)), 1).mean(-1)


def best_stretch(turn: Turn, size: int) -> tuple[float, int, int]:
    """Score, first character and the one after the last of the most harmful stretch."""
    means = stretches(turn.scores, size)
    first = int(means.argmax())
    last = min(first + size, len(turn.scores)) - 1
    return float(means[first]), turn.spans[first][0], turn.spans[last][1]
