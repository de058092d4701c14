"""Limits of a JSON body, checked before anything validates it value by value."""

from __future__ import annotations

import json
from typing import Any

from latentguard.serve.errors import BadRequest
from latentguard.serve.json_texts import JSON_BEGINS

MAX_DEPTH = 64
"""Levels of a body."""


def require_small_json(body: bytes, max_elements: int) -> Any:
    """What a body holds, once its values and levels are counted.

    Raises:
        BadRequest: if there are too many, or it is no JSON.
    """
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(f"The body is not JSON that can be read: {error.msg} ({place}).") from None
    except (ValueError, RecursionError):
        raise BadRequest("The body is not JSON that can be read.") from None
    level = [value]
    count = 0
    for _ in range(MAX_DEPTH):
        count += len(level) + sum(_inner_count(one) for one in level if isinstance(one, str))
        if count > max_elements:
            raise BadRequest(f"The body holds more than {max_elements:,} values.")
        level = [inner for one in level for inner in _inner(one)]
        if not level:
            return value
    raise BadRequest(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _inner_count(text: str) -> int:
    """About how many values a string holds, if it is JSON: arguments of calls are parsed, too."""
    return text.count(",") if text.lstrip()[:1] in JSON_BEGINS else 0


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
