"""Parameters of a chat request: those that an upstream is sent, and the texts in them.

Whatever a model could take for words is read by the guard or refused. Everything else is checked to
be what its name says: a number, a switch, one word, or a label that no model is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from latentguard.serve.config import ToolPolicy
from latentguard.serve.errors import BadRequest
from latentguard.serve.json_texts import NAME, joined_words, single_words, strings_of, texts_of

NUMBERS = frozenset(
    "best_of frequency_penalty length_penalty logprobs max_completion_tokens max_tokens min_p "
    "min_tokens n presence_penalty prompt_logprobs repetition_penalty seed temperature top_k "
    "top_logprobs top_p typical_p".split()
)
"""Numbers, or switches; ``logprobs`` is either."""

SWITCHES = frozenset(
    "ignore_eos include_stop_str_in_output logprobs parallel_tool_calls skip_special_tokens "
    "spaces_between_special_tokens store stream use_beam_search".split()
)

WORDS = frozenset("prompt_cache_retention reasoning_effort service_tier verbosity".split())
"""A setting each, such as ``low``: templates print some of them."""

SETTING = re.compile(r"[A-Za-z0-9]{1,12}(?:[_-][A-Za-z0-9]{1,8})?")

MODEL = re.compile(r"[A-Za-z0-9_.:@/-]{1,128}")
"""Names a model; no model is shown it."""

LABELS = frozenset({"prompt_cache_key", "safety_identifier", "user"})
"""Short texts that no model is shown."""

TOOLS = frozenset({"function_call", "functions", "response_format", "tool_choice", "tools"})
"""Texts that models are shown: names, descriptions, schemas."""

LABEL_LENGTH = 512

TEMPLATE_SWITCHES = frozenset({"enable_thinking", "thinking", "thinking_budget"})
"""What ``chat_template_kwargs`` may hold: templates print other values as they please."""


Check = Callable[[Any], bool]
"""Whether a value is what the name of its parameter says."""


def require_known(
    parameters: Mapping[str, Any], checks: Mapping[str, Check], *, unread: Collection[str] = ()
) -> dict[str, Any]:
    """The parameters that are sent on; empty ones that are unknown are left out.

    Args:
        parameters: Of the request, without its messages.
        checks: What each known parameter may be.
        unread: Names that the operator lets through unread.

    Raises:
        BadRequest: if one is unknown or is not what its name says.
    """
    allowed = dict[str, Any]()
    for name, value in parameters.items():
        if name in unread or (value is None and name in checks):
            allowed[name] = value
        elif name in checks:
            if not checks[name](value):
                raise BadRequest(f"'{name}' has a value that this guard does not let through.")
            allowed[name] = value
        elif value not in (None, "", [], {}):
            raise BadRequest(
                f"'{name[:40]}' is no parameter that this guard reads; leave it out, or have the "
                "operator allow it by --allow-parameter."
            )
    return allowed


def texts_in(parameters: Mapping[str, Any], tools: ToolPolicy) -> list[str]:
    """What a request says beside its messages: tools, schemas, a predicted reply.

    Raises:
        BadRequest: if tools are there and are refused.
    """
    entries = _read_entries(parameters, tools)
    texts = [text for entry in entries for text in texts_of(entry)]
    texts += joined_words(word for entry in entries for word in single_words(entry))
    content = _predicted(parameters)
    return [*texts, *([content] if isinstance(content, str) else texts_of(content))]


def strings_in(parameters: Mapping[str, Any], tools: ToolPolicy) -> list[str]:
    """The same, every string of it: what control tokens are looked for in."""
    return strings_of([*_read_entries(parameters, tools), _predicted(parameters)])


def _read_entries(parameters: Mapping[str, Any], tools: ToolPolicy) -> list[Any]:
    """Tools and schemas one by one; none where a gateway is trusted with them."""
    entries = list[Any]()
    for name in sorted(TOOLS & parameters.keys()):
        if tools == "refuse" and says_something(parameters[name]):
            raise BadRequest(f"'{name}' is not taken by this service.")
        if tools == "read":
            value = parameters[name]
            entries += value if isinstance(value, list) else [value]
    return entries


def _predicted(parameters: Mapping[str, Any]) -> Any:
    prediction = parameters.get("prediction")
    return prediction.get("content") if isinstance(prediction, Mapping) else None


def says_something(value: Any) -> bool:
    """Whether a tool parameter is more than its default."""
    return value not in (None, [], {}, "none", "auto", {"type": "text"})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _is_setting(value: Any) -> bool:
    return isinstance(value, str) and SETTING.fullmatch(value) is not None


def _is_model(value: Any) -> bool:
    return isinstance(value, str) and MODEL.fullmatch(value) is not None


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_word, value))


def _is_setting_or_none(value: Any) -> bool:
    return value is None or _is_setting(value)


def _is_false(value: Any) -> bool:
    return value is False


def _is_text_config(value: Any) -> bool:
    has_known_keys = isinstance(value, dict) and value.keys() <= {"format", "verbosity"}
    return has_known_keys and _is_setting_or_none(value.get("verbosity"))


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LABEL_LENGTH


def _is_stop(value: Any) -> bool:
    stops = value if isinstance(value, list) else [value]
    return len(stops) <= 16 and all(map(_is_label, stops))


def _maps(name_fits: Check, fits: Check) -> Check:
    def check(value: Any) -> bool:
        return isinstance(value, dict) and all(name_fits(n) and fits(v) for n, v in value.items())

    return check


def _is_text_only(value: Any) -> bool:
    return value in ([], ["text"])


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_prediction(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= {"type", "content"}


CHAT_CHECKS: dict[str, Check] = {
    **dict.fromkeys(SWITCHES, _is_switch),
    **dict.fromkeys(NUMBERS, _is_number),
    **dict.fromkeys(WORDS, _is_setting),
    **dict.fromkeys(LABELS, _is_label),
    **dict.fromkeys(TOOLS, lambda _: True),
    "chat_template_kwargs": _maps(TEMPLATE_SWITCHES.__contains__, _is_number),
    "logit_bias": _maps(_is_word, _is_number),
    "metadata": _maps(_is_label, _is_label),
    "modalities": _is_text_only,
    "model": _is_model,
    "prediction": _is_prediction,
    "stop": _is_stop,
    "stop_token_ids": _are_numbers,
    "stream_options": _maps(_is_word, _is_switch),
}
"""What each known parameter of ``/v1/chat/completions`` may be."""

RESPONSE_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("parallel_tool_calls", "store", "stream"), _is_switch),
    **dict.fromkeys(
        ("max_output_tokens", "max_tool_calls", "temperature", "top_logprobs", "top_p"), _is_number
    ),
    **dict.fromkeys(("prompt_cache_retention", "service_tier", "truncation"), _is_setting),
    **dict.fromkeys(LABELS, _is_label),
    **dict.fromkeys(("tool_choice", "tools"), lambda _: True),
    "background": _is_false,  # its answer would be fetched past the guard
    "include": _are_words,
    "metadata": _maps(_is_label, _is_label),
    "model": _is_model,
    "reasoning": _maps(_is_word, _is_setting_or_none),
    "stream_options": _maps(_is_word, _is_switch),
    "text": _is_text_config,
}
"""What each known parameter of ``/v1/responses`` may be."""
