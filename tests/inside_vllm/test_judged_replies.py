"""Replies inside vLLM, before a fake server: no token is shown that was not read."""

import json
import math
from dataclasses import replace

import pytest
import torch

from inside_vllm.fake_server import PROMPT_IDS, SAID, Replies, Server, chat
from latentguard.guard.replies import WINDOW, ReplyProbe
from latentguard.integrations.vllm import middleware
from latentguard.integrations.vllm.chat_guard import ChatGuard
from latentguard.probes.probe import Probe
from latentguard.prompts import Prompt
from serve.running import flagged, passed, tiny_guard, tiny_model

HARMFUL = float(WINDOW)
"""The score of a token that alone brings the running score to 1."""

REFUSAL = "I'm sorry, but I can't help with that."


def judging_guard(threshold=0.5, bias=0.0):
    probe = Probe("linear", (1,), torch.zeros(1, tiny_guard().probe.weight.shape[-1]), bias)
    return replace(
        tiny_guard(), replies=ReplyProbe(probe, (1.0, 0.0), 1.0, {}, threshold=threshold)
    )


@pytest.fixture
def ask(served, monkeypatch):
    """Ask a guarded fake server: the events of a stream, or the body of an answer in one."""

    def go(server, *, stream=True, policy="cut", hold=0, last=None, guard=None, **more):
        if policy:
            monkeypatch.setenv("LATENTGUARD_REPLY_POLICY", policy)
        monkeypatch.setenv("LATENTGUARD_HOLD_TOKENS", str(hold))
        body = chat(passed(), stream=stream) | more
        answer = served(server, body=body, guard=guard or judging_guard(), last=last)
        if not stream or answer.headers["content-type"] == "application/json":
            return answer.json()
        return [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]

    return go


def objects(events):
    return [json.loads(event) for event in events if event != "[DONE]"]


def text_of(events):
    choices = [choice for one in objects(events) for choice in one.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def finish_of(events):
    choices = [choice for one in objects(events) for choice in one.get("choices", ())]
    return [c["finish_reason"] for c in choices if c.get("finish_reason")]


@pytest.mark.parametrize("hold", [0, 2, 100])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_harmless_stream_goes_on_whole_with_its_verdict(ask, hold, at_once):
    events = ask(Replies(1, 2, 3, 0, at_once=at_once), hold=hold)
    assert text_of(events) == "<0><1><2>"
    assert finish_of(events) == ["stop"]
    assert events[-1] == "[DONE]"
    said = objects(events)[-1]["latentguard"]["reply"]
    assert (said["tokens"], said["score"], said["flagged"]) == (3, 6 / WINDOW, False)


def test_the_first_event_has_the_verdict_on_the_prompt_and_no_event_has_token_ids(ask):
    events = ask(Replies(1, 2, 0))
    assert objects(events)[0]["latentguard"]["flagged"] is False
    assert "token_ids" not in "".join(events)
    shown = ask(Replies(1, 2, 0), return_token_ids=True)
    assert objects(shown)[0]["prompt_token_ids"] == PROMPT_IDS
    assert objects(shown)[1]["choices"][0]["token_ids"] == [0]


@pytest.mark.parametrize(("hold", "shown"), [(0, "<0><1>"), (1, "<0>"), (8, "")])
def test_a_flagged_stream_is_cut_before_the_flagged_token_and_stopped(ask, hold, shown):
    server = Replies(0, 0, HARMFUL, *[0] * 200)
    events = ask(server, hold=hold)
    assert text_of(events) == shown
    assert finish_of(events) == ["content_filter"]
    assert events[-1] == "[DONE]"
    said = objects(events)[-1]["latentguard"]["reply"]
    assert (said["flagged"], said["flagged_at"], said["decision"]) == (True, 3, "block")
    assert server.stopped
    assert server.written < 200


def test_a_flagged_stream_that_is_blocked_shows_nothing_of_it(ask):
    server = Replies(0, 0, HARMFUL, *[0] * 200)
    events = ask(server, policy="block")
    assert text_of(events) == REFUSAL
    assert finish_of(events) == ["content_filter"]
    assert server.stopped
    assert text_of(ask(Replies(0, 0, 0, 0), policy="block")) == "<0><1><2>"


def test_annotated_events_have_the_running_score(ask):
    events = ask(Replies(0, HARMFUL, 0, 0), policy="annotate")
    assert text_of(events) == "<0><1><2>"
    noted = [one.get("latentguard", {}) for one in objects(events)]
    assert [note["reply_score"] for note in noted if "reply_score" in note] == [0.0, 1.0, 1.0]
    assert noted[-1]["reply"]["flagged_at"] == 2


def test_a_shadow_changes_nothing_and_logs(ask, caplog):
    events = ask(Replies(0, HARMFUL, 0, 0), policy="shadow")
    assert text_of(events) == "<0><1><2>"
    assert '"reply"' not in "".join(events)
    assert "A reply of 3 tokens was flagged at token 2" in caplog.text
    assert "<0>" not in caplog.text


def test_a_policy_that_annotates_chats_annotates_replies(served):
    answer = served(
        Replies(0, HARMFUL, 0), body=chat(passed()), guard=judging_guard(), policy="annotate"
    )
    assert answer.json()["choices"][0]["message"]["content"] == "<0><1>"
    assert answer.json()["latentguard"]["reply"]["flagged"] is True


@pytest.mark.parametrize("policy", ["cut", "block"])
def test_a_flagged_answer_in_one_is_refused_while_it_is_written(ask, policy):
    server = Replies(0, HARMFUL, *[0] * 300)
    answer = ask(server, stream=False, policy=policy)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] == choice["message"]["refusal"] == REFUSAL
    assert answer["latentguard"]["reply"]["flagged_at"] == 2
    assert answer["latentguard"]["flagged"] is False
    assert server.stopped


def test_a_harmless_answer_in_one_has_both_verdicts_and_no_token_ids(ask):
    answer = ask(Replies(1, 2, 0), stream=False)
    assert answer["choices"][0]["message"]["content"] == "<0><1>"
    assert "token_ids" not in json.dumps(answer)
    assert answer["latentguard"]["flagged"] is False
    assert answer["latentguard"]["reply"]["tokens"] == 2


def test_an_answer_in_one_is_never_stopped_for_what_a_stop_text_cuts_off(ask):
    """Behind a stop text the engine may compute tokens that nobody is shown."""

    class Beyond(Replies):
        def whole(self, asked):
            body = super().whole(asked)
            body["choices"][0]["token_ids"] = [0, 1]
            return body

    server = Beyond(0, 0, HARMFUL, 0, 0, stop_reason="<2>")
    answer = ask(server, stream=False, stop=["<2>"])
    assert answer["latentguard"]["reply"]["tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("policy", ["cut", "block", "annotate"])
def test_the_end_token_is_not_judged_where_the_engine_has_read_it(ask, stream, policy):
    """An engine that schedules ahead computes it before it knows that the reply is over."""

    class Ahead(Replies):
        def tell(self, asked, n, choice=0):
            super().tell(asked, n)
            if n == len(self.scores) - 2:
                super().tell(asked, n + 1)

    found = ask(Ahead(0, 0, 0, HARMFUL), stream=stream, policy=policy)
    note = objects(found)[-1]["latentguard"] if stream else found["latentguard"]
    assert (note["reply"]["tokens"], note["reply"]["flagged"]) == (3, False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "how", [dict(finish="length"), dict(stop_reason="<2>"), dict(finish="tool_calls")]
)
def test_the_last_token_is_read_unless_it_ends_the_reply(ask, stream, how):
    harmless = ask(Replies(0, 0, 0, **how), stream=stream, last=0.0)
    note = harmless["latentguard"] if not stream else objects(harmless)[-1]["latentguard"]
    assert note["reply"]["tokens"] == 3
    harmful = ask(Replies(0, 0, 0, **how), stream=stream, last=HARMFUL)
    if stream:
        assert (text_of(harmful), finish_of(harmful)) == ("<0><1>", ["content_filter"])
    else:
        assert harmful["choices"][0]["finish_reason"] == "content_filter"
        assert harmful["latentguard"]["reply"]["flagged_at"] == 3


def test_a_token_that_ends_the_reply_and_is_shown_is_read(ask):
    events = ask(Replies(0, 0, 0), last=HARMFUL, include_stop_str_in_output=True)
    assert finish_of(events) == ["content_filter"]


@pytest.mark.parametrize("last", [math.nan, RuntimeError("no")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_last_token_that_cannot_be_read_is_not_shown(ask, last, stream):
    found = ask(Replies(0, 0, 0, finish="length"), stream=stream, last=last)
    assert "<2>" not in json.dumps(found)
    error = found["error"] if not stream else objects(found)[-1]["error"]
    assert error["code"] == "unavailable"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("scores", [(0, 0, 0, 0, 0), (0, math.nan, 0, 0, 0)])
@pytest.mark.parametrize("policy", ["cut", "block", "annotate"])
def test_a_number_that_is_missing_ends_the_reply(ask, stream, scores, policy):
    lost = () if any(map(math.isnan, scores)) else (1,)
    server = Replies(*scores, lost=lost)
    found = ask(server, stream=stream, policy=policy)
    assert "<1>" not in json.dumps(found)
    error = found["error"] if not stream else objects(found)[-1]["error"]
    assert error["code"] == "unavailable"
    assert "finish_reason" not in json.dumps(error)


@pytest.mark.parametrize("stream", [False, True])
def test_a_shadow_sends_on_what_cannot_be_read(ask, stream, caplog):
    found = ask(Replies(0, 0, 0, 0, lost=(1,)), stream=stream, policy="shadow")
    text = text_of(found) if stream else found["choices"][0]["message"]["content"]
    assert text == "<0><1><2>"
    assert "A reply was not judged" in caplog.text


def test_a_number_that_comes_twice_ends_the_reply(ask):
    class Twice(Replies):
        def tell(self, asked, n, choice=0):
            super().tell(asked, n)
            super().tell(asked, n)

    assert "error" in objects(ask(Twice(0, 0, 0, 0)))[-1]


@pytest.mark.parametrize("field", ["content", "reasoning", "tool_calls", "unheard_of"])
def test_text_without_its_token_ids_is_not_shown(ask, field):
    class Hiding(Replies):
        async def event(self, send, data):
            for choice in data["choices"]:
                if choice.pop("token_ids", None):
                    choice["delta"] = {field: choice["delta"]["content"]}
            await super().event(send, data)

    events = ask(Hiding(0, 0, 0))
    assert "<0>" not in "".join(events)
    assert "error" in objects(events)[-1]


def test_a_server_that_breaks_off_ends_in_an_error(ask):
    class Broken(Replies):
        async def event(self, send, data):
            if self.written < 3:
                return await super().event(send, data)
            await super().event(send, {"error": {"message": "it broke"}})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
            raise OSError

    events = ask(Broken(0, 0, 0, 0, 0, 0), hold=100)
    assert text_of(events) == ""
    assert objects(events)[-1]["error"]["message"] == "it broke"


def test_an_answer_that_the_server_gave_up_is_an_error(ask):
    class GaveUp(Replies):
        def whole(self, asked):
            return None

    assert ask(GaveUp(0, 0), stream=False)["error"]["code"] == "unavailable"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(echo=True), "'echo' shows text"),
        (dict(include_reasoning=False), "'include_reasoning' hides tokens"),
        (dict(n="2"), "'n' has to be"),
    ],
)
def test_replies_that_cannot_be_judged_are_refused(ask, more, words):
    assert words in ask(Replies(0, 0), **more)["error"]["message"]


def test_each_of_several_replies_is_judged_and_one_that_is_flagged_ends_all(ask):
    class Two(Replies):
        def __init__(self, first, second):
            super().__init__(*first)
            self.both = first, second

        async def write(self, asked, send):
            self.answer(asked)
            head = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            for n in range(len(self.both[0])):
                for choice, scores in enumerate(self.both):
                    self.scores = scores
                    if n:
                        self.tell(asked, n - 1, choice)
                    last = n == len(scores) - 1
                    one = {"index": choice, "delta": {"content": "" if last else f"<{choice}.{n}>"}}
                    one |= {"finish_reason": "stop" if last else None, "token_ids": [n]}
                    await self.event(send, {"choices": [one]})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    events = ask(Two((0, 0, 0), (0, 0.5, 0)), n=2)
    assert text_of(events).count(".") == 4
    assert finish_of(events) == ["stop", "stop"]
    assert objects(events)[-1]["latentguard"]["reply"]["score"] == 0.5 / WINDOW
    events = ask(Two((0, 0, 0, 0), (0, HARMFUL, 0, 0)), n=2)
    assert "<1.1>" not in text_of(events)
    assert finish_of(events)[-1] == "content_filter"


def test_usage_comes_after_the_reply_was_read(ask):
    events = ask(Replies(0, 0, 0), hold=9, stream_options={"include_usage": True})
    assert [event == "[DONE]" for event in events].index(True) == len(events) - 1
    assert objects(events)[-2]["usage"]["completion_tokens"] == 3


def test_a_prompt_that_is_flagged_is_refused_as_before(served):
    answer = served(Replies(0, 0, 0), body=chat(flagged(), stream=True), guard=judging_guard())
    assert REFUSAL in answer.text
    assert "<0>" not in answer.text


def test_replies_to_a_prompt_that_could_not_be_read_are_judged(served):
    answer = served(
        Replies(0, HARMFUL, 0, prompt="other"),
        body=chat(passed()),
        guard=judging_guard(),
        policy="annotate",
    )
    assert answer.json()["latentguard"]["error"] == "unreadable_prompt"
    assert answer.json()["latentguard"]["reply"]["flagged"] is True


def test_an_error_of_the_server_is_handed_on(served):
    answer = served(Server(status=422), body=chat(passed()), guard=judging_guard())
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, "no")


def test_without_a_reply_part_requests_and_answers_stay_what_they_were(served):
    server = Server()
    answer = served(server, body=chat(passed(), stream=True))
    assert answer.text.count(SAID) == 4
    [asked] = server.seen
    assert set(asked) == {"model", "messages", "stream", "kv_transfer_params"}
    assert asked["kv_transfer_params"]["latentguard"]["tail"] is None


@pytest.mark.parametrize(
    ("asked", "usual", "sent"),
    [
        ({}, None, 10),
        ({}, 4, None),
        ({"max_tokens": 10}, None, 10),
        ({"max_tokens": 9}, None, None),
        ({"max_completion_tokens": 1000}, 4, 10),
    ],
)
def test_the_place_where_the_last_token_is_read_stays_free(served, monkeypatch, asked, usual, sent):
    server = Replies(0, 0)
    size = len(server.model.chat([Prompt(passed())])[0].ids)
    most = size + 11

    async def opened(state, rate_of):
        return ChatGuard(judging_guard(), tiny_model().tokenizer, most=most, usual_reply=usual)

    monkeypatch.setattr(middleware, "open_chat_guard", opened)
    assert served(server, body=chat(passed()) | asked).status_code == 200
    assert server.seen[-1].get("max_completion_tokens") == sent
    most = size + 1
    assert "no room for a reply" in served(server, body=chat(passed())).text
