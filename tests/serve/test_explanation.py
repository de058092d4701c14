"""What ``/v1/score`` says a verdict is made of: it adds up, and is of the right text."""

import base64

import pytest

from serve.running import flagged, offline, opener, passed, post, running

READINGS = ("span", "pooled", "attended", "t_inst", "t_post", "sealed")


def explain(url, **given):
    """The first result, with its explanation."""
    answer = post(f"{url}/v1/score", json=given | {"explain": True})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"][0]


def require_sum(result):
    """Tokens and layers each add up to the score of the verdict."""
    parts = result["explanation"]
    for own in ([token["contribution"] for token in parts["tokens"]], parts["layers"]):
        assert parts["baseline"] + sum(own) == pytest.approx(parts["score"], abs=1e-5)
    assert parts["score"] == pytest.approx(result["score"], abs=1e-5)


def text_of(result):
    """What was read."""
    tokens = result["explanation"]["tokens"]
    return "".join(token["text"] for token in tokens if token["belief"] is not None)


@pytest.mark.parametrize("reading", READINGS)
def test_contributions_add_up_to_the_score(reading):
    with running(lambda: opener(reading)) as url:
        for text in (flagged(), passed(), "Grüße aus Köln 🙂"):
            require_sum(explain(url, input=text))


def test_the_papers_rule_adds_up_too():
    with running(lambda: opener("t_inst", "centroid")) as url:
        result = explain(url, input=flagged())
        require_sum(result)
        assert len(result["explanation"]["layers"]) == 4


def test_tokens_are_the_text_and_its_template(service):
    result = explain(service, input=flagged())
    assert text_of(result) == flagged()
    tokens = result["explanation"]["tokens"]
    template = [token["text"] for token in tokens if token["belief"] is None]
    assert "assistant" in "".join(template)
    last = [token["belief"] for token in tokens if token["belief"] is not None][-1]
    assert last == pytest.approx(offline()[flagged()].beliefs["harmful"], abs=1e-4)


def test_the_text_that_decided_is_explained(service):
    hidden = base64.b64encode(flagged().encode()).decode()
    result = explain(service, input=hidden)
    if result["obfuscations"]:
        assert text_of(result) == flagged()
    else:
        assert text_of(result) == hidden
    require_sum(result)


def test_of_a_chat_the_message_that_decided(service):
    messages = [
        {"role": "user", "content": flagged()},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": passed()},
    ]
    result = explain(service, messages=messages)
    require_sum(result)
    assert text_of(result) == flagged()


def test_one_prompt_at_a_time(service):
    answer = post(f"{service}/v1/score", json={"input": ["a", "b"], "explain": True})
    assert answer.status_code == 400
    assert "one prompt at a time" in answer.json()["error"]["message"]
