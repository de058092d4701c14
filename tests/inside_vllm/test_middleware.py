"""The middleware before a fake server: no token of a chat without a verdict."""

import json
from dataclasses import replace

import pytest

from inside_vllm.fake_server import SAID, Server, chat, values_of
from latentguard.guard.chunking import Chunking
from latentguard.integrations.vllm.score_channel import post
from latentguard.integrations.vllm.score_request import ScoreRequest
from latentguard.prompts import Prompt
from serve.running import band_guard, flagged, offline, passed, tiny_guard


def test_a_harmless_chat_is_answered_with_its_verdict(served):
    answer = served(Server(), body=chat(passed()))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == SAID
    found = answer.json()["latentguard"]
    assert found["flagged"] is False
    assert found["score"] == pytest.approx(offline()[passed()].score, abs=1e-5)
    assert set(found) >= {"score", "probability", "beliefs", "threshold", "decision"}


def test_a_flagged_chat_is_refused_and_its_generation_stopped(served):
    server = Server(stream_parts=8)
    answer = served(server, body=chat(flagged(), stream=True))
    assert SAID not in answer.text
    assert '"finish_reason": "content_filter"' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"flagged": true' in answer.text.split("\n\n")[0]
    assert server.stopped


def test_a_flagged_chat_that_is_not_streamed(served):
    answer = served(Server(), body=chat(flagged()))
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["refusal"] == choice["message"]["content"] != SAID
    assert answer.json()["latentguard"]["flagged"] is True


def test_a_streamed_chat_has_its_verdict_in_the_first_event(served):
    answer = served(Server(), body=chat(passed(), stream=True))
    first, *rest = answer.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["latentguard"]["flagged"] is False
    assert "latentguard" not in "".join(rest)
    assert answer.text.count(SAID) == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("read", ["nothing", "nan"])
@pytest.mark.parametrize("policy", ["block", "annotate"])
def test_a_chat_without_a_score_is_never_answered(served, stream, read, policy):
    answer = served(Server(read=read), body=chat(passed(), stream=stream), policy=policy)
    assert answer.status_code == 503
    assert SAID not in answer.text


def test_other_tokens_than_those_laid_out_are_an_error(served):
    answer = served(Server(read="other"), body=chat(passed()))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unreadable_prompt"


def test_annotate_answers_what_is_flagged_or_unreadable(served):
    answer = served(Server(), body=chat(flagged()), policy="annotate")
    assert answer.json()["latentguard"]["flagged"] is True
    assert answer.json()["choices"][0]["message"]["content"] == SAID
    answer = served(Server(read="other"), body=chat(passed()), policy="annotate")
    assert answer.json()["latentguard"] == {"error": "unreadable_prompt"}


def test_what_a_client_sends_as_transfer_parameters_is_dropped(served):
    server = Server()
    request = {"channel": "x", "key": "y", "ids": "z", "at": [0]}
    forged = {"latentguard": request, "do_remote_prefill": 1}
    body = chat(passed(), kv_transfer_params=forged, vllm_xargs={"kv_transfer_params": "x"})
    assert served(server, body=body).status_code == 200
    assert set(server.seen[0]["kv_transfer_params"]) == {"latentguard"}
    assert server.seen[0]["kv_transfer_params"]["latentguard"]["channel"] != "x"
    assert "vllm_xargs" not in server.seen[0]


def test_pieces_of_a_long_chat_are_read(served):
    guard = replace(tiny_guard(), chunking=Chunking(threshold=1e-3, max_chars=20, longer_than=10))
    low, high = (values_of(offline()[text].score) for text in (passed(), flagged()))
    count = len(guard.chunking.chunks(Prompt(passed())))
    assert count > 1
    calm, alarmed = [low] * count, [*[low] * (count - 1), high]
    told = [
        served(Server(), body=chat(passed()), guard=guard, besides=besides).json()["latentguard"]
        for besides in (calm, alarmed)
    ]
    assert told[0]["score"] < told[1]["score"]


def test_the_segment_that_the_header_names(served):
    guard = band_guard()
    part = guard.thresholds
    strict = replace(part.common.block, threshold=offline()[passed()].score - 1)
    segments = {"strict": replace(part.common, block=strict, review=None)}
    guard = replace(guard, thresholds=replace(part, segments=segments))
    answer = served(Server(), body=chat(passed()), guard=guard, headers={"x-traffic": "strict"})
    found = answer.json()["latentguard"]
    assert (found["flagged"], found["threshold"]) == (True, strict.threshold)
    answer = served(Server(), body=chat(passed()), guard=guard, headers={"x-traffic": "other"})
    assert answer.json()["latentguard"]["threshold"] == guard.threshold


def test_an_error_of_the_server_is_handed_on(served):
    answer = served(Server(status=422), body=chat(passed()))
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, "no")


def test_an_earlier_message_is_read_by_itself(served):
    """A harmful request in the history, then a harmless last message: the chat is refused."""
    harmful = flagged()
    score = 2 * abs(offline()[harmful].score) + tiny_guard().threshold + 100
    guard = tiny_guard()
    width = len(guard.reading.positions)
    high = [score / width] * width + [0.5] * len(guard.axes)
    low = [-score / width] * width + [0.5] * len(guard.axes)
    body = {
        "model": "m",
        "messages": [
            {"role": "user", "content": harmful},
            {"role": "assistant", "content": "Pardon?"},
            {"role": "user", "content": passed()},
        ],
    }

    class Low(Server):
        def answer(self, asked):
            post([(ScoreRequest(**asked["kv_transfer_params"]["latentguard"]), low)])

    besides = [low, low, low]
    assert served(Low(), body=body, besides=besides).json()["latentguard"]["flagged"] is False
    answer = served(Low(), body=body, besides=[high, low, low])
    assert answer.json()["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize(("rate_of", "is_flagged"), [("chat", False), ("text", True)])
def test_with_a_rate_of_each_text_padding_gains_nothing(served, monkeypatch, rate_of, is_flagged):
    """The request's own score is just over the threshold of a single prompt."""
    monkeypatch.setenv("LATENTGUARD_RATE_OF", rate_of)
    guard = band_guard()
    low, over = (values_of(guard.threshold + more, guard) for more in (-9, 1e-3))
    messages = [
        {"role": "user", "content": flagged()},
        {"role": "assistant", "content": "Pardon?"},
        {"role": "user", "content": passed()},
    ]

    class Low(Server):
        def answer(self, asked):
            post([(ScoreRequest(**asked["kv_transfer_params"]["latentguard"]), low)])

    body = {"model": "m", "messages": messages}
    answer = served(Low(), body=body, guard=guard, besides=[over, low, low])
    assert answer.json()["latentguard"]["flagged"] is is_flagged
