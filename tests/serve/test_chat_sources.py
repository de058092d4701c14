"""Sources of a chat: which are read, each under the thresholds that were calibrated for it."""

import json
from dataclasses import replace

import pytest

from latentguard.serve.chat_readings import chat_readings
from latentguard.serve.config import SOURCES
from latentguard.serve.messages import ChatMessage
from serve.running import band_guard, flagged, passed, post, running, tiny_model
from serve.test_reply_reading import serve
from serve.test_upstream import answers, upstream
from serve.test_upstream_replies import flagging, streams

CHAT = "/v1/chat/completions"
CALL = {"id": "c1", "function": {"name": "f", "arguments": '{"x": "in a call"}'}}
MESSAGES = [
    ChatMessage(role="system", content="the system"),
    ChatMessage(role="user", content="the user"),
    ChatMessage(role="assistant", content="an assistant", tool_calls=[CALL]),
    ChatMessage(role="tool", content="a result", tool_call_id="c1"),
]
OTHERS = [("schema", "a schema")]


def texts(sources, messages=MESSAGES):
    found = chat_readings(messages, sources=sources, other_texts=OTHERS)
    return {(one.source, one.prompt.text) for one in found}


def test_each_text_has_its_source():
    assert texts(SOURCES) >= {
        ("system", "the system"),
        ("user", "the user"),
        ("assistant", "an assistant"),
        ("call", '{"x": "in a call"}'),
        ("tool", "a result"),
        ("schema", "a schema"),
    }


@pytest.mark.parametrize("source", SOURCES)
def test_only_chosen_sources_are_read(source):
    found = texts([source])
    assert {one for one, _ in found} == {source}
    assert found == {one for one in texts(SOURCES) if one[0] == source}


def test_the_context_is_read_up_to_the_last_message_of_a_chosen_source():
    first, *_ = chat_readings(MESSAGES, sources=["user"])
    assert (first.prompt.text, first.is_newest) == ("the user", False)
    first, *_ = chat_readings(MESSAGES, sources=["tool"])
    assert (first.prompt.text, first.source, first.is_newest) == ("a result", "tool", True)
    assert [turn.content for turn in first.prompt.history] == [
        "the system",
        "the user",
        "an assistant",
    ]


def test_a_user_beside_a_tool_makes_both_a_users():
    messages = [*MESSAGES, ChatMessage(role="user", content="more")]
    assert ("user", "a result\n\nmore") in texts(SOURCES, messages)
    assert ("tool", "a result") in texts(["tool"], messages)
    assert not [text for _, text in texts(["tool"], messages) if "more" in text]


def test_an_equal_text_of_another_source_is_read_too():
    """Else a tool's lenient threshold would hold for what a user says."""
    messages = [
        ChatMessage(role="user", content="a"),
        ChatMessage(role="tool", content="a", tool_call_id="c"),
    ]
    alone = [r.source for r in chat_readings(messages) if r.prompt.text == "a"]
    assert sorted(set(alone)) == ["tool", "user"]


def guard_with(**thresholds):
    """A guard with a threshold for each of these sources."""
    guard = band_guard()
    common = guard.thresholds.common
    segments = {
        name: replace(common, block=replace(common.block, threshold=value), review=None)
        for name, value in thresholds.items()
    }
    return replace(guard, thresholds=replace(guard.thresholds, segments=segments))


def with_result(text, **more):
    call = dict(CALL, type="function")
    return dict(
        messages=[
            dict(role="user", content=passed()),
            dict(role="assistant", content=None, tool_calls=[call]),
            dict(role="tool", content=text, tool_call_id="c1"),
        ],
        **more,
    )


def is_refused(answer):
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    return bool(choices) and choices[0]["finish_reason"] == "content_filter"


def asked(guard, *bodies, **how):
    """What becomes of some chats before an upstream."""
    with (
        upstream(answers) as (_, where),
        running(lambda: (guard, tiny_model()), upstream=where, **how) as url,
    ):
        return [post(f"{url}{CHAT}", json=body) for body in bodies]


def test_a_source_has_the_threshold_of_its_own():
    lenient = guard_with(tool=1e6)
    strict = guard_with(tool=-1e6)
    users = dict(messages=[dict(role="user", content=flagged())])
    result, user = asked(lenient, with_result(flagged()), users)
    assert (is_refused(result), is_refused(user)) == (False, True)
    result, user = asked(
        strict, with_result(passed()), dict(messages=with_result("")["messages"][:1])
    )
    assert (is_refused(result), is_refused(user)) == (True, False)
    assert result.json()["latentguard"]["source"] == "tool"


def test_arguments_of_calls_have_the_threshold_of_their_own():
    [answer] = asked(guard_with(call=-1e6), with_result("fine"))
    assert is_refused(answer)
    assert answer.json()["latentguard"]["source"] == "call"


def test_a_header_names_the_segment_of_users_alone():
    guard = guard_with(tool=-1e6, partner=1e6)
    how = dict(segment_header="x-traffic")
    with (
        upstream(answers) as (_, where),
        running(lambda: (guard, tiny_model()), upstream=where, **how) as url,
    ):
        headers = {"x-traffic": "partner"}
        bodies = (with_result("fine"), dict(messages=[dict(role="user", content=flagged())]))
        tool, user = (post(f"{url}{CHAT}", json=body, headers=headers) for body in bodies)
    assert (is_refused(tool), is_refused(user)) == (True, False)


def test_a_chat_without_a_chosen_source_goes_on_and_is_logged_as_unread(tmp_path):
    log = tmp_path / "a.jsonl"
    users = dict(messages=[dict(role="user", content=flagged())])
    read, unread = asked(band_guard(), with_result(flagged()), users, sources=("tool",), audit=log)
    assert (is_refused(read), is_refused(unread)) == (True, False)
    assert "latentguard" not in unread.json()
    lines = [json.loads(line)["action"] for line in log.read_text().splitlines()]
    assert lines == ["block", "unread"]


def test_scores_are_of_the_chosen_sources():
    body = with_result(flagged())
    paths = ("/v1/moderations", "/v1/score")
    for sources, is_flagged in ((("user", "tool"), True), (("user",), False)):
        with running(lambda: (band_guard(), tiny_model()), sources=sources) as url:
            results = [post(f"{url}{path}", json=body).json()["results"][0] for path in paths]
        assert results[0]["flagged"] is is_flagged
        assert results[1]["flagged"] is is_flagged
    with running(lambda: (band_guard(), tiny_model()), sources=("tool",)) as url:
        alone = dict(messages=[dict(role="user", content=passed())])
        scored = [post(f"{url}{path}", json=alone) for path in paths]
    assert [one.status_code for one in scored] == [400, 400]
    assert "texts of tool alone" in scored[0].text


def test_the_reply_to_an_unread_chat_is_read():
    with (
        upstream(streams) as (_, where),
        serve(flagging(), upstream=where, sources=("tool",)) as url,
    ):
        body = dict(messages=[dict(role="user", content=passed())])
        assert is_refused(post(f"{url}{CHAT}", json=body))
