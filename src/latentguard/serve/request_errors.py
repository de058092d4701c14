"""Requests that do not validate, in words: which field, and what it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

EXPECTED = {
    "string_type": "text",
    "list_type": "a list",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "string_too_short": "text that is not empty",
}
"""Pydantic's kind of error -> what the field should be."""

LIMITED = {
    "greater_than": ("gt", "more than {}"),
    "greater_than_equal": ("ge", "{} or more"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "{} or less"),
    "too_short": ("min_length", "a list of {} or more"),
    "too_long": ("max_length", "a list of at most {}"),
    "literal_error": ("expected", "{}"),
}
"""Kind of error -> which figure it carries, and what the field should be."""

MOST = 5
"""Errors that are named."""


def describe_errors(errors: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for each field that is wrong, five at most; no value that was sent is quoted."""
    expected: dict[str, list[str]] = {}
    sentences = dict[str, None]()
    for error in errors:
        field = _field(error["loc"])
        kind = error["type"]
        if kind == "missing":
            sentences[f"'{field}' is missing."] = None
        elif kind == "extra_forbidden":
            sentences[f"'{field}' is no field of this request; leave it out."] = None
        else:
            words = expected.setdefault(field, [])
            words += [word for word in [_expected(error)] if word not in words]
    for field, words in expected.items():
        if field:
            sentences[f"'{field}' should be {' or '.join(words)}."] = None
        else:
            sentences["The body should be a JSON object, sent as application/json."] = None
    return " ".join(list(sentences)[:MOST])


def _field(place: Sequence[str | int]) -> str:
    """The field's path, without the names that Pydantic gives to the members of a union.

    FastAPI says ``body`` before it.
    """
    steps = list[str]()
    for step in place[1:] if place[:1] == ("body",) else place:
        if isinstance(step, str) and (step in ("str", "constrained-str") or "[" in step):
            continue
        steps.append(str(step)[:40])
    return ".".join(steps)


def _expected(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind in LIMITED:
        figure, words = LIMITED[kind]
        return words.format(error["ctx"][figure])
    return EXPECTED.get(kind, "of another kind")
