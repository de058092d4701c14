"""The texts of ``long_input.py``: requests somewhere in other people's texts, and in chats.

The texts around the requests are not those of training: Python's own language reference, and the
harmless posts of the OpenAI moderation set. Both members of a pair stand at the same place of the
same text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics

import numpy as np

from latentguard.prompts import Message, Prompt, read_prompts

FILLERS, KINDS = 4, ("forum posts", "language reference")
"""Texts around the requests, of either kind in turn."""

TURNS = 5
"""Of the user in a chat."""

CHARACTERS = 4.0
"""A token's, about."""

PLACES = {
    "start": (0.0, "\n\n"),
    "middle": (0.5, "\n\n"),
    "end": (1.0, "\n\n"),
    "middle, between two words": (0.5, " "),
}
"""Where a request stands, as a share of the text, and what parts it from the rest."""


@dataclass(frozen=True)
class Asked:
    """One request in one text."""

    cell: str
    key: str
    prompt: Prompt
    message: int
    start: int
    stop: int
    around: str = ""


def requests(folder: Path) -> list[tuple[Prompt, Prompt]]:
    """A harmful and a harmless request of the same set: JBB's pairs, XSTest's by kind."""
    draw = random.Random(0)
    pairs = []
    jbb = read_prompts(folder / "jbb.jsonl")
    sides = [[p for p in jbb if p.harmful is side] for side in (True, False)]
    pairs += list(zip(*sides, strict=True))
    xstest = read_prompts(folder / "xstest.jsonl")
    harmful = draw.sample([p for p in xstest if p.harmful], 100)
    harmless = draw.sample([p for p in xstest if not p.harmful], 100)
    pairs += list(zip(harmful, harmless, strict=True))
    draw.shuffle(pairs)
    return pairs


def fillers(folder: Path, most: int) -> list[str]:
    """Texts of at least ``most`` tokens."""
    manual = [text.strip() for text in topics.topics.values()]
    posts = [p.text for p in read_prompts(folder / "openai_moderation.jsonl") if not p.harmful]
    texts = []
    for number in range(FILLERS):
        draw = random.Random(number)
        parts = draw.sample(*((manual, len(manual)) if number % 2 else (posts, len(posts))))
        text = "\n\n".join(parts)[: 8 * most]
        texts.append(text)
    return texts


def documents(
    text_id: int, text: str, needles: list[tuple[Prompt, Prompt]], counts: dict[int, int]
) -> Iterator[Asked]:
    """Requests at each place of this text."""
    ends = cuts(text)
    own = needles[text_id::FILLERS]
    for length, count in counts.items():
        for pair in own[: -(-count // FILLERS)]:
            for place in PLACES:
                for request in pair:
                    yield document(text, ends, request, length, place, text_id)


def cuts(text: str) -> list[int]:
    """Where a text may be cut: after each blank."""
    return [n + 1 for n, letter in enumerate(text) if letter.isspace()]


def document(
    text: str, ends: list[int], request: Prompt, length: int, place: str, text_id: int
) -> Asked:
    """A text of about so many tokens with a request at a place, mostly as its own paragraph."""
    size = round(length * CHARACTERS)
    at, gap = PLACES[place]
    at = round(at * size)
    cut, stop = (ends[int(np.searchsorted(ends, n))] if n else 0 for n in (at, size))
    head = f"{text[:cut].rstrip()}{gap}" if cut else ""
    whole = f"{head}{request.text}{gap}{text[cut:stop]}".strip()
    prompt = replace(request, text=whole)
    key = f"{place} {length} {request.id} {text_id}"
    stop = len(head) + len(request.text)
    around = KINDS[text_id % len(KINDS)]
    return Asked(f"{place} {length}", key, prompt, 0, len(head), stop, around)


def chats(needles: list[tuple[Prompt, Prompt]], folder: Path) -> Iterator[Asked]:
    """Chats of several turns in which one is the request."""
    ordinary = [p.text for p in read_prompts(folder / "alpaca_harmless.jsonl")]
    for number, pair in enumerate(needles):
        draw = random.Random(number)
        others, replies = draw.sample(ordinary, TURNS - 1), draw.sample(ordinary, TURNS)
        for place in (0, TURNS // 2, TURNS - 1):
            for request in pair:
                said = [*others[:place], request.text, *others[place:]]
                history = [
                    m
                    for text, reply in zip(said[:-1], replies, strict=False)
                    for m in (Message("user", text), Message("assistant", f"Sure. {reply}"))
                ]
                prompt = replace(request, text=said[-1], history=tuple(history))
                cell = f"turn {place + 1} of {TURNS}"
                yield Asked(cell, f"{cell} {request.id}", prompt, 2 * place, 0, len(request.text))
