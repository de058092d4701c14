"""Replies of an upstream: held back until they are read, judged as offline, cut when flagged."""

import json
from dataclasses import replace

import pytest

from latentguard.prompts import Prompt, Reply
from serve.running import PROMPTS, passed, post, stream, tiny_model
from serve.test_reply_reading import judging_guard, serve
from serve.test_upstream import CHAT, chat, upstream

TEXT = "It is in the old town, near the river. One, two, three, four, five, six, seven 😀 eight."


def pieces(size=3):
    return [TEXT[n : n + size] for n in range(0, len(TEXT), size)]


def event(text, **extra):
    choice = dict(index=0, delta=dict(content=text), finish_reason=None)
    head = dict(id="up-1", object="chat.completion.chunk", created=1, model="big")
    return f"data: {json.dumps(head | dict(choices=[choice]) | extra)}\n\n".encode()


def streams(handler, body):
    """The text in pieces; whole if no stream is asked for."""
    if not body.get("stream"):
        message = dict(role="assistant", content=TEXT)
        choice = dict(index=0, message=message, finish_reason="stop")
        return handler.say(json.dumps(dict(id="up", choices=[choice])).encode())
    handler.send_response(200)
    handler.end_headers()
    for piece in pieces():
        handler.wfile.write(event(piece))
    handler.wfile.write(b"data: [DONE]\n\n")
    return None


def offline(text=TEXT):
    [verdict] = judging_guard().scan_replies(tiny_model(), [Reply(Prompt(passed()), text)])
    return verdict


def with_threshold(threshold):
    return replace(judging_guard(), replies=replace(judging_guard().replies, threshold=threshold))


def flagging():
    """A guard that flags the text in the middle."""
    scores = [offline(TEXT[:end]).score for end in range(4, len(TEXT), 4)]
    return with_threshold((scores[0] + scores[-1]) / 2 if scores[-1] > scores[0] else scores[0])


def events(url, text=None):
    with stream("POST", f"{url}{CHAT}", json=chat(text or passed(), stream=True)) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(found):
    return "".join(
        choice["delta"].get("content") or ""
        for one in found
        if one != "[DONE]"
        for choice in one.get("choices", ())
    )


@pytest.mark.parametrize("hold", [0, 1, 4, 100])
def test_a_stream_that_is_not_flagged_goes_on_whole_with_the_verdict_of_offline(hold, tmp_path):
    log = tmp_path / "a.jsonl"
    with (
        upstream(streams) as (_, where),
        serve(with_threshold(1e6), upstream=where, hold_tokens=hold, audit=log) as url,
    ):
        found = events(url)
        whole = post(f"{url}{CHAT}", json=chat(passed())).json()
    assert text_of(found) == TEXT == whole["choices"][0]["message"]["content"]
    assert found[-1] == "[DONE]"
    for said in (found[-2]["latentguard"]["reply"], whole["latentguard"]["reply"]):
        assert said["score"] == pytest.approx(offline().score, abs=1e-5)
        assert said["tokens"] == offline().tokens
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["action"] for line in lines if "reply" in line] == ["pass", "pass"]
    assert TEXT[:20] not in log.read_text()


@pytest.mark.parametrize("hold", [1, 4])
def test_a_flagged_stream_is_cut_and_what_was_not_read_is_never_sent(hold):
    guard = flagging()
    with upstream(streams) as (_, where), serve(guard, upstream=where, hold_tokens=hold) as url:
        found = events(url)
    assert found[-1] == "[DONE]"
    assert found[-2]["choices"][0]["finish_reason"] == "content_filter"
    assert found[-2]["latentguard"]["reply"]["flagged"]
    shown = text_of(found)
    assert TEXT.startswith(shown)
    assert len(shown) < len(TEXT)
    if shown:
        assert offline(shown).score <= guard.replies.threshold + 1e-5


def test_blocked_nothing_of_a_flagged_stream_is_sent():
    with (
        upstream(streams) as (_, where),
        serve(flagging(), upstream=where, reply_policy="block") as url,
    ):
        found = events(url)
        whole = post(f"{url}{CHAT}", json=chat(passed())).json()
    assert text_of(found) == "I'm sorry, but I can't help with that."
    assert whole["choices"][0]["message"]["content"] == "I'm sorry, but I can't help with that."
    assert whole["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("policy", ["cut", "block", "annotate"])
def test_a_score_that_is_not_finite_ends_the_stream_and_nothing_unread_is_sent(policy, monkeypatch):
    undefined = lambda self, text, *, is_whole: [float("nan")] * 40  # noqa: E731
    monkeypatch.setattr("latentguard.serve.upstream_replies.ReplyReader.read", undefined)
    with (
        upstream(streams) as (_, where),
        serve(flagging(), upstream=where, reply_policy=policy, hold_tokens=2) as url,
    ):
        found = events(url)
        whole = post(f"{url}{CHAT}", json=chat(passed()))
    assert text_of(found) == ""
    assert "not a finite number" in found[-1]["error"]["message"]
    assert whole.status_code == 503


def test_annotated_events_have_the_running_score():
    with (
        upstream(streams) as (_, where),
        serve(flagging(), upstream=where, reply_policy="annotate", hold_tokens=2) as url,
    ):
        found = events(url)
    assert text_of(found) == TEXT
    scores = [one["latentguard"]["reply_score"] for one in found[1:-2] if "latentguard" in one]
    assert len(scores) > 5
    assert found[-2]["latentguard"]["reply"]["flagged"]


def test_a_shadow_changes_nothing_and_logs(tmp_path):
    log = tmp_path / "a.jsonl"
    with (
        upstream(streams) as (_, where),
        serve(flagging(), upstream=where, reply_policy="shadow", audit=log) as url,
    ):
        found = events(url)
    assert text_of(found) == TEXT
    assert not any("reply" in one.get("latentguard", {}) for one in found if one != "[DONE]")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["action"] for line in lines if "reply" in line] == ["shadow"]


@pytest.mark.parametrize(
    "delta",
    [
        dict(tool_calls=[dict(index=0, function=dict(arguments=TEXT))]),
        dict(tool_calls=[dict(index=0, type="custom", custom=dict(name="sh", input=TEXT))]),
        dict(tool_calls=[dict(index=0, function=dict(name=TEXT))]),
        dict(reasoning=TEXT),
        dict(reasoning_details=[dict(type="reasoning.text", text=TEXT)]),
        dict(a_field_of_tomorrow=dict(note=TEXT)),
        dict(tool_calls=[dict(index=0, type="song", song=dict(words=TEXT))]),
        dict(content=[dict(type="text", text=TEXT)]),
        dict(content=[dict(type="thinking", thinking=[dict(type="text", text=TEXT)])]),
    ],
)
def test_text_that_hides_beside_the_content_is_read(delta):
    """Reasoning, arguments of calls and parts come to the client as well."""

    def hidden(handler, _):
        choice = dict(index=0, delta=delta, finish_reason=None)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(event("", choices=[choice]) + b"data: [DONE]\n\n")

    with upstream(hidden) as (_, where), serve(flagging(), upstream=where) as url:
        found = events(url)
    assert found[-2]["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    "choice",
    [
        dict(text=TEXT),
        dict(delta=dict(role="assistant"), message=dict(content=TEXT)),
        dict(message=dict(tool_calls=[dict(type="custom", custom=dict(name="sh", input=TEXT))])),
    ],
)
def test_all_text_of_a_choice_is_read_wherever_it_stands(choice):
    def hidden(handler, _):
        handler.say(json.dumps(dict(id="up", choices=[dict(index=0, **choice)])).encode())

    with upstream(hidden) as (_, where), serve(flagging(), upstream=where) as url:
        [answered] = post(f"{url}{CHAT}", json=chat(passed())).json()["choices"]
    assert answered["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    "part",
    [
        dict(tool_calls=[dict(index=0, type="song", song=dict(words="la"))]),
        dict(content=[dict(type="song", words="la")]),
        dict(audio=dict(id="a", data="UklGRg==")),
        dict(images=[dict(type="image_url", image_url=dict(url="data:image/png;base64,iVBO"))]),
    ],
)
@pytest.mark.parametrize("policy", ["block", "shadow"])
def test_kinds_that_are_not_known_are_not_sent_on(part, policy):
    """They may be no plain text; a shadow sends everything on."""

    def odd(handler, body):
        name = "delta" if body.get("stream") else "message"
        choice = {"index": 0, name: part}
        answer = json.dumps(dict(id="up", choices=[choice])).encode()
        if not body.get("stream"):
            return handler.say(answer)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(event("", choices=[choice]) + b"data: [DONE]\n\n")
        return None

    how = dict(reply_policy=policy)
    with upstream(odd) as (_, where), serve(with_threshold(1e6), upstream=where, **how) as url:
        whole, streamed = post(f"{url}{CHAT}", json=chat(passed())), events(url)
    is_shadow = policy == "shadow"
    assert whole.status_code == (200 if is_shadow else 502)
    assert [any("error" in one for one in streamed if one != "[DONE]")] == [not is_shadow]
    assert (part in [c["delta"] for one in streamed[:1] for c in one.get("choices", ())]) == (
        is_shadow
    )


@pytest.mark.parametrize(
    "choices", [[1], 3, [dict(message="text")], [dict(message=dict(tool_calls=["f"]))]]
)
def test_choices_of_another_shape_are_the_upstreams_failure(choices):
    def odd(handler, _):
        handler.say(json.dumps(dict(id="up", choices=choices)).encode())

    with upstream(odd) as (_, where), serve(with_threshold(1e6), upstream=where) as url:
        answer = post(f"{url}{CHAT}", json=chat(passed()))
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_error")


def test_a_reply_that_is_too_long_to_read_is_not_sent_on():
    def endless(handler, _):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(event("word " * 40))
        handler.wfile.write(b"data: [DONE]\n\n")

    guard = with_threshold(1e6)
    with upstream(endless) as (_, where), serve(guard, upstream=where, hold_tokens=2) as url:
        found = events(url)
    assert "error" in found[-1]
    assert len(text_of(found)) < 40 * 200


def test_prompts_are_guarded_as_before():
    guard = replace(with_threshold(1e6), threshold=-1e6)
    with upstream(streams) as (seen, where), serve(guard, upstream=where) as url:
        answer = post(f"{url}{CHAT}", json=chat(PROMPTS[0])).json()
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    assert not [body for body in seen if isinstance(body, dict)]


@pytest.mark.parametrize("hold", [1, 4])
def test_a_cut_stream_is_still_events_of_one_object_each(hold):
    """A blank line ends an event: without one, what was sent and the cut would be one."""
    with (
        upstream(streams) as (_, where),
        serve(flagging(), upstream=where, hold_tokens=hold) as url,
    ):
        text = post(f"{url}{CHAT}", json=chat(passed(), stream=True)).text
    *found, end = text.split("\n\n")
    assert end == ""
    assert all(one.startswith("data: ") and "\n" not in one for one in found)
