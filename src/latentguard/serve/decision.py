"""Where a chat is blocked: what the policy makes of a verdict, or of the lack of one."""

from __future__ import annotations

from typing import Literal

from latentguard.serve.config import ServeConfig
from latentguard.serve.errors import ApiError, ClientDisconnected
from latentguard.serve.scoring import ScoredPrompt

Action = Literal[
    "score", "pass", "review", "block", "annotate", "shadow", "error", "unjudged", "left", "unread"
]
"""What was done: the verdict told; a chat answered; answered, though it is to be reviewed; what the
policy says of a flagged one; no verdict, so refused; no verdict, and answered all the same; no
verdict, as the client left before; answered, as nothing in it is of a source that is read."""


def choose_action(config: ServeConfig, scored: ScoredPrompt) -> Action:
    """What the policy makes of a chat."""
    if scored.verdict.flagged:
        return config.policy
    if scored.verdict.decision == "review":
        return "block" if config.on_review == "block" else "review"
    return "pass"


def is_blocked(config: ServeConfig, scored: ScoredPrompt) -> bool:
    """Whether the policy refuses a chat."""
    return choose_action(config, scored) == "block"


def answers_without_verdict(config: ServeConfig, error: ApiError) -> bool:
    """Whether a chat is answered though it could not be judged: by a shadow only.

    A client can bring about every lack of a verdict, be it by making the service slow.
    """
    return config.policy == "shadow" and not isinstance(error, ClientDisconnected)
