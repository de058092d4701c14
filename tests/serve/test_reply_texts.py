"""Texts of an upstream's reply: all that a client may be shown, whatever field it is in."""

import pytest

from latentguard.serve.reply_texts import choice_text, shown_strings, unreadable_kinds
from latentguard.serve.upstream_formats import ResponsesFormat


def test_reasoning_comes_before_the_content_and_calls_after_it():
    call = dict(id="c1", type="custom", custom=dict(name="shell", input="three"))
    message = dict(role="assistant", tool_calls=[call], content="two", reasoning="one")
    choice = dict(index=0, message=message, finish_reason="stop", logprobs=dict(content=["two"]))
    assert choice_text(choice) == "onetwothree"


def test_a_label_of_one_word_is_not_read_and_a_longer_one_is():
    assert not [*shown_strings(dict(type="message", id="msg_1", name="get_time"))]
    assert [*shown_strings(dict(name="how do I"))] == ["how do I"]
    assert not [*shown_strings(dict(encrypted_content="gAAAA" * 999))]
    assert [*shown_strings(dict(encrypted_content="not so"))] == ["not so"]


def test_types_inside_of_a_call_may_be_anything():
    action = dict(type="search", query="weather")
    output = dict(output=[dict(type="web_search_call", id="w1", action=action)])
    assert [*shown_strings(output)] == ["weather"]
    assert not [*unreadable_kinds(output)]


@pytest.mark.parametrize(
    "item",
    [
        dict(type="image_generation_call", id="i", result="iVBORw0KGgo="),
        dict(type="song", words="la"),
        dict(type="error", message="la"),
        dict(type="message", content=[dict(type="output_audio", audio="UklGRg==")]),
    ],
)
def test_items_of_a_kind_that_is_not_known_are_named(item):
    assert ResponsesFormat().unreadable(dict(output=[item]))
    assert ResponsesFormat().unreadable(dict(type="response.output_item.done", item=item))
    assert ResponsesFormat().unreadable(dict(response=dict(output=[item], tools=[])))


def test_the_tools_of_a_request_are_no_part_of_its_response():
    tools = [dict(type="song", words="la")]
    message = dict(type="message", content=[dict(type="output_text", text="la", annotations=[])])
    assert not ResponsesFormat().unreadable(dict(output=[message], tools=tools))
    assert not ResponsesFormat().unreadable(dict(response=dict(output=[message], tools=tools)))


@pytest.mark.parametrize(
    "event",
    [
        dict(type="response.image_generation_call.partial_image", partial_image_b64="iVBORw0"),
        dict(type="response.audio.delta", delta="UklGRg=="),
        dict(type="response.output_audio.delta", delta="UklGRg=="),
    ],
)
def test_events_with_images_or_sound_are_named(event):
    assert ResponsesFormat().unreadable(event)


def test_what_stands_beside_a_delta_is_read_once():
    form = ResponsesFormat()
    delta = dict(type="response.output_text.delta", delta="a", note="hidden words")
    assert form.new_texts(delta) == [(0, "a"), (0, "hidden words")]
    assert form.new_texts(delta) == [(0, "a")]
    custom = dict(type="response.custom_tool_call_input.delta", delta="b", item_id="i")
    assert form.new_texts(custom) == [(0, "b")]
    assert form.new_texts(dict(type="song", delta=dict(text="c"))) == [(0, "c")]
    assert form.new_texts(dict(type="error", message="too many requests")) == []
