"""Long texts around a request: memo, e-mail, log, ... whose lines are drawn with a seed.

What long prompts look like where nothing is wrong: windows take their norms and their threshold
from such texts.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from importlib.resources import files
from typing import Any

AROUND = 2
"""Lines of one kind on either side of the request."""


def document(request: str, characters: int, *, seed: str) -> str:
    """A request somewhere in about so many characters of mixed text; equal seeds, equal texts."""
    before = random.Random(seed).randrange(characters)
    head, tail = (
        filler(before, seed=f"{seed} head"),
        filler(characters - before, seed=f"{seed} tail"),
    )
    return f"{head}\n\n{_framed(request, seed)}\n\n{tail}"


def _framed(request: str, seed: str) -> str:
    """The request as one line of a text of some kind."""
    draw = random.Random(seed)
    genre = draw.choice(sorted(_bank()["genres"]))
    lines = [_line(genre, "lines", draw) for _ in range(2 * AROUND)]
    left, right = _line(genre, "holders", draw).split("{}")
    return "\n".join([*lines[:AROUND], left + request + right, *lines[AROUND:]])


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
