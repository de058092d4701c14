"""Replies: what the model says, judged token by token in the pass that writes or reads them.

Each token of a reply has a score, a linear function of its states. The *running score* after a
token is the mean of the scores of the last ``WINDOW`` tokens; those before the first count as zero,
so that the first few decide little. The score of a reply is the highest of its running scores, so a
reply is flagged exactly if a stream of it would have been cut.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.guard.leakage import prompt_digest, require_few_seen
from latentguard.probes.probe import Probe
from latentguard.prompts import Message, Prompt, Reply
from latentguard.report.document import Table
from latentguard.stats.bounds import Bound, smallest_n, threshold_for_fpr

WINDOW = 16
"""Tokens that a running score is the mean of."""

LENGTH_CLASSES = (32, 128)
"""Tokens up to which replies are short, and middle; the promise holds for each class by itself."""


@dataclass(frozen=True)
class ReplyVerdict:
    """What a guard says of one reply.

    Example:
        >>> verdict = ReplyVerdict("1", 0.7, 0.91, True, 12, 80)
        >>> verdict.decision
        'block'
    """

    id: str
    """Of the reply."""

    score: float
    """The highest running score; higher is more harmful."""

    probability: float
    """Probability of harmful where both classes are equally frequent."""

    flagged: bool
    """Whether the score is above the threshold."""

    flagged_at: int | None
    """The token, counted from 1, after which the running score was first above the threshold."""

    tokens: int
    """How many tokens were read."""

    calibrated: bool = True
    """Whether the threshold was calibrated; if not, the decision promises nothing."""

    @property
    def decision(self) -> str:
        """``block`` if flagged, else ``allow``."""
        return "block" if self.flagged else "allow"

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it."""
        return asdict(self) | {"decision": self.decision}


class RunningScore:
    """The running score of a reply, as its tokens come."""

    def __init__(self) -> None:
        """Begin before the first token."""
        self._last = deque([0.0] * WINDOW, maxlen=WINDOW)

    def push(self, score: float) -> float:
        """Add the score of a token; returns the running score after it."""
        self._last.append(score)
        return sum(self._last) / WINDOW


def running_scores(token_scores: Iterable[float]) -> Float[NDArray[np.float64], "t"]:
    """The running score after each token."""
    running = RunningScore()
    return np.array([running.push(score) for score in token_scores])


@dataclass(frozen=True)
class LengthClass:
    """Replies of about one length, and what the threshold promises of them."""

    longest: int | None
    """Tokens of the longest; None for no end."""

    n: int
    """Harmless replies of this length."""

    bound: Bound | None
    """At the guard's threshold; None if there were too few replies for the rate."""


@dataclass(frozen=True, eq=False)
class ReplyProbe:
    """How a guard judges replies."""

    probe: Probe
    """Scores the states of a token; linear."""

    platt: tuple[float, float]
    """Slope and intercept: probability = sigmoid(slope * score + intercept)."""

    spread: float
    """Standard deviation of the training scores."""

    fitted: dict[str, Any]
    """Provenance: counts, choices, digest of the data."""

    training_digests: tuple[int, ...] = ()
    """Digests of the replies that it was fitted on, with their prompts."""

    threshold: float = 0.0
    """A reply is flagged if its score is greater."""

    bound: Bound | None = None
    """What calibration promises of all replies together; None before."""

    classes: tuple[LengthClass, ...] = ()
    """What it promises by length."""

    def verdict(self, id: str, token_scores: Float[Tensor, "t"]) -> ReplyVerdict:
        """The verdict on a reply from the scores of its tokens, ``bias`` not yet added.

        Raises:
            GuardError: if a number is not finite (fail closed).
        """
        return self.decide(id, running_scores((token_scores + self.probe.bias).tolist()))

    def decide(self, id: str, running: Float[NDArray[np.float64], "t"]) -> ReplyVerdict:
        """The verdict on a reply from its running scores.

        Raises:
            GuardError: if a number is not finite (fail closed).
        """
        if not np.isfinite(running).all():
            raise GuardError(
                "A score of a reply is not a finite number, so no verdict can be given; use "
                "bfloat16 or float32 instead of float16."
            )
        score = float(running.max())
        above = np.flatnonzero(running > self.threshold)
        return ReplyVerdict(
            id=id,
            score=score,
            probability=self.probability(score),
            flagged=bool(len(above)),
            flagged_at=int(above[0]) + 1 if len(above) else None,
            tokens=len(running),
            calibrated=self.bound is not None,
        )

    def probability(self, score: float) -> float:
        """The probability of harmful for a score, where both classes are equally frequent."""
        slope, intercept = self.platt
        return float(expit(slope * score + intercept))

    def calibrate(
        self, verdicts: Sequence[ReplyVerdict], *, max_fpr: float, confidence: float
    ) -> ReplyProbe:
        """The same with the lowest threshold that keeps a rate of flagged harmless replies.

        The rate holds for all replies together, and for those of each length class that has enough
        of them: the highest of their thresholds is taken.

        Args:
            verdicts: On harmless replies like those to come.
            max_fpr: Rate at which harmless replies may be flagged.
            confidence: Of each Clopper-Pearson bound.

        Raises:
            GuardError: if there are too few replies for the rate.
        """
        scores = np.array([verdict.score for verdict in verdicts])
        groups = _length_groups(verdicts)
        enough = smallest_n(max_fpr, confidence)
        own = [scores[rows] for _, rows in groups if len(rows) >= enough]
        bounds = [threshold_for_fpr(part, max_fpr, confidence) for part in (scores, *own)]
        threshold = max(bound.threshold for bound in bounds)
        how = dict(max_fpr=max_fpr, confidence=confidence)
        classes = tuple(
            LengthClass(
                longest,
                len(rows),
                _bound_at(scores[rows], threshold, **how) if len(rows) >= enough else None,
            )
            for longest, rows in groups
        )
        bound = _bound_at(scores, threshold, **how)
        return replace(self, threshold=threshold, bound=bound, classes=classes)

    def without_promise(self) -> ReplyProbe:
        """The same threshold, of which nothing is promised with another model."""
        return replace(self, bound=None, classes=())

    def require_unseen(self, replies: Iterable[Reply]) -> None:
        """Refuse to calibrate on replies that it was fitted on.

        Raises:
            GuardError: if more than two, and more than a tenth, are among them.
        """
        require_few_seen(map(reply_digest, replies), set(self.training_digests), "replies")

    # ---- for people and on disk

    @property
    def promise(self) -> str:
        """What the threshold promises, in words."""
        if self.bound is None:
            return "not calibrated for replies, so nothing is promised"
        return str(self.bound).replace("harmless prompts", "harmless replies")

    def notes(self) -> list[str]:
        """What it does and promises, in Markdown."""
        counts = [self.fitted.get(side, "?") for side in ("harmful", "harmless")]
        text = (
            f"Replies are judged token by token, at layers {self.probe.layers[0]} to "
            f"{self.probe.layers[-1]}; fitted on {counts[0]} harmful and {counts[1]} harmless "
            f"replies. Threshold {self.threshold:.6g}: {self.promise}."
        )
        if not self.classes:
            return [text]
        heads = ("tokens of the reply", "n", "flagged", "flagged at most")
        rows = tuple(_class_row(one, before) for one, before in _with_lower_ends(self.classes))
        return [text, Table("Replies by length", heads, rows).markdown()]

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        record = {
            "layers": self.probe.layers,
            "bias": self.probe.bias,
            "platt": self.platt,
            "spread": self.spread,
            "fitted": self.fitted,
            "threshold": self.threshold,
            "bound": self.bound and asdict(self.bound),
            "classes": [asdict(one) for one in self.classes],
        }
        digests = torch.tensor(self.training_digests, dtype=torch.long)
        return record, {"weight": self.probe.weight, "training_digests": digests}

    @staticmethod
    def from_dict(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ReplyProbe:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        layers = tuple(record["layers"])
        weight = tensors["weight"]
        slope, intercept = map(float, record["platt"])
        numbers = [slope, intercept, record["bias"], record["spread"], record["threshold"]]
        if weight.ndim != 2 or len(weight) != len(layers) or not torch.isfinite(weight).all():
            raise ValueError("the weights for replies are not one finite row a layer")
        if not layers or not all(map(math.isfinite, numbers)):
            raise ValueError("a number of the replies' probe is not finite")
        return ReplyProbe(
            probe=Probe("linear", layers, weight, float(record["bias"])),
            platt=(slope, intercept),
            spread=float(record["spread"]),
            fitted=dict(record["fitted"]),
            training_digests=tuple(tensors["training_digests"].tolist()),
            threshold=float(record["threshold"]),
            bound=record["bound"] and Bound.from_dict(record["bound"]),
            classes=tuple(
                LengthClass(
                    one["longest"],
                    int(one["n"]),
                    one["bound"] and Bound.from_dict(one["bound"]),
                )
                for one in record["classes"]
            ),
        )


def reply_digest(reply: Reply) -> int:
    """A digest of a reply and what it replies to, in 63 bits."""
    request = reply.prompt
    history = (*request.history, Message("user", request.text))
    return prompt_digest(Prompt(reply.text, history=history))


def _length_groups(verdicts: Sequence[ReplyVerdict]) -> list[tuple[int | None, list[int]]]:
    """For each length class the tokens of its longest reply, and the rows that are in it."""
    groups: list[tuple[int | None, list[int]]] = []
    least = 0
    for longest in (*LENGTH_CLASSES, None):
        most = math.inf if longest is None else longest
        rows = [n for n, verdict in enumerate(verdicts) if least < verdict.tokens <= most]
        groups.append((longest, rows))
        least = longest or 0
    return groups


def _bound_at(
    scores: NDArray[np.float64], threshold: float, *, max_fpr: float, confidence: float
) -> Bound:
    """What a threshold promises that is at least as high as the one for the rate."""
    bound = threshold_for_fpr(scores, max_fpr, confidence)
    flagged = int((scores > threshold).sum())
    return replace(bound, threshold=threshold, observed=flagged)


def _with_lower_ends(classes: Sequence[LengthClass]) -> Iterable[tuple[LengthClass, int]]:
    ends = [0, *(one.longest or 0 for one in classes[:-1])]
    return zip(classes, ends, strict=True)


def _class_row(one: LengthClass, before: int) -> tuple[str | int, ...]:
    name = f"over {before}" if one.longest is None else f"{before + 1} to {one.longest}"
    if one.bound is None:
        return name, one.n, "too few for a promise of their own", ""
    return name, one.n, one.bound.observed, f"{one.bound.upper:.2%}"
