"""Long texts around a request: frames (memo, e-mail, log, ...) whose lines are drawn with a seed.

Filler of this kind is what the windowed reading learns from: the harmful and the harmless member
of a pair stand at the same place of the same text, so that the text gives nothing away.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Framed:
    """A text with a request in it."""

    text: str
    """The whole."""

    start: int
    """Where the request starts in it."""

    stop: int
    """Where it stops."""


def framed(request: str, *, before: int, after: int, seed: str) -> Framed:
    """A request with so many lines before and after it; equal seeds draw equal lines."""
    draw = random.Random(seed)
    genre = draw.choice(sorted(_bank()["genres"]))
    lines = [_line(genre, "lines", draw) for _ in range(before + after)]
    left, right = _line(genre, "holders", draw).split("{}")
    head = "".join(f"{line}\n" for line in lines[:before]) + left
    tail = right + "".join(f"\n{line}" for line in lines[before:])
    return Framed(head + request + tail, len(head), len(head) + len(request))


def document(request: str, characters: int, *, seed: str) -> Framed:
    """A request somewhere in about so many characters of mixed text."""
    before = random.Random(seed).randrange(characters)
    parts = [filler(before, seed=f"{seed} head"), filler(characters - before, seed=f"{seed} tail")]
    middle = framed(request, before=2, after=2, seed=seed)
    start = len(parts[0]) + 2 + middle.start
    text = f"{parts[0]}\n\n{middle.text}\n\n{parts[1]}"
    return Framed(text, start, start + len(request))


def filler(characters: int, *, seed: str) -> str:
    """At least so many characters of lines, one kind of text after the other."""
    draw, text = random.Random(seed), ""
    while len(text) < characters:
        genre = draw.choice(sorted(_bank()["genres"]))
        lines = (_line(genre, "lines", draw) for _ in range(draw.randint(1, 8)))
        text += "\n".join(lines) + "\n\n"
    return text.rstrip()


@cache
def _bank() -> dict[str, Any]:
    text = files(__package__).joinpath("frames.json").read_text(encoding="utf-8")
    bank: dict[str, Any] = json.loads(text)
    return bank


def _line(genre: str, kind: str, draw: random.Random) -> str:
    bank = _bank()
    line = str(draw.choice(bank["genres"][genre][kind]))
    return re.sub(r"\{(\w+)\}", lambda word: str(draw.choice(bank["words"][word[1]])), line)
