"""Texts of an upstream's reply: every string that a client may be shown, whatever field it is in.

Fields are not listed by what holds text, but by what holds none: a new field is read from the day
on which an upstream sends it. Where that may not do, the reply is refused, flagged or not:

- a part, an item or a call of an unknown type, whose strings may be no plain text;
- images and sound, which the guard cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from latentguard.serve.messages import READ_FIELDS

LABEL_FIELDS = frozenset(
    "type id item_id call_id container_id response_id status role phase name namespace model "
    "object format index finish_reason native_finish_reason stop_reason matched_stop "
    "service_tier".split()
)
"""Fields that hold one word; more than that is read."""

LABEL = re.compile(r"[\w.:@/+=|-]{0,256}")

OPAQUE_FIELDS = frozenset(
    "encrypted_content obfuscation signature thought_signature redacted_thinking".split()
)
"""Fields that hold letters by chance; more than one word is read."""

OPAQUE = re.compile(r"\S*")

UNSHOWN_FIELDS = frozenset(
    "logprobs top_logprobs latentguard content_filter_results content_filter_offsets usage".split()
)
"""Fields about a text that is read elsewhere."""

MEDIA_FIELDS = frozenset(
    "audio b64_json image image_b64 image_url images partial_image_b64 file_data video".split()
)
"""Fields that hold no text, and are shown."""

TYPED_FIELDS = frozenset(
    "output content summary item part tool_calls reasoning_details thinking_blocks".split()
)
"""Fields that hold parts, items or calls, each with its type."""

READ_TYPES = frozenset(
    "text input_text output_text refusal reasoning reasoning_text summary_text thinking "
    "redacted_thinking reasoning.text reasoning.summary reasoning.encrypted "
    "message function custom function_call custom_tool_call function_call_output "
    "custom_tool_call_output file_search_call web_search_call computer_call computer_call_output "
    "code_interpreter_call local_shell_call local_shell_call_output shell_call shell_call_output "
    "apply_patch_call apply_patch_call_output mcp_call mcp_list_tools mcp_approval_request "
    "mcp_approval_response tool_search_call tool_search_output compaction".split()
)
"""Types of parts, items and calls whose strings are plain text."""


def choice_text(choice: Mapping[str, Any]) -> str:
    """All text of a choice: its message or delta, and whatever stands beside it.

    Raises:
        AttributeError: if it is of another shape than OpenAI's.
    """
    texts = list[str]()
    for name in ("message", "delta"):
        message = choice.get(name) or {}
        for call in message.get("tool_calls") or ():
            call.get("type")
        first = {field: message[field] for field in (*READ_FIELDS, "content") if field in message}
        texts += shown_strings(first)
        texts += shown_strings({k: v for k, v in message.items() if k not in first})
    rest = {k: v for k, v in choice.items() if k not in ("message", "delta")}
    return "".join([*texts, *shown_strings(rest)])


def shown_strings(value: Any) -> Iterator[str]:
    """The strings of a reply, an item or an event that a client may be shown, in their order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from shown_strings(inner)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if not (_is_unshown(name, inner) or name in MEDIA_FIELDS):
                yield from shown_strings(inner)


def unreadable_kinds(value: Any, *, is_typed: bool = False) -> Iterator[str]:
    """Names of what in a reply may be no plain text, though a client is shown it.

    Args:
        value: JSON.
        is_typed: Whether an object in it has the type of a part, an item or a call.
    """
    if isinstance(value, list):
        for inner in value:
            yield from unreadable_kinds(inner, is_typed=is_typed)
    elif isinstance(value, Mapping):
        kind = value.get("type")
        if is_typed and kind is not None and kind not in READ_TYPES and any(shown_strings(value)):
            yield str(kind)[:40]
        for name, inner in value.items():
            if name in MEDIA_FIELDS and inner:
                yield name
            elif not _is_unshown(name, inner):
                yield from unreadable_kinds(inner, is_typed=name in TYPED_FIELDS)


def _is_unshown(name: str, value: Any) -> bool:
    """Whether a field holds nothing to read."""
    is_label = name in LABEL_FIELDS and _is(LABEL, value)
    is_opaque = name in OPAQUE_FIELDS and _is(OPAQUE, value)
    return name in UNSHOWN_FIELDS or is_label or is_opaque


def _is(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
