"""Long prompts and chats in the service: by windows, as offline, and each turn on its own."""

from dataclasses import replace

import pytest

from latentguard.guard.chunking import Chunking
from latentguard.prompts import Message, Prompt
from latentguard.serve.scoring import score_prompts
from latentguard.serve.served_guards import ServedGuard
from serve.running import PROMPTS, post, running, tiny_guard, tiny_model

TURNS = [PROMPTS[0], "Sure.", PROMPTS[1], "Well.", PROMPTS[2]]
ROLES = ["user", "assistant", "user", "assistant", "user"]


def opener():
    chunking = Chunking(threshold=1.0, max_chars=60, longer_than=200)
    return replace(tiny_guard(), chunking=chunking), tiny_model()


def chat():
    history = tuple(Message(r, t) for r, t in zip(ROLES[:-1], TURNS[:-1], strict=True))
    return Prompt(TURNS[-1], id="chat", history=history)


@pytest.fixture(scope="module")
def url():
    with running(opener) as url:
        yield url


def test_verdicts_are_those_of_scan_in_order():
    guard, model = opener()
    mixed = [Prompt(PROMPTS[3]), chat(), Prompt(" ".join(PROMPTS[:8])), Prompt(PROMPTS[4])]
    found = [judgement.verdict for judgement in score_prompts(ServedGuard(guard), model, mixed)]
    offline = list(guard.scan(model, mixed))
    assert [len(v.evidence) for v in found] == [0, 3, 1, 0]
    for one, other in zip(found, offline, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.flagged == other.flagged


def test_a_chat_is_read_by_turn_and_each_message_by_itself(url):
    messages = [dict(role=r, content=t) for r, t in zip(ROLES, TURNS, strict=True)]
    answer = post(f"{url}/v1/score", json={"messages": messages}, timeout=60).json()["results"][0]
    assert answer["readings"] == 6
    guard, model = opener()
    verdicts = list(guard.scan(model, [chat(), *map(Prompt, TURNS)]))
    margins = [v.score - guard.threshold for v in verdicts]
    assert answer["score"] - guard.threshold == pytest.approx(max(margins), abs=1e-4)


def test_guarded_chat_heeds_every_turn(url):
    guard, model = opener()
    verdicts = guard.scan(model, [chat(), *map(Prompt, TURNS)])
    messages = [dict(role=r, content=t) for r, t in zip(ROLES, TURNS, strict=True)]
    body = {"model": "m", "messages": messages, "max_tokens": 2}
    answer = post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert (answer["choices"][0]["finish_reason"] == "content_filter") == any(
        verdict.flagged for verdict in verdicts
    )


def test_chunks_of_earlier_turns_are_not_read_again(monkeypatch):
    """Of a chat that grows by a turn, the guard reads the new message's chunks and the whole."""
    guard, model = opener()
    texts = []
    inner = model.capture

    def capture(prompts, **how):
        prompts = list(prompts)
        texts.extend(prompt.text for prompt in prompts)
        return inner(prompts, **how)

    monkeypatch.setattr(model, "capture", capture)
    how = dict(policy="annotate", upstream="http://127.0.0.1:9/v1")
    with running(lambda: (guard, model), **how) as url:
        for turns in (3, 5):
            texts.clear()
            messages = [
                dict(role=role, content=text)
                for role, text in zip(ROLES[:turns], TURNS[:turns], strict=True)
            ]
            post(f"{url}/v1/score", json={"messages": messages}, timeout=60)
    assert TURNS[4] in texts
    chunks = [one.text for one in guard.chunking.chunks(chat()) if one.message == 0]
    assert chunks
    assert not set(chunks) & set(texts)
