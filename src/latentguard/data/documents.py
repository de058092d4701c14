"""Long harmless texts around a request: memos, e-mails, logs and others, made from a seed.

Chunked reading takes its norms and its threshold from such texts.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from importlib.resources import files
from typing import Any

LINES_AROUND = 2
"""Lines of the same genre before and after the request."""


def build_document(request: str, characters: int, *, seed: str) -> str:
    """Return a request inside about ``characters`` characters of text; same seed, same text."""
    before = random.Random(seed).randrange(characters)
    head = build_filler(before, seed=f"{seed} head")
    tail = build_filler(characters - before, seed=f"{seed} tail")
    return f"{head}\n\n{_with_lines_around(request, seed)}\n\n{tail}"


def build_filler(characters: int, *, seed: str) -> str:
    """Return at least ``characters`` characters of lines, one genre after the other."""
    rng = random.Random(seed)
    text = ""
    while len(text) < characters:
        genre = rng.choice(sorted(_phrases()["genres"]))
        lines = (_random_line(genre, "lines", rng) for _ in range(rng.randint(1, 8)))
        text += "\n".join(lines) + "\n\n"
    return text.rstrip()


def _with_lines_around(request: str, seed: str) -> str:
    """Return the request as one line of a text of some genre."""
    rng = random.Random(seed)
    genre = rng.choice(sorted(_phrases()["genres"]))
    lines = [_random_line(genre, "lines", rng) for _ in range(2 * LINES_AROUND)]
    left, right = _random_line(genre, "holders", rng).split("{}")
    return "\n".join([*lines[:LINES_AROUND], left + request + right, *lines[LINES_AROUND:]])


@cache
def _phrases() -> dict[str, Any]:
    text = files(__package__).joinpath("frames.json").read_text(encoding="utf-8")
    phrases: dict[str, Any] = json.loads(text)
    return phrases


def _random_line(genre: str, kind: str, rng: random.Random) -> str:
    phrases = _phrases()
    line = str(rng.choice(phrases["genres"][genre][kind]))
    return re.sub(r"\{(\w+)\}", lambda word: str(rng.choice(phrases["words"][word[1]])), line)
