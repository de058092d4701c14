"""A service that asks a second opinion of what lies in the review band."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from latentguard.guard.cascade import Cascade
from latentguard.serve.config import ServeConfig
from latentguard.serve.server import GuardSource
from serve.running import (
    PROMPTS,
    band_guard,
    flagged,
    get,
    passed,
    post,
    reviewed,
    running,
    stream,
    tiny_model,
)

REFUSAL = ServeConfig().refusal


class Says:
    """Says the same of each prompt, once it is let."""

    at_once = 4
    is_graded = False

    def __init__(self, opinion, *, wait=lambda: None):
        self.name, self.opinion, self.wait = f"says {opinion}", opinion, wait
        self.asked, self.loads = [], 0

    def load(self):
        self.loads += 1

    def score(self, prompts):
        self.asked += [prompt.text for prompt in prompts]
        self.wait()
        return [{"block": 1.0, "allow": -1.0, "failed": None}[self.opinion]] * len(prompts)


def asking(second, **how):
    """A service with a second opinion, as the command line makes one."""

    def opener():
        second.load()
        return Cascade.of(band_guard(), second).guard, tiny_model()

    def bind(guard, model):
        return Cascade.of(guard, second).guard

    return running(opener, guards=GuardSource(bind=bind, second_opinion=second), **how)


def moderated(url, text):
    (result,) = post(f"{url}/v1/moderations", json={"input": text}).json()["results"]
    return result


def chat(url, *texts, **how):
    messages = [dict(role="user", content=text) for text in texts]
    body = dict(messages=messages, max_tokens=4, temperature=0) | how
    return post(f"{url}/v1/chat/completions", json=body).json()


def said(answer):
    return answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("opinion", "decision", "is_flagged"),
    [
        ("allow", "allow", False),
        ("block", "block", True),
        ("failed", "review", False),
    ],
)
class TestDecision:
    def test_of_a_moderation(self, opinion, decision, is_flagged, tmp_path):
        audit = tmp_path / "audit.jsonl"
        second = Says(opinion)
        with asking(second, audit=audit) as url:
            result = moderated(url, reviewed())
            others = [moderated(url, text)["latentguard"] for text in (passed(), flagged())]
            page = get(f"{url}/metrics").text
        assert result["flagged"] is is_flagged
        assert result["latentguard"]["decision"] == decision
        assert result["latentguard"]["second_opinion"] == opinion
        assert any(result["categories"].values()) is is_flagged
        assert (max(result["category_scores"].values()) > 0.5) is is_flagged
        assert [one["second_opinion"] for one in others] == [None, None]
        assert [one["decision"] for one in others] == ["allow", "block"]
        assert second.asked == [reviewed()]
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        assert [line["second_opinion"] for line in lines] == [opinion, None, None]
        assert lines[0]["decision"] == decision
        assert f'latentguard_second_opinions_total{{opinion="{opinion}"}} 1.0' in page

    def test_of_a_chat(self, opinion, decision, is_flagged):
        with asking(Says(opinion)) as url:
            answer = chat(url, reviewed())
            body = dict(messages=[dict(role="user", content=reviewed())], stream=True, max_tokens=4)
            with stream("POST", f"{url}/v1/chat/completions", json=body) as streamed:
                first = next(line for line in streamed.iter_lines() if line)
        assert (said(answer) == REFUSAL) is is_flagged
        event = json.loads(first.removeprefix("data: "))
        for note in (answer["latentguard"], event["latentguard"]):
            assert (note["decision"], note["second_opinion"]) == (decision, opinion)


class TestChats:
    def test_it_is_asked_of_each_text_in_the_band_and_once(self):
        second = Says("allow")
        with asking(second) as url:
            answer = chat(url, reviewed())
            asked = list(second.asked)
            assert chat(url, reviewed())["latentguard"] == answer["latentguard"]
        assert set(asked) == {reviewed()}
        assert second.asked == asked  # the opinion was kept

    def test_one_that_failed_is_asked_again(self):
        second = Says("failed")
        with asking(second) as url:
            chat(url, reviewed())
            count = len(second.asked)
            second.opinion = "block"
            assert said(chat(url, reviewed())) == REFUSAL
        assert len(second.asked) == 2 * count

    def test_a_blocked_chat_is_not_asked_of(self):
        second = Says("allow")
        with asking(second) as url:
            assert said(chat(url, flagged())) == REFUSAL
        assert second.asked == []

    def test_a_failure_is_blocked_where_review_is(self):
        with asking(Says("failed"), on_review="block") as url:
            assert said(chat(url, reviewed())) == REFUSAL
        with asking(Says("allow"), on_review="block") as url:
            assert said(chat(url, reviewed())) != REFUSAL


class TestWaiting:
    def test_others_are_served_while_it_is_asked(self):
        release = threading.Event()
        second = Says("block", wait=lambda: release.wait(60))
        with asking(second) as url, ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(moderated, url, reviewed()), pool.submit(chat, url, reviewed())]
            deadline = time.monotonic() + 60
            while len(second.asked) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert get(f"{url}/readyz").status_code == 200
            assert not moderated(url, passed())["flagged"]
            assert said(chat(url, passed())) != REFUSAL
            assert not any(one.done() for one in waiting)
            release.set()
            assert waiting[0].result()["flagged"]
            assert said(waiting[1].result()) == REFUSAL

    def test_one_that_takes_too_long_has_failed(self):
        release = threading.Event()
        second = Says("block", wait=lambda: release.wait(60))
        with asking(second, deadline=1.0) as url:
            result = moderated(url, reviewed())
            release.set()
        assert result["latentguard"]["second_opinion"] == "failed"
        assert result["latentguard"]["decision"] == "review"
        assert not result["flagged"]


def test_a_guard_that_was_calibrated_alone_promises_nothing_with_it():
    with asking(Says("allow")) as url:
        verdict = moderated(url, reviewed())["latentguard"]
        promise = get(f"{url}/v1/guard").json()
    assert (verdict["calibrated"], verdict["operating_point"]) == (False, None)
    assert promise["promise"] == "not calibrated, so nothing is promised"


def test_without_one_all_is_as_before():
    with running(lambda: (band_guard(), tiny_model())) as url:
        results = [moderated(url, text)["latentguard"] for text in PROMPTS[:10]]
    assert {one["second_opinion"] for one in results} == {None}
    assert all(one["calibrated"] for one in results)
