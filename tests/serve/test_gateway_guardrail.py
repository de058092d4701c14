"""LiteLLM's generic guardrail contract, as its gateway sends it."""

import json

import pytest

from latentguard.serve.gateway_guardrail import PATH
from serve.running import flagged, passed, post, running


def ask(url, **fields):
    """As the gateway asks: with fields that the guard does not use."""
    body = dict(input_type="request", request_data={"user_api_key_hash": "x"}, litellm_version="1")
    return post(f"{url}{PATH}", json=body | fields, timeout=60)


def user(text):
    return {"role": "user", "content": text}


class TestDecision:
    def test_a_flagged_request_is_blocked_with_a_reason_that_quotes_nothing(self, service):
        answer = ask(service, texts=[flagged()], structured_messages=[user(flagged())]).json()
        assert answer["action"] == "BLOCKED"
        assert answer["blocked_reason"].startswith("The guard blocks this request (probability ")
        assert flagged() not in answer["blocked_reason"]

    def test_another_passes(self, service):
        answer = ask(service, texts=[passed()], structured_messages=[user(passed())]).json()
        assert answer == {"action": "NONE", "blocked_reason": None}

    @pytest.mark.parametrize(
        "fields",
        [
            dict(texts=[flagged()]),
            dict(texts=[], structured_messages=[user(flagged()), user(passed())]),
            dict(texts=[passed(), flagged()], structured_messages=[user(passed())]),
            dict(
                texts=[passed()],
                tools=[{"type": "function", "function": {"description": flagged()}}],
            ),
        ],
        ids=["texts alone", "an earlier message", "a text beside the messages", "a tool"],
    )
    def test_every_text_of_a_request_is_read(self, service, fields):
        assert ask(service, **fields).json()["action"] == "BLOCKED"

    def test_texts_of_replies_pass_unread(self, service):
        assert ask(service, input_type="response", texts=[flagged()]).json()["action"] == "NONE"

    def test_nothing_to_read_passes(self, service):
        assert ask(service, texts=["  "]).json()["action"] == "NONE"

    def test_an_image_is_an_error(self, service):
        answer = ask(service, texts=[passed()], images=["data:image/png;base64,AA=="])
        assert answer.status_code == 400
        assert "Images cannot be read" in answer.json()["error"]["message"]

    def test_a_shadow_blocks_nothing(self):
        with running(policy="shadow") as url:
            assert ask(url, texts=[flagged()]).json()["action"] == "NONE"

    @pytest.mark.parametrize(
        ("limits", "fields", "code"),
        [
            ({}, dict(images=["data:image/png;base64,AA=="]), "invalid_request"),
            ({}, dict(structured_messages=[user([{"type": "image_url"}])]), "invalid_request"),
            (dict(max_readings=1), dict(texts=[passed(), flagged()]), "invalid_request"),
            (dict(queue=1), dict(texts=[passed(), flagged()]), "too_large"),
            (dict(deadline=1e-6), {}, "unavailable"),
        ],
        ids=["image", "part", "many texts", "full queue", "timeout"],
    )
    def test_a_shadow_blocks_nothing_that_it_cannot_judge(self, limits, fields, code, tmp_path):
        log = tmp_path / "audit.jsonl"
        with running(policy="shadow", audit=log, **limits) as url:
            answer = ask(url, **dict(texts=[passed()]) | fields)
        assert (answer.status_code, answer.json()["action"]) == (200, "NONE")
        (line,) = map(json.loads, log.read_text().splitlines())
        assert (line["action"], line["error"]) == ("unjudged", code)

    @pytest.mark.parametrize("policy", ["block", "annotate"])
    def test_others_go_on_after_a_verdict_only(self, policy):
        with running(policy=policy, deadline=1e-6) as url:
            assert ask(url, texts=[passed()]).status_code == 503


class TestService:
    def test_a_key_is_needed_where_the_service_has_keys(self):
        with running(keys=["secret"]) as url:
            assert ask(url, texts=[passed()]).status_code == 401

    def test_a_decision_is_in_the_audit_log(self, tmp_path):
        with running(audit=tmp_path / "audit.jsonl") as url:
            ask(url, texts=[flagged()])
        (line,) = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
        assert (line["endpoint"], line["action"]) == ("guardrail", "block")
        assert flagged() not in json.dumps(line)
