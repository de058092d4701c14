"""Disguised prompts in the service: judged as offline, on every endpoint, and said so."""

import json

import pytest

from latentguard.prompts import Prompt
from latentguard.serve.scoring import score_prompts
from latentguard.serve.served_guards import ServedGuard
from serve.running import PROMPTS, flagged, passed, post, running, tiny_guard, tiny_model


def hidden(text):
    """Struck through: the tokens are other ones, and a reader reads the same."""
    return "".join(f"{letter}\u0336" for letter in text)


def most_hidden():
    """A hidden prompt whose text beneath scores higher than it does as it stands."""
    guard, model = tiny_guard(), tiny_model()
    asked = [Prompt(hidden(text)) for text in sorted(PROMPTS, key=len)[:20]]
    return next(
        p.text for p, v in zip(asked, guard.scan(model, asked), strict=True) if v.obfuscations
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    log = tmp_path_factory.mktemp("audit") / "log"
    with running(lambda: (tiny_guard(), tiny_model()), audit=log) as url:
        yield url, log


def test_verdicts_are_those_of_scan_in_order():
    guard, model = tiny_guard(), tiny_model()
    mixed = [Prompt(passed()), Prompt(hidden(flagged())), Prompt(hidden(passed()))]
    found = [judgement.verdict for judgement in score_prompts(ServedGuard(guard), model, mixed)]
    for one, other in zip(found, guard.scan(model, mixed), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.obfuscations == other.obfuscations


def test_each_endpoint_names_what_was_undone(served):
    url, log = served
    text = most_hidden()
    (score,) = post(f"{url}/v1/score", json={"input": text}).json()["results"]
    (moderation,) = post(f"{url}/v1/moderations", json={"input": text}).json()["results"]
    body = dict(messages=[dict(role="user", content=text)], max_tokens=2)
    chat = post(f"{url}/v1/chat/completions", json=body).json()
    for found in (score, moderation["latentguard"], chat["latentguard"]):
        assert found["obfuscations"] == ["unseen characters"]
        assert found["score"] == pytest.approx(score["score"], abs=1e-4)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["obfuscations"] for line in lines] == [["unseen characters"]] * 3
