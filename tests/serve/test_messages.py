"""Messages in OpenAI's schema -> what the guard reads."""

import pytest

from latentguard.serve.errors import BadRequest
from latentguard.serve.messages import ChatMessage, chat_prompts, own_model_prompt


def chat(*turns):
    return [ChatMessage(role=role, content=content) for role, content in turns]


def said(prompt):
    return [*((turn.role, turn.content) for turn in prompt.history), ("user", prompt.text)]


def test_a_plain_chat_is_one_prompt_with_its_history():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    (prompt,) = chat_prompts(chat(*turns))
    assert said(prompt) == turns
    assert said(own_model_prompt(chat(*turns))) == turns


def test_developers_are_the_system():
    turns = chat(("developer", "d"), ("user", "a"))
    assert said(own_model_prompt(turns))[0] == ("system", "d") == said(chat_prompts(turns)[0])[0]


def test_messages_in_a_row_are_joined_and_read_one_by_one():
    whole, *parts = chat_prompts(chat(("user", "a"), ("user", "b"), ("user", "c")))
    assert said(whole) == [("user", "a\n\nb\n\nc")]
    assert [part.text for part in parts] == ["a", "b", "c"]
    assert all(part.history == () for part in parts)


def test_tools_speak_as_users_and_the_users_words_are_read_too():
    turns = chat(("user", "a"), ("assistant", "calls"), ("tool", "r1"), ("tool", "r2"))
    whole, *parts = chat_prompts(turns)
    assert said(whole) == [("user", "a"), ("assistant", "calls"), ("user", "r1\n\nr2")]
    assert [part.text for part in parts] == ["r1", "r2", "a"]


def test_what_the_assistant_is_made_to_say_is_read():
    whole, part = chat_prompts(chat(("user", "a"), ("assistant", "b")))
    assert (said(whole), part.text) == ([("user", "a")], "b")


@pytest.mark.parametrize(
    "turns", [[("system", "s")], [("user", "  ")], [("assistant", "a")], [("user", None)]]
)
def test_nobody_speaks(turns):
    with pytest.raises(BadRequest, match="No message of a user"):
        chat_prompts(chat(*turns))


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
            chat_prompts(chat(("user", [*parts, bad])))
