"""Requests that are spelled out where single words are expected, or joined otherwise than read."""

import json

import pytest

from latentguard.serve.chat_readings import chat_readings
from latentguard.serve.chat_request import forwarded_chat
from latentguard.serve.config import ServeConfig
from latentguard.serve.control_tokens import ControlTokens
from latentguard.serve.errors import BadRequest
from latentguard.serve.gateway_guardrail import PATH as GUARDRAIL
from latentguard.serve.json_texts import texts_of
from latentguard.serve.messages import ChatMessage
from latentguard.serve.response_request import ResponseRequest, forwarded_response
from serve.running import flagged, passed, post, running
from serve.test_upstream import answers, upstream

CHINESE = "\u8bf7\u544a\u8bc9\u6211\u600e\u4e48\u505a\u8fd9\u4ef6\u4e8b"
"""A sentence without a blank."""


def message(role, content=None, **fields):
    return {"role": role, "content": content, **fields}


def call(name="f", arguments="{}", id="c1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(**function):
    return {"type": "function", "function": function}


def texts_read(*messages, **parameters):
    """What the guard reads of a chat for an upstream."""
    body = dict(messages=[message("user", "hi"), *messages], **parameters)
    forwarded = forwarded_chat(body, ServeConfig(), ControlTokens())
    return {one.prompt.text for one in forwarded.readings}


def refuse(*messages, **parameters):
    with pytest.raises(BadRequest):
        texts_read(*messages, **parameters)


SENTENCE = "please tell me how"


class TestNames:
    """A name is one word: what says more is read, or refused."""

    @pytest.mark.parametrize("field", ["name", "tool_call_id"])
    def test_in_a_script_without_blanks_are_refused(self, field):
        refuse(message("user", "a", **{field: CHINESE}))

    @pytest.mark.parametrize("name", ["please_tell_me_how", "please.tell-me/how"])
    @pytest.mark.parametrize("field", ["name", "tool_call_id"])
    def test_of_several_words_are_read(self, field, name):
        assert SENTENCE in texts_read(message("user", "a", **{field: name}))

    def test_in_camel_case_are_read(self):
        assert "Please Tell Me How" in texts_read(message("user", "a", name="PleaseTellMeHow"))

    def test_that_are_long_are_refused(self):
        refuse(message("user", "a", name="a" * 65))

    @pytest.mark.parametrize(
        "id", ["call_62136354YLFEavdNDpvOAIfr", "chatcmpl-tool-0a1b2c3d", "c1"]
    )
    def test_that_are_ids_are_not(self, id):
        messages = [message("assistant", tool_calls=[call(id=id)]), message("tool", "b c")]
        assert texts_read(*messages) == {"hi", "b c", "hi\n\nb c"}

    def test_of_a_call_are_read(self):
        made = message("assistant", tool_calls=[call(id="please_tell_me_how")])
        assert any("please tell me how" in text.replace("_", " ") for text in texts_read(made))

    @pytest.mark.parametrize("name", ["reasoning_effort", "verbosity", "service_tier"])
    @pytest.mark.parametrize("value", [CHINESE, "please.tell.me.how", "please-tell-me-how"])
    def test_of_settings_are_short(self, name, value):
        refuse(**{name: value})

    @pytest.mark.parametrize(
        "setting",
        [
            dict(reasoning_effort="minimal"),
            dict(service_tier="standard_only"),
            dict(prompt_cache_retention="in-memory"),
            dict(prompt_cache_retention="24h"),
            dict(model="accounts/fireworks/models/llama-v3p1-405b-instruct@2024"),
        ],
    )
    def test_of_common_settings_pass(self, setting):
        assert texts_read(**setting) == {"hi"}

    def test_of_calls_in_responses_are_read(self):
        item = dict(type="function_call", call_id="please_tell_me_how", name="f", arguments="{}")
        request = ResponseRequest(input=[message("user", "hi"), item])
        forwarded = forwarded_response(request, ServeConfig(), ControlTokens())
        read = " ".join(one.prompt.text for one in forwarded.readings).replace("_", " ")
        assert SENTENCE in read


class TestSingleWords:
    @pytest.mark.parametrize(
        "value", [CHINESE, "pleasetellmehowtodothisthing", "please_tell_me_how", "PleaseTellMeHow"]
    )
    def test_that_say_something_are_read(self, value):
        read = texts_read(
            message("assistant", tool_calls=[call(arguments=json.dumps({"a": value}))]),
            tools=[tool(name="f", description=value)],
        )
        words = value.replace("_", " ") if "_" in value else value
        words = "Please Tell Me How" if value == "PleaseTellMeHow" else words
        assert words in read

    def test_are_read_together_over_all_tools(self):
        tools = [tool(name=word) for word in SENTENCE.split()]
        assert SENTENCE in texts_read(tools=tools)

    def test_are_read_together_over_all_calls_of_a_chat(self):
        calls = [
            one
            for word in SENTENCE.split()
            for one in (message("assistant", tool_calls=[call(name=word)]), message("tool", "b c"))
        ]
        assert f"f {SENTENCE}" in texts_read(message("assistant", tool_calls=[call()]), *calls)

    def test_that_come_twice_are_read_twice(self):
        words = "how to do what to do".split()
        assert "how to do what to do" in texts_read(tools=[tool(name=word) for word in words])

    def test_of_a_common_tool_cost_no_reading_of_their_own(self):
        city = tool(name="get_weather", parameters={"properties": {"city": {"type": "string"}}})
        assert texts_read(tools=[city]) == {"hi", "get_weather city"}

    def test_letters_in_a_list_are_read_as_the_text_that_they_spell(self):
        assert SENTENCE in texts_of({"spell": list(SENTENCE)})


@pytest.mark.parametrize(
    "arguments", [' {"a": "%s"}', '\n["%s"]', '"%s"', '{"a": " [\\"%s\\"]"}'], ids=range(4)
)
def test_arguments_are_read_without_the_escapes_of_json(arguments):
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in SENTENCE)
    if "\\" in arguments:
        escaped = escaped.replace("\\", "\\\\")
    made = message("assistant", tool_calls=[call(arguments=arguments % escaped)])
    assert SENTENCE in texts_read(made)


class TestParts:
    """Where what was read is not what is sent, each joining is read."""

    @pytest.fixture
    def parts(self):
        """A flagged request in parts that templates join to itself again."""
        words = flagged().split(" ")
        texts = [f"{word} " for word in words[:-1]] + words[-1:]
        return [{"type": "text", "text": text} for text in texts]

    def test_are_all_read(self):
        made = ChatMessage(role="user", content=[{"type": "text", "text": t} for t in ("a", "b")])
        assert {one.prompt.text for one in chat_readings([made])} == {"a\nb", "ab", "a b"}

    @pytest.mark.parametrize("path", ["moderations", "score"])
    def test_of_a_message_that_is_moderated(self, service, parts, path):
        body = dict(messages=[message("user", parts)])
        (result,) = post(f"{service}/v1/{path}", json=body).json()["results"]
        assert result["readings" if path == "score" else "flagged"]
        assert (result if path == "score" else result["latentguard"])["flagged"]

    def test_of_an_input(self, service, parts):
        (result,) = post(f"{service}/v1/moderations", json={"input": parts}).json()["results"]
        assert result["flagged"]

    def test_of_a_message_that_a_gateway_asks_about(self, service, parts):
        body = dict(input_type="request", structured_messages=[message("user", parts)])
        assert post(f"{service}{GUARDRAIL}", json=body).json()["action"] == "BLOCKED"

    def test_cost_the_own_model_no_reading(self, service):
        parts = [{"type": "text", "text": word} for word in passed().split()]
        body = dict(messages=[message("user", parts)], max_tokens=1)
        answer = post(f"{service}/v1/chat/completions", json=body).json()
        assert answer["latentguard"]["readings"] == 1


class TestGateways:
    """A gateway's question has nothing that is not read, whoever speaks in it."""

    @pytest.mark.parametrize(
        "fields",
        [
            dict(structured_messages=[message("system", "BAD")]),
            dict(structured_messages=[message("assistant", "a b", reasoning_content="BAD")]),
            dict(structured_messages=[message("assistant", tool_calls=[call(arguments="BAD")])]),
            dict(texts=["BAD"], structured_messages=[message("system", "a b")]),
            dict(texts=["a b"], tool_calls=[call(arguments="BAD")]),
        ],
        ids=range(5),
    )
    def test_it_is_blocked(self, service, fields):
        hidden = json.loads(json.dumps(fields).replace("BAD", json.dumps(flagged())[1:-1]))
        body = dict(input_type="request") | hidden
        assert post(f"{service}{GUARDRAIL}", json=body).json()["action"] == "BLOCKED"


@pytest.mark.parametrize("path", ["moderations", "score"])
@pytest.mark.parametrize(
    "body",
    [
        dict(messages=[message("user", "a b", thinking="c d")]),
        dict(messages=[message("user", "a b", reasoning={"a": 1})]),
        dict(messages=[message("user", "a b")], tools=[tool(description="c d")]),
    ],
    ids=["a field", "reasoning of another kind", "a parameter"],
)
def test_a_chat_is_not_called_harmless_if_it_holds_what_is_not_read(service, path, body):
    assert post(f"{service}/v1/{path}", json=body).status_code == 400


class TestControlTokens:
    @pytest.mark.parametrize(
        "text",
        [
            "a</s>b",
            "a\uff1c|im_end|\uff1eb",
            "a[gMASK]b",
            "a<seed:bos>b",
            "a<extra_id_1>b",
            "a<SPECIAL_10>b",
        ],
    )
    @pytest.mark.parametrize("place", ["content", "reasoning_content"])
    def test_are_refused(self, text, place):
        refuse(message("assistant", **{"content": "a"} | {place: text}))

    @pytest.mark.parametrize(
        "parameters",
        [
            dict(tools=[tool(name="<|im_end|>")]),
            dict(tools=[{"<|im_end|>": {}}]),
            dict(response_format={"type": "</s>"}),
            dict(prediction={"type": "content", "content": [{"type": "</s>"}]}),
        ],
        ids=range(4),
    )
    def test_are_refused_even_alone(self, parameters):
        refuse(**parameters)

    def test_are_refused_in_a_call_that_has_no_other_text(self):
        refuse(message("assistant", tool_calls=[call(name="<|im_end|>", arguments="")]))

    def test_that_cannot_be_broken_up_are_refused(self):
        config = ServeConfig(control_tokens="escape")
        body = dict(messages=[message("user", "a|b")])
        with pytest.raises(BadRequest, match="control token"):
            forwarded_chat(body, config, ControlTokens(["|"]))


def test_a_name_in_half_a_character_is_a_plain_error(service):
    for body in ({"\ud800": 1}, {"messages": [message("user", "a", **{"\ud800": 1})]}):
        content = json.dumps(body)
        answer = post(
            f"{service}/v1/score", content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, answer.text


def test_odd_headers_are_not_sent_on():
    seen = []

    def script(handler, _):
        seen.append({name.lower() for name, _ in handler.headers.items()})
        answers(handler)

    odd = {"x-request-id": b"\xe9", "traceparent": b"\xff", "authorization": b"Bearer \xe9"}
    with upstream(script) as (_, where), running(upstream=where) as url:
        body = dict(messages=[message("user", passed())])
        answer = post(f"{url}/v1/chat/completions", json=body, headers=odd)
    assert answer.status_code == 200, answer.text
    assert not seen[0] & odd.keys()


def test_a_path_that_needs_no_key_takes_no_body_without_one():
    with running(keys=["k"]) as url:
        assert post(f"{url}/", json={}).status_code == 401
