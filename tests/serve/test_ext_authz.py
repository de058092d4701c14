"""What Envoy's ext_authz filter is told: the client's own bytes go on, or nothing does."""

import json

import pytest

from serve.running import flagged, get, passed, post, running
from serve.test_upstream import user

PATH = "/ext_authz/v1/chat/completions"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    audit = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    with running(audit=audit) as url:
        url.audit = audit
        yield url


def ask(url, body, path=PATH, **headers):
    """As Envoy asks: the client's method, path and body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return post(f"{url}{path}", content=content, headers=named)


def chat(text, **more):
    return {"model": "big", "messages": user(text), **more}


def test_a_chat_goes_on_or_does_not(url):
    allowed = ask(url, chat(passed()))
    assert (allowed.status_code, allowed.content) == (200, b"")
    assert allowed.headers["x-latentguard-decision"] == "allow"
    refused = ask(url, chat(flagged()))
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "content_filter"
    first, second = map(json.loads, url.audit.read_text().splitlines()[-2:])
    assert [(line["endpoint"], line["action"]) for line in (first, second)] == [
        ("ext_authz", "pass"),
        ("ext_authz", "block"),
    ]
    assert not url.audit.with_name("audit.jsonl.rejected").read_text()
    page = get(f"{url}/metrics").text
    assert 'latentguard_requests_total{endpoint="/ext_authz",status="403"}' in page


def test_every_message_is_read(url):
    messages = [*user(flagged()), dict(role="assistant", content="No."), *user(passed())]
    assert ask(url, {"messages": messages}).status_code == 403


TWICE = b'{"messages": [{"role": "user", "content": "%s", "content": "%s"}]}'
PARTS = [{"type": "text", "text": word} for word in ("How ", "are you?")]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (TWICE % (b"Hello.", b"Hello."), "names a key twice"),
        (b'{"messages": [], "messages": [{"role": "user", "content": "Hello."}]}', "twice"),
        ({"messages": user(PARTS)}, "several parts"),
        ({"messages": user("Hello.<|im_end|>")}, "control token"),
        ({"messages": user("Hello."), "chat_template": "{{ messages }}"}, "no parameter"),
        ({"messages": user("Hello."), "temperature": float("nan")}, "number that JSON"),
        ({"messages": user([{"type": "image_url", "image_url": {}}])}, "reads text only"),
        (json.dumps({"messages": user("Hello.")}).encode("utf-16"), "UTF-8"),
        (b"\xef\xbb\xbf" + json.dumps({"messages": user("Hello.")}).encode(), "UTF-8"),
        ({"messages": []}, "'messages' should be a list of 1 or more"),
        ({"prompt": "Hello."}, "'messages' is missing"),
        ([1], "should be a JSON object"),
        (b"", "not JSON"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(url, body, reason):
    answer = ask(url, body)
    assert answer.status_code == 400, answer.text
    assert reason in answer.text


RESPONSES = "/ext_authz/v1/responses"
SAID = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello."}]}
CALLED = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
RETURNED = {"type": "function_call_output", "call_id": "c1", "output": "Nothing."}
THOUGHT = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}


class TestResponses:
    @pytest.mark.parametrize(
        "more",
        [
            {"input": passed()},
            {"input": [SAID]},
            {"input": [SAID, THOUGHT, CALLED, RETURNED], "instructions": "Be short."},
            {"input": [SAID | {"status": "completed"}, CALLED | {"id": None}], "store": False},
        ],
    )
    def test_what_goes_on_as_it_is(self, url, more):
        assert ask(url, {"model": "big", **more}, RESPONSES).status_code == 200

    @pytest.mark.parametrize(
        "more",
        [
            {"input": flagged()},
            {"input": passed(), "instructions": flagged()},
            {"input": [SAID, RETURNED | {"output": flagged()}]},
            {"input": [SAID, CALLED | {"arguments": flagged()}]},
            {"input": [SAID, THOUGHT | {"summary": [THOUGHT["summary"][0] | {"text": flagged()}]}]},
        ],
    )
    def test_what_is_flagged_does_not(self, url, more):
        assert ask(url, more, RESPONSES).status_code == 403

    @pytest.mark.parametrize(
        ("more", "reason"),
        [
            ({"input": [SAID | {"id": "msg_1"}]}, "rewritten"),
            ({"input": [SAID, CALLED | {"id": "fc_1"}]}, "rewritten"),
            ({"input": [SAID | {"content": SAID["content"] * 2}]}, "rewritten"),
            ({"input": [SAID, THOUGHT | {"content": THOUGHT["summary"]}]}, "rewritten"),
            (
                {"input": [SAID | {"content": [SAID["content"][0] | {"annotations": ["x"]}]}]},
                "rewritten",
            ),
            ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "no type of item"),
            ({"input": "Hello.", "previous_response_id": "r1"}, "has not seen"),
            ({"input": "Hello.<|im_end|>"}, "control token"),
            ({"input": []}, "'input'"),
            ({}, "'input'"),
        ],
    )
    def test_what_would_be_rewritten_is_refused(self, url, more, reason):
        answer = ask(url, more, RESPONSES)
        assert answer.status_code == 400, answer.text
        assert reason in answer.text


def test_one_part_is_the_text(url):
    assert ask(url, {"messages": user(PARTS[:1])}).status_code == 200


def test_a_body_that_was_cut_or_compressed(url):
    assert ask(url, chat(passed()), x_envoy_auth_partial_body="true").status_code == 413
    assert ask(url, chat(passed()), x_envoy_auth_partial_body="false").status_code == 200
    assert ask(url, chat(passed()), content_encoding="gzip").status_code == 400


@pytest.mark.parametrize("path", ["/ext_authz/v1/completions", "/ext_authz/", "/ext_authz/v1/x"])
def test_other_paths_do_not_go_on(url, path):
    answer = ask(url, chat(passed()), path=path)
    assert answer.status_code == 403
    assert "Only chats are judged here" in answer.json()["error"]["message"]
    assert get(f"{url}{PATH}").status_code == 403


def test_escaping_is_refusing_since_nothing_is_rewritten():
    with running(control_tokens="escape") as url:
        assert ask(url, chat("Hello.<|im_end|>")).status_code == 400


def test_policies():
    with running(policy="annotate") as url:
        answer = ask(url, chat(flagged()))
        assert (answer.status_code, answer.headers["x-latentguard-decision"]) == (200, "block")
        assert float(answer.headers["x-latentguard-score"])
    with running(policy="shadow") as url:
        for body in (chat(flagged()), {"messages": user("Hello.<|im_end|>")}):
            answer = ask(url, body)
            assert answer.status_code == 200
            assert not [name for name in answer.headers if name.startswith("x-latentguard")]


def test_nothing_goes_on_without_a_key():
    with running(keys=["k"]) as url:
        assert ask(url, chat(passed())).status_code == 401
        assert ask(url, chat(passed()), authorization="Bearer k").status_code == 200
