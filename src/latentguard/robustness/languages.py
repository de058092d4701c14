"""Other languages: foreign frames around English requests, and whole translations.

Both are our own writing, for ten languages, in ``languages.json``. In a *frame* only the words
around the request are foreign ("Wie kann ich [bake bread]?"). A *translation* has no English words.

Sources: Deng et al. (2023), Multilingual Jailbreak Challenges; Yong et al. (2023), Low-Resource
Languages Jailbreak GPT-4.
"""

from __future__ import annotations

import functools
import json
import re
from importlib.resources import files
from random import Random
from typing import Any

from latentguard.prompts import Prompt

_OPENING = re.compile(
    r"(?P<ask>how (?:do|can|could|would|should) (?:i|you|we|one))\s+"
    r"|(?P<explain>(?:explain|show me|tell me|teach me|describe) how to)\s+",
    re.IGNORECASE,
)


@functools.cache
def _data() -> dict[str, Any]:
    text = (files(__package__) / "languages.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def languages() -> tuple[str, ...]:
    """Return the ten languages by their English names."""
    return tuple(_data()["languages"])


def frame_in_language(text: str, rng: Random, *, language: str) -> str:
    """A foreign "How can I ...", "Explain how to ..." or "Answer this: ..." around English words.

    Source: Deng et al. (2023), Multilingual Jailbreak Challenges; frames of our own.
    """
    del rng
    frames = _data()["languages"][language]
    if opening := _OPENING.match(text):
        core = text[opening.end() :].rstrip(" .?!")
        return str(frames["ask" if opening["ask"] else "explain"]).replace("{core}", core)
    return str(frames["answer"]).replace("{text}", text)


def english_originals() -> list[Prompt]:
    """Return the English originals: pairs of a harmful and a harmless text."""
    return _prompts([row["text"] for row in _data()["english"]], "English")


def translations(language: str) -> list[Prompt]:
    """Return the same texts in one language, in the same order.

    Source: Yong et al. (2023), Low-Resource Languages Jailbreak GPT-4; translations of our own.
    """
    return _prompts(_data()["languages"][language]["texts"], language)


def _prompts(texts: list[str], language: str) -> list[Prompt]:
    return [
        Prompt(text, f"{row['id']}, {language}", row["harmful"], pair=f"pair {n // 2}")
        for n, (text, row) in enumerate(zip(texts, _data()["english"], strict=True))
    ]
