"""Harmless documents and chats, made of built-in prompts: what long input is calibrated on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from latentguard.data.builtin import Split, load_guard_prompts
from latentguard.data.documents import build_document, build_filler
from latentguard.guard.chunking import LONGER_THAN
from latentguard.prompts import Message, Prompt

CALIBRATION_TEXTS = 100
"""Documents, and as many chats, that the threshold of long input is taken from."""

LONGEST = 3600
"""Characters of the longest document, about; at least twice those of the shortest."""


def harmless_texts(split: Split, count: int, shortest: int = LONGER_THAN) -> list[Prompt]:
    """So many documents from ``shortest`` characters to about ``LONGEST``, and as many chats.

    Half of the documents are lines of one kind after the other with a request among them
    (``frames``), half are harmless prompts of all kinds as paragraphs.
    """
    requests = [p.text for p in load_guard_prompts(split) if not p.harmful]
    draw = random.Random(f"{split} texts")
    texts = list[Prompt]()
    ratio = max(LONGEST / shortest, 2)
    for number in range(count):
        size = round(shortest * ratio ** draw.random())
        seed = f"{split} {number}"
        text = build_document(draw.choice(requests), size, seed=seed) if number % 2 else ""
        text = text or _paragraphs(requests, size, draw)
        texts.append(Prompt(text, id=f"{split}-document-{number}", harmful=False))
        turns = draw.sample(requests, draw.randint(2, 6))
        texts.append(_chat(turns, f"{split}-chat-{number}"))
    return texts


def _paragraphs(requests: Sequence[str], size: int, draw: random.Random) -> str:
    text = ""
    while len(text) < size:
        text += draw.choice(requests) + draw.choice(("\n", "\n\n", " "))
    return text.strip()


def _chat(requests: Sequence[str], name: str) -> Prompt:
    """A chat of such requests, with replies that say nothing in particular."""
    history = [
        message
        for turn, text in enumerate(requests[:-1])
        for message in (
            Message("user", text),
            Message("assistant", build_filler(60, seed=f"{name} {turn}")),
        )
    ]
    return Prompt(requests[-1], name, False, history=tuple(history))
