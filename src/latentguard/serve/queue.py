"""What waits for the scoring thread: prompts that are scored together, and work done alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt

Work = Callable[[LatentGuard, ChatModel], Any]
"""Something to do on the thread."""


@dataclass(eq=False)
class WorkItem:
    """A prompt that is scored together with others, or work that is done alone."""

    future: asyncio.Future[Any]
    """Who waits."""

    prompt: Prompt | None = None
    """What is scored, or else"""

    work: Work | None = None
    """what is done."""

    size: int = 0
    """About how many tokens."""

    arrived: float = field(default_factory=monotonic)
    """When."""


def settle(pairs: Iterable[tuple[WorkItem, Any]]) -> None:
    """Give each item what was found, on the event loop; an exception is raised there."""
    for item, found in pairs:
        if item.future.done():  # given up meanwhile
            continue
        if isinstance(found, Exception):
            item.future.set_exception(found)
        else:
            item.future.set_result(found)


def estimated_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt has: a quarter of its bytes, and some for the template."""
    texts = [prompt.text, *(turn.content for turn in prompt.history)]
    return sum(8 + len(text.encode("utf-8", "replace")) // 4 for text in texts) + 24
