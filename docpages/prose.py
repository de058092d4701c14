"""Sentences of a page, to count their words."""

from __future__ import annotations

import re

NOT_PROSE = (
    re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE),  # code
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"^ *\|.*$", re.MULTILINE),  # tables
    re.compile(r"^#+ .*$", re.MULTILINE),  # headings
    re.compile(r"<[^>]+>"),
)
IMAGE = re.compile(r"!\[(.*?)\]\([^)]*\)", re.DOTALL)
LINK = re.compile(r"\[(.*?)\]\([^)]*\)", re.DOTALL)
ITEM = re.compile(r"^\s*(?:[-*]|\d+\.) ", re.MULTILINE)
END = re.compile(r"(?<=[.!?:;])[*_`)\"]*\s+(?=[A-Z`\"*\[(])|\n\s*\n")
WORD = re.compile(r"[A-Za-z0-9][\w'-]*")


def sentences(text: str) -> list[str]:
    """The sentences of a page in Markdown, without code, tables and headings."""
    for pattern in NOT_PROSE:
        text = pattern.sub("\n\n", text)
    text = IMAGE.sub(r"\1\n\n", text)
    text = LINK.sub(r"\1", text)
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = ITEM.sub("\n\n", text)
    return [" ".join(part.split()) for part in END.split(text) if part.strip()]


def count_words(sentence: str) -> int:
    """Words of a sentence; a code span is one."""
    return len(WORD.findall(sentence))
