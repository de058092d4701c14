"""A review on this machine: one guard and one model, used by one thread at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from latentguard.errors import GuardError
from latentguard.guard.explanation import Explainer, Explanation
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.own_model import OwnModel
from latentguard.models.chat_model import ChatModel
from latentguard.review.labels import LabelFile
from latentguard.review.routes import Review
from latentguard.review.session import ReviewItem, ReviewItems, ReviewSession
from latentguard.review.teaching import Teacher

PATIENCE = 3.0
"""Seconds that an explanation waits for the model."""


class GuardDesk:
    """A guard with its model, and who may use it now."""

    def __init__(self, guard: LatentGuard, model: ChatModel) -> None:
        """Hold both; the model was verified."""
        self.guard, self.model = replace(guard, own_model=OwnModel(model)), model
        self.lock = Lock()
        self._explainer = Explainer()

    async def explain(self, item: ReviewItem) -> Explanation:
        """What each token of a prompt adds.

        Raises:
            GuardError: if the model is at work for long, as while the guard is taught.
        """
        return await asyncio.to_thread(self._explain, item)

    def _explain(self, item: ReviewItem) -> Explanation:
        if not self.lock.acquire(timeout=PATIENCE):
            raise GuardError("The model is at work; the tokens are shown when it is free again.")
        try:
            return self._explainer.explain(self.guard, self.model, item.prompt, item.verdict)
        finally:
            self.lock.release()


def local_review(
    desk: GuardDesk,
    items: Iterable[ReviewItem],
    labels: LabelFile,
    facts: Mapping[str, Any],
    folder: Path,
) -> Review:
    """A review of prompts that were scored.

    Args:
        desk: Guard and model.
        items: The prompts.
        labels: Where labels go.
        facts: ``name`` of the guard, ``source`` and ``reviewer``, for the page.
        folder: Where the taught guard goes.
    """
    kept = ReviewItems()
    for item in items:
        kept.add(item)
    adapt = partial(desk.guard.adapt, name=labels.path.stem)
    about = dict(facts) | dict(labels=str(labels.path))
    return Review(
        session=ReviewSession(kept, labels),
        explain=desk.explain,
        about=lambda: about,
        teacher=Teacher(adapt, folder, desk.lock),
    )
