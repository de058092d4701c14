"""A guard with a band to review: what clients, the log, the metrics and the page's data say."""

import json
import re

import pytest

from latentguard.serve.config import ServeConfig
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


def opener():
    return band_guard(), tiny_model()


def chat(url, text, **how):
    body = dict(messages=[dict(role="user", content=text)], max_tokens=4, temperature=0) | how
    return post(f"{url}/v1/chat/completions", json=body).json()


def said(answer):
    return answer["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def url():
    with running(opener) as made:
        yield made


def test_decisions_are_those_of_scan(url):
    expected = [v.decision for v in band_guard().scan(tiny_model(), PROMPTS)]
    assert set(expected) == {"allow", "review", "block"}
    moderated = post(f"{url}/v1/moderations", json={"input": PROMPTS}).json()["results"]
    assert [r["latentguard"]["decision"] for r in moderated] == expected
    scored = post(f"{url}/v1/score", json={"input": PROMPTS}).json()["results"]
    assert [r["decision"] for r in scored] == expected


def test_what_is_to_be_reviewed_is_not_flagged(url):
    (result,) = post(f"{url}/v1/moderations", json={"input": reviewed()}).json()["results"]
    assert not result["flagged"]
    assert not any(result["categories"].values())
    assert max(result["category_scores"].values()) <= 0.5


def test_the_guard_tells_of_its_band(url):
    guard = get(f"{url}/v1/guard").json()
    assert guard["threshold"] > guard["review"]
    assert guard["on_review"] == "annotate"


class TestChat:
    def test_it_is_answered_and_marked(self, url):
        answer = chat(url, reviewed())
        assert answer["latentguard"]["decision"] == "review"
        assert answer["choices"][0]["finish_reason"] != "content_filter"
        assert [chat(url, t)["latentguard"]["decision"] for t in (passed(), flagged())] == [
            "allow",
            "block",
        ]

    def test_so_is_a_stream(self, url):
        body = dict(messages=[dict(role="user", content=reviewed())], stream=True, max_tokens=4)
        with stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            first = next(line for line in answer.iter_lines() if line)
        assert json.loads(first.removeprefix("data: "))["latentguard"]["decision"] == "review"

    def test_pass_marks_nothing(self, url):
        with running(opener, on_review="pass") as other:
            answers = [chat(other, text) for text in (reviewed(), passed())]
        assert said(answers[0]) == said(chat(url, reviewed()))
        assert answers[0]["latentguard"].keys() == answers[1]["latentguard"].keys()
        assert "decision" not in answers[0]["latentguard"]

    def test_block_refuses(self):
        with running(opener, on_review="block") as url:
            refused, answered = chat(url, reviewed()), chat(url, passed())
        assert said(refused) == REFUSAL
        assert refused["choices"][0]["finish_reason"] == "content_filter"
        assert refused["latentguard"]["decision"] == "review"
        assert not refused["latentguard"]["flagged"]
        assert said(answered) != REFUSAL

    @pytest.mark.parametrize("policy", ["annotate", "shadow"])
    def test_policies_that_answer_flagged_chats_answer_these(self, policy):
        with running(opener, policy=policy) as url:
            answer = chat(url, reviewed())
        assert said(answer) != REFUSAL
        assert ("latentguard" in answer) == (policy == "annotate")


@pytest.mark.parametrize(
    ("on_review", "action"), [("pass", "review"), ("annotate", "review"), ("block", "block")]
)
def test_the_log_and_the_metrics(tmp_path, on_review, action):
    audit = tmp_path / "audit.jsonl"
    with running(opener, audit=audit, on_review=on_review) as url:
        for text in (passed(), reviewed(), flagged()):
            chat(url, text)
        post(f"{url}/v1/moderations", json={"input": [reviewed(), "long " * 900]})
        post(f"{url}/v1/moderations", json={"input": reviewed()})
        page = get(f"{url}/metrics").text
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [(line["action"], line.get("decision")) for line in lines] == [
        ("pass", "allow"),
        (action, "review"),
        ("block", "block"),
        ("score", "review"),
    ]
    counted = re.findall(
        r'^latentguard_verdicts_total\{action="(\w+)",decision="(\w+)",endpoint="(\w+)",'
        r'guard="default"\} (\S+)',
        page,
        re.MULTILINE,
    )
    assert set(counted) == {
        ("pass", "allow", "chat", "1.0"),
        (action, "review", "chat", "1.0"),
        ("block", "block", "chat", "1.0"),
        ("error", "none", "moderations", "2.0"),
        ("score", "review", "moderations", "1.0"),
    }


def test_a_guard_without_a_band(service):
    assert get(f"{service}/v1/guard").json()["review"] is None
    assert chat(service, passed())["latentguard"]["decision"] == "allow"
