"""Fitting the probe of replies: labelled replies -> scores of tokens.

Its rows are mean states over windows of ``WINDOW`` tokens, each with the label of its reply,
because a running score is the mean of such a window. The score is linear, so the mean score of
tokens is the score of their mean state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from latentguard import __version__
from latentguard.errors import GuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.probabilities import fit_platt
from latentguard.guard.replies import WINDOW, ReplyProbe, reply_digest
from latentguard.models.chat_model import ChatModel
from latentguard.models.reply_reading import ReplyBackend, ReplyWindows, capture_reply_windows
from latentguard.probes.probe import Fit, fit_linear, layers_of, require_both_classes
from latentguard.prompts import Reply
from latentguard.states import Progress
from latentguard.stats.bounds import require_enough_harmless

MAX_WINDOWS = 4
"""Windows of a reply that a probe is fitted on at most, from its first token on."""


MAX_REPLIES = 1500
"""Replies that a probe is fitted on at most: memory grows with the square of their number."""

SEED = 0
"""Of the draw where there are more."""


def draw_training_replies(replies: Sequence[Reply]) -> list[Reply]:
    """The replies, or ``MAX_REPLIES`` of them, drawn with a fixed seed, in their order."""
    if len(replies) <= MAX_REPLIES:
        return list(replies)
    rows = np.random.default_rng(SEED).permutation(len(replies))[:MAX_REPLIES]
    return [replies[row] for row in sorted(rows)]


def fit_replies(
    model: ChatModel,
    guard: LatentGuard,
    replies: Sequence[Reply],
    *,
    progress: Progress | None = None,
) -> LatentGuard:
    """The same guard, which also judges replies (``fit_reply_probe``).

    Raises:
        ModelMismatch: if the model is not the guard's own.
    """
    guard.require_match(model.fingerprint)
    return replace(guard, replies=fit_reply_probe(model, replies, progress=progress))


def calibrate_replies(
    model: ReplyBackend,
    guard: LatentGuard,
    replies: Sequence[Reply],
    *,
    max_fpr: float = 0.01,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> LatentGuard:
    """The same guard with a threshold for replies that keeps a false-positive rate per reply.

    Args:
        model: The guard's model.
        guard: The guard.
        replies: Harmless ones, like those to come; those labelled harmful are left out.
        max_fpr: Rate at which harmless replies may be flagged, at any of their tokens.
        confidence: Of each Clopper-Pearson bound.
        progress: Called with 1 after each reply.

    Raises:
        GuardError: if there are too few replies for the rate, the guard was fitted on them, or it
            does not judge replies.
    """
    judge = guard.require_reply_probe()
    harmless = [reply for reply in replies if not reply.harmful]
    require_enough_harmless(len(harmless), max_fpr, confidence)
    judge.require_unseen(harmless)
    verdicts = list(guard.scan_replies(model, harmless, progress=progress))
    calibrated = judge.calibrate(verdicts, max_fpr=max_fpr, confidence=confidence)
    return replace(guard, replies=calibrated)


def fit_reply_probe(
    model: ChatModel, replies: Sequence[Reply], *, progress: Progress | None = None
) -> ReplyProbe:
    """Fit the probe of replies.

    Args:
        model: The guard's model.
        replies: Labelled harmful or harmless.
        progress: Called with the number of replies just read.

    Raises:
        GuardError: if a reply has no label, a class has too few, or a state is not finite.
    """
    labels = require_reply_labels(replies)
    layers = layers_of("linear", model.depth)
    captured = capture_reply_windows(
        model, replies, layers, size=WINDOW, count=MAX_WINDOWS, progress=progress
    )
    if not torch.isfinite(captured.means).all():
        raise GuardError(
            "States of replies hold infinite or undefined numbers; use bfloat16 or float32 instead "
            "of float16."
        )
    groups = [reply.prompt.fold_group for reply in replies]
    owners = captured.owners
    fit = fit_linear(
        captured.means,
        [labels[owner] for owner in owners],
        [groups[owner] for owner in owners],
        layers,
    )
    held_out = _highest_running(fit.held_out, captured, len(replies))
    return ReplyProbe(
        probe=fit.probe,
        platt=fit_platt(held_out, np.array(labels)),
        spread=float(held_out.std()),
        fitted=_provenance(replies, labels, fit),
        training_digests=tuple(map(reply_digest, replies)),
    )


def require_reply_labels(replies: Sequence[Reply]) -> list[bool]:
    """The label of each reply.

    Raises:
        GuardError: if one has none, or a class has too few.
    """
    missing = [reply.prompt.id for reply in replies if reply.harmful is None]
    if missing:
        raise GuardError(
            f"{len(missing)} training replies have no label (the first is '{missing[0]}'); "
            "expected harmful or harmless for each."
        )
    labels = [bool(reply.harmful) for reply in replies]
    require_both_classes(labels, "linear")
    return labels


def _highest_running(
    scores: Float[NDArray[np.float64], "w"], captured: ReplyWindows, count: int
) -> Float[NDArray[np.float64], "n"]:
    """The highest of the running scores of each reply at the ends of its windows."""
    running = scores * np.array(captured.sizes) / WINDOW
    highest = np.full(count, -np.inf)
    np.maximum.at(highest, np.array(captured.owners), running)
    return highest


def _provenance(replies: Sequence[Reply], labels: Sequence[bool], fit: Fit) -> dict[str, Any]:
    digest = sha256(json.dumps([reply_digest(reply) for reply in replies]).encode())
    return {
        "harmful": sum(labels),
        "harmless": len(labels) - sum(labels),
        "data_sha256": digest.hexdigest(),
        "sources": sorted({r.prompt.source for r in replies if r.prompt.source}),
        **fit.choices,
        "versions": {"latentguard": __version__, "torch": torch.__version__},
    }
