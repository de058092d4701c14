"""Texts in JSON values: what tools, calls and schemas say.

A string of several words is read by itself, and all strings of a value are read together. Single
words say something only beside others: those of all tools, or of all calls of a chat, are read as
one text, so that no request is spelled out a word at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from latentguard.serve.errors import BadRequest

NAME = re.compile(r"[A-Za-z0-9_.:@/-]{1,64}")
"""Names and ids of one word; one that holds several is read."""

PROSE = re.compile(r"\w\W+\w|[\u0e00-\U0010ffff]")
"""More than one word, or a script that sets no blanks between words."""

WORD = re.compile(r"\w+")

LETTERS = re.compile(r"[^\W\d_]{2,}")

APART = re.compile(r"[_.:@/-]+")
"""Between the words of a name."""

CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")

LONG_WORD = 24
"""Characters beyond which a word may be several."""

FEW_WORDS = 3
"""Words from which on a name, or names together, may say something."""

SPELLED = 8
"""Single characters from which on they are also read without blanks between."""

WORDS_AT_ONCE = 200
"""Single words that are read as one text."""

JSON_BEGINS = ("{", "[", '"')
"""How a string begins that is JSON itself."""

ID_FIELDS = ("id", "call_id", "tool_call_id")

DEPTH = 32
"""Levels of a value that is read."""

SCHEMA_WORDS = frozenset(
    "$ref $defs additionalProperties allOf anyOf array arguments auto boolean const custom default "
    "definitions description enum false format function id index input integer items json_object "
    "json_schema max maximum maxItems maxLength min minimum minItems minLength name none null "
    "number object oneOf parameters pattern properties required schema strict string text title "
    "true type".split()
)
"""Words that tools and schemas consist of; alone they say nothing."""


def texts_of(value: Any) -> list[str]:
    """What a JSON value says: each string of several words, and all of its strings together.

    Names of fields count as strings, since a request can be spelled out in them as well; ids and
    the words of JSON Schema do not.

    Raises:
        BadRequest: if it is nested too deeply.
    """
    strings = _spoken_strings(value)
    words = [_plain(text) for text in strings if text.strip()]
    texts = [text for text in [*words, " ".join(words)] if is_text(text)]
    letters = [text for text in strings if len(text) == 1]
    if len(letters) >= SPELLED:
        texts.append("".join(letters))
    return list(dict.fromkeys(texts))


def single_words(value: Any) -> list[str]:
    """The strings of a JSON value that ``texts_of`` does not read by themselves."""
    words = map(_plain, _spoken_strings(value))
    return [word for word in words if WORD.search(word) and not is_text(word)]


def joined_words(words: Iterable[str]) -> list[str]:
    """Single words as texts, if they are enough to say something."""
    chosen = list(words)
    if len(chosen) > WORDS_AT_ONCE:  # names that come again and again
        chosen = list(dict.fromkeys(chosen))
    starts = range(0, len(chosen), WORDS_AT_ONCE)
    texts = [" ".join(chosen[start : start + WORDS_AT_ONCE]) for start in starts]
    return [text for text in texts if _counts(text.split())]


def strings_of(value: Any) -> list[str]:
    """All strings of a JSON value but ids, also those of JSON in a string.

    Raises:
        BadRequest: if it is nested too deeply.
    """
    return list(_strings(value, DEPTH, plain_names=False))


def is_text(word: str) -> bool:
    """Whether a string may say something by itself."""
    return PROSE.search(word) is not None or len(word) > LONG_WORD


def text_of_name(name: str, *, is_id: bool = False) -> str | None:
    """What a name says, blanks between its words; None if that is nothing.

    Args:
        name: One word, as ``NAME`` has it.
        is_id: Whether it may be letters by chance.
    """
    words = APART.sub(" ", name)
    if is_id:
        return words if _counts(words.split()) else None
    words = CAMEL.sub(" ", words)
    return words if _counts(words.split()) or len(name) > LONG_WORD else None


def require_name(field: str, value: Any) -> None:
    """Check that a value is a name of one word.

    Raises:
        BadRequest: if it is not.
    """
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise BadRequest(
            f"'{field}' should be one word of at most 64 letters a to z, digits or ._:@/-"
        )


def _spoken_strings(value: Any) -> list[str]:
    """Strings of a value that are no words of JSON Schema; names of fields with blanks."""
    strings = _strings(value, DEPTH, plain_names=True)
    return [text for text in strings if text not in SCHEMA_WORDS]


def _counts(words: Sequence[str]) -> bool:
    """Whether there are words enough to say something."""
    return sum(LETTERS.fullmatch(word) is not None for word in words) >= FEW_WORDS


def _plain(text: str) -> str:
    """A name of three words or more with blanks between; other texts as they are."""
    words = CAMEL.sub(" ", text.replace("_", " "))
    return words if WORD.fullmatch(text) and _counts(words.split()) else text


def _strings(value: Any, depth: int, *, plain_names: bool) -> Iterator[str]:
    if depth == 0:
        raise BadRequest(f"A field is nested more than {DEPTH} levels deep.")
    inner: list[Any] = []
    if isinstance(value, str):
        yield value
        if value.lstrip()[:1] in JSON_BEGINS:  # the arguments of a call are JSON in a string
            inner = [_parsed(value)]
    elif isinstance(value, Mapping):
        for name, content in value.items():
            yield name.replace("_", " ") if plain_names else name
            if not (name in ID_FIELDS and _is_plain_id(content)):
                yield from _strings(content, depth - 1, plain_names=plain_names)
    elif isinstance(value, list):
        inner = value
    for content in inner:
        yield from _strings(content, depth - 1, plain_names=plain_names)


def _is_plain_id(value: Any) -> bool:
    is_word = isinstance(value, str) and NAME.fullmatch(value) is not None
    return is_word and text_of_name(value, is_id=True) is None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
    except RecursionError:
        raise BadRequest(f"A field is nested more than {DEPTH} levels deep.") from None
