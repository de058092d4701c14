"""Made-up chats of every shape: no crash, no 5xx, and no flagged request that reaches a model.

A request that the guard flags by itself is planted in a random place of a random chat: in any
message, part, call, tool, schema or parameter, as a value or as a name.
"""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.running import flagged, post, running
from serve.test_upstream import answers, upstream

CHAT = "/v1/chat/completions"
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
PLACE = "PLANTED-HERE"
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PARAMETERS = (
    "metadata", "user", "stop", "documents", "prompt", "guided_json", "suffix",
    "chat_template_kwargs", "reasoning_effort", "logit_bias", "temperature", "max_tokens",
)  # fmt: skip

words = st.sampled_from(
    ["", ".", "hi", "Yes?", "ein Wort", "\u200b", "{}", '{"a": "b"}', "\U0001f642"]
)
texts = words | st.just(PLACE) | st.text(max_size=8)
ids = st.sampled_from(["f", "call_1", "get_weather"])
scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | texts
names = st.sampled_from(["type", "name", "text", "id", "content", "description"]) | texts


def nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)


values = st.recursive(scalars, nested, max_leaves=8)


def mostly(usual, odd):
    """Now and then something odd, so that most requests get past the first check."""
    return st.integers(0, 15).flatmap(lambda die: odd if die == 0 else usual)


def record(required, **optional):
    """An object with these fields, some of them left out."""
    return st.fixed_dictionaries(required, optional=optional)


part = record({"type": mostly(st.just("text"), st.just("image_url")), "text": texts})
call = record(
    {"id": mostly(ids, texts), "type": st.just("function")},
    function=record({"name": ids, "arguments": texts | values.map(json.dumps)}),
)
content = texts | st.lists(part, max_size=3)
user = record({"role": st.just("user"), "content": content}, name=mostly(ids, texts))
others = [
    record({"role": st.sampled_from(ROLES[:2]), "content": content}),
    record(
        {"role": st.just("assistant"), "content": st.none() | content},
        tool_calls=st.lists(call, max_size=2),
        function_call=record({"name": ids, "arguments": texts}),
        reasoning_content=texts,
        refusal=texts,
    ),
    record(
        {"role": st.sampled_from(["tool", "function"]), "content": content},
        tool_call_id=mostly(ids, texts),
    ),
    user,
]
odd_message = record({"role": st.sampled_from(ROLES)}, content=values, audio=values, name=values)
messages = st.tuples(
    st.lists(mostly(st.one_of(others), odd_message), max_size=4), user, st.lists(user, max_size=1)
).map(lambda three: [*three[0], three[1], *three[2]])
function = record({"name": ids}, description=texts, parameters=values)
tools = st.lists(record({"type": st.just("function"), "function": function}), max_size=2)
schema = record({"name": ids, "schema": values}, description=texts)
chats = record(
    {"messages": messages},
    tools=mostly(tools, values),
    response_format=record({"type": st.just("json_schema"), "json_schema": schema}),
    prediction=record({"type": st.just("content"), "content": content}),
    stream=st.booleans(),
)
extras = st.dictionaries(st.sampled_from(PARAMETERS), values, max_size=2)
requests = st.builds(lambda chat, extra: chat | extra, chats, mostly(st.just({}), extras))
plain_chats = record(
    {
        "messages": st.lists(user | others[0], max_size=3).flatmap(
            lambda before: user.map(lambda last: [*before, last])
        )
    }
)
EXPECTED = {200, 400, 413, 429}


@pytest.fixture(scope="module")
def through():
    with (
        upstream(answers) as (seen, where),
        running(upstream=where, max_reply=2, concurrency=64) as url,
    ):
        yield url, seen


@pytest.fixture(scope="module")
def own():
    with running(max_reply=2) as url:
        yield url


def planted(body):
    """The request with what the guard flags in each marked place."""
    return json.loads(json.dumps(body).replace(PLACE, json.dumps(flagged())[1:-1]))


def require_plain_error(answer):
    """An error of the client's, in OpenAI's form, without a trace."""
    assert answer.status_code in EXPECTED, (answer.status_code, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"]
        assert not re.search(r"Traceback|\.py|Error\(", error["message"])


@SETTINGS
@given(body=requests)
def test_an_upstream_is_sent_no_flagged_request_wherever_it_is(through, body):
    url, seen = through
    seen.clear()
    require_plain_error(post(f"{url}{CHAT}", json=planted(body), timeout=60))
    for sent in seen:
        assert flagged() not in texts_of(sent)


@SETTINGS
@given(body=plain_chats)
def test_the_own_model_answers_no_flagged_request_in_a_message(own, body):
    answer = post(f"{own}{CHAT}", json=planted(body), timeout=60)
    require_plain_error(answer)
    read = json.dumps([message.get("content") for message in body["messages"]])
    if answer.status_code == 200 and PLACE in read:
        assert "content_filter" in answer.text


@SETTINGS
@given(body=values | chats | st.dictionaries(names, values, max_size=4))
@pytest.mark.parametrize("path", ["/v1/score", "/v1/moderations", CHAT])
def test_any_json_is_an_answer_or_an_error_in_words(own, path, body):
    require_plain_error(post(f"{own}{path}", json=body, timeout=60))


@SETTINGS
@given(body=st.binary(max_size=200))
def test_any_bytes_are_an_error_in_words(own, body):
    require_plain_error(post(f"{own}/v1/score", content=body))


def texts_of(value):
    """Every string of a JSON value, names included, also inside strings of JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join(f"{name}\n{texts_of(inner)}" for name, inner in value.items())
    return "\n".join(map(texts_of, value)) if isinstance(value, list) else ""
