"""Messages in OpenAI's schema -> what the guard reads."""

import pytest

from latentguard.serve.chat_readings import chat_readings
from latentguard.serve.errors import BadRequest
from latentguard.serve.messages import ChatMessage, own_model_prompt, texts_of


def chat(*turns):
    return [ChatMessage(role=role, content=content) for role, content in turns]


def said(prompt):
    return [*((turn.role, turn.content) for turn in prompt.history), ("user", prompt.text)]


def texts(readings):
    return [(one.prompt.text, one.is_newest) for one in readings]


def test_the_first_reading_is_the_chat_in_context():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert said(chat_readings(chat(*turns))[0].prompt) == turns
    assert said(own_model_prompt(chat(*turns))) == turns


def test_each_message_of_the_client_is_read_by_itself():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    _, *alone = chat_readings(chat(*turns))
    assert texts(alone) == [("s", False), ("a", False), ("b", False), ("c", True)]
    assert all(one.prompt.history == () for one in alone)


def test_a_single_message_is_one_reading():
    assert texts(chat_readings(chat(("user", "a")))) == [("a", True)]


def test_trusted_roles_are_read_in_context_only():
    turns = chat(
        ("system", "s"), ("developer", "d"), ("user", "a"), ("assistant", "b"), ("user", "c")
    )
    whole, *alone = chat_readings(turns, trusted_roles=["system", "developer"])
    assert said(whole.prompt)[0] == ("system", "s\n\nd")
    assert [text for text, _ in texts(alone)] == ["a", "b", "c"]


def test_developers_are_the_system():
    turns = chat(("developer", "d"), ("user", "a"))
    whole = chat_readings(turns)[0].prompt
    assert said(own_model_prompt(turns))[0] == ("system", "d") == said(whole)[0]


def test_messages_in_a_row_are_read_joined_too_wherever_they_stand():
    turns = chat(("user", "a"), ("user", "b"), ("assistant", "x"), ("user", "c"), ("tool", "d"))
    whole, *alone = chat_readings(turns)
    assert said(whole.prompt) == [("user", "a\n\nb"), ("assistant", "x"), ("user", "c\n\nd")]
    assert texts(alone) == [
        *[(text, False) for text in ("a", "b", "a\n\nb", "x")],
        *[(text, True) for text in ("c", "d", "c\n\nd")],
    ]


def test_what_the_assistant_is_made_to_say_is_read():
    whole, part = chat_readings(chat(("user", "a"), ("assistant", "b")))
    assert (said(whole.prompt), part.prompt.text) == ([("user", "a")], "b")
    assert part.is_newest


def test_equal_texts_of_one_source_are_read_once():
    turns = chat(("user", "a"), ("assistant", "a"), ("user", "a"))
    found = [(one.source, one.is_newest) for one in chat_readings(turns)]
    assert found == [("user", True), ("user", True), ("assistant", False)]  # in context, and alone


def test_other_texts_of_messages_and_of_the_request_are_read():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "d e"}'}}
    turns = [
        ChatMessage(role="user", content="a b"),
        ChatMessage(role="assistant", content=None, tool_calls=[call], reasoning_content="r r"),
        ChatMessage(role="tool", tool_call_id="c1", content="t"),
    ]
    readings = [one.prompt.text for one in chat_readings(turns, other_texts=[("schema", "o o")])]
    assert {"r r", "d e", "o o", '{"x": "d e"}'} <= set(readings)


@pytest.mark.parametrize(
    "turns", [[("system", "s")], [("user", "  ")], [("assistant", "a")], [("user", None)]]
)
def test_nobody_speaks(turns):
    with pytest.raises(BadRequest, match="No message of a user"):
        chat_readings(chat(*turns))


@pytest.mark.parametrize(
    "turns",
    [[("user", "a"), ("assistant", "b")], [("tool", "a"), ("user", "b")], [("system", "a")]],
)
def test_what_the_own_model_cannot_answer(turns):
    with pytest.raises(BadRequest, match="the last is the user's"):
        own_model_prompt(chat(*turns))


def test_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert own_model_prompt(chat(("user", parts))).text == "a\nb"
    for bad in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}):
        with pytest.raises(BadRequest, match="text only"):
            chat_readings(chat(("user", [*parts, bad])))


def test_the_texts_of_a_value_are_its_strings_and_all_of_them_together():
    tool = {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds things.",
            "parameters": {"type": "object", "properties": {"how_to": {"type": "string"}}},
        },
    }
    assert texts_of(tool) == ["Finds things.", "how to", "find Finds things. how to"]
    assert texts_of({"type": "text"}) == texts_of(None) == texts_of("auto") == []


def test_a_value_that_is_nested_too_deeply_is_an_error():
    value = "a"
    for _ in range(40):
        value = [value]
    with pytest.raises(BadRequest, match="levels deep"):
        texts_of(value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chat_template": "x"}, "'chat_template' is no field"),
        ({"name": "two words"}, "'name' should be one word"),
        ({"reasoning": ["a"]}, "'reasoning' of a message should be text"),
        ({"content": [{"type": "text", "text": "a", "image_url": {"url": "x"}}]}, "'image_url'"),
    ],
)
def test_a_field_that_is_not_read_is_an_error(fields, reason):
    with pytest.raises(BadRequest, match=reason):
        ChatMessage(**{"role": "user", "content": "a"} | fields).sanitized()


def test_empty_fields_are_left_out_of_what_is_sent_on():
    message = ChatMessage(role="assistant", content="a", audio=None, annotations=[], refusal=None)
    assert message.sanitized() == {"role": "assistant", "content": "a"}


def test_parts_are_sent_on_as_the_text_that_is_read():
    parts = [{"type": "text", "text": word, "cache_control": {"type": "x"}} for word in "ab"]
    message = ChatMessage(role="user", content=parts)
    assert (
        message.sanitized()
        == {"role": "user", "content": "a\nb"}
        == {
            "role": "user",
            "content": message.text,
        }
    )
