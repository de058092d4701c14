"""Batching, queues, crashes: every request gets the right verdict, or an error, and soon."""

import asyncio
import contextlib
import functools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from latentguard.errors import ModelMismatch
from latentguard.models import conversation, shared_model
from latentguard.models.conversation import ReplyPiece
from latentguard.models.segments import Segments
from serve.faulty import Faulty
from serve.running import (
    PROMPTS,
    flagged,
    get,
    offline,
    opener,
    passed,
    post,
    running,
    stream,
    tiny_model,
)


def faulty():
    guard, model = opener()
    return guard, Faulty(model)


def moderate(url, text):
    return post(f"{url}/v1/moderations", json={"input": text}, timeout=30)


async def storm(url, requests, connections):
    """Every request, so many at once; the answers in order."""
    gate = asyncio.Semaphore(connections)
    limits = httpx.Limits(max_connections=connections)
    async with httpx.AsyncClient(limits=limits, timeout=60, verify=False) as client:

        async def ask(texts):
            async with gate:
                return await client.post(f"{url}/v1/moderations", json={"input": texts})

        return await asyncio.gather(*(ask(texts) for texts in requests))


def mixed(count):
    """Requests of one to seven prompts, short and long."""
    return [
        [PROMPTS[(7 * n + k) % len(PROMPTS)] for k in range(1 + n % 7 if n % 5 == 0 else 1)]
        for n in range(count)
    ]


def test_64_connections_lose_nothing_and_each_verdict_is_the_offline_one():
    requests = mixed(160)
    with running(queue=2000) as url:
        answers = asyncio.run(storm(url, requests, 64))
        page = get(f"{url}/metrics").text
    for texts, answer in zip(requests, answers, strict=True):
        assert answer.status_code == 200
        for text, result in zip(texts, answer.json()["results"], strict=True):
            expected = offline()[text]
            assert result["flagged"] == expected.flagged
            assert result["latentguard"]["score"] == pytest.approx(expected.score, abs=1e-4)
    figures = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
    prompts = sum(len(texts) for texts in requests)
    assert float(figures["latentguard_batch_prompts_sum"]) == prompts
    assert float(figures["latentguard_batch_prompts_count"]) < prompts / 3  # it did batch
    assert figures["latentguard_score_count"] == str(float(prompts))


def test_a_bad_prompt_does_no_harm_to_its_batch():
    requests = [[PROMPTS[n]] if n % 3 else ["\u00ad\ud7ff" * 400] for n in range(30)]
    with running() as url:
        answers = asyncio.run(storm(url, requests, 30))
    for texts, answer in zip(requests, answers, strict=True):
        assert answer.status_code == (200 if texts[0] in offline() else 413)


def test_a_full_queue_turns_away_with_retry_after():
    with running(faulty, queue=2) as url:
        slow = [threading.Thread(target=moderate, args=(url, f"SLOW {n}")) for n in range(3)]
        for thread in slow:
            thread.start()
            time.sleep(0.1)
        answers = [moderate(url, passed()) for _ in range(2)]
        for thread in slow:
            thread.join()
        assert moderate(url, passed()).status_code == 200
    turned = [answer for answer in answers if answer.status_code == 429]
    assert turned
    assert turned[0].headers["retry-after"] == "1"
    assert turned[0].json()["error"]["code"] == "queue_full"


def test_a_deadline_cuts_and_the_next_prompt_is_judged():
    with running(faulty, deadline=0.2) as url:
        late = moderate(url, "SLOW")
        assert late.status_code == 503
        time.sleep(0.5)
        assert moderate(url, passed()).status_code == 200
    assert "0.2 seconds" in late.json()["error"]["message"]


def endless(monkeypatch):
    """Chats that go on until they are told to end: the event that ends them, and those begun."""
    from latentguard.serve import guarded_chat as talk

    over, begun = threading.Event(), []

    def pieces(self, sampling):
        begun.append(self)
        while not over.wait(0.01):
            yield ReplyPiece("on ")

    monkeypatch.setattr(talk.Conversation, "pieces", pieces)
    return over, begun


def wait_for(url, line, key=""):
    """Until the service's metrics say so."""
    until = time.monotonic() + 20
    headers = {"authorization": f"Bearer {key or 0}"}
    while line not in get(f"{url}/metrics", headers=headers).text:
        assert time.monotonic() < until, line
        time.sleep(0.02)


def test_chats_that_nobody_waits_for_any_more_fill_no_queue(monkeypatch):
    """Behind one that goes on and on, others are given up: they neither wait nor are begun."""
    over, begun = endless(monkeypatch)
    body = dict(messages=[{"role": "user", "content": passed()}])
    with running(chats=1, queue=2, deadline=1.0) as url:
        ask = functools.partial(post, f"{url}/v1/chat/completions", json=body, timeout=30)
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(ask)
            wait_for(url, "latentguard_chats 1.0")
            late = [pool.submit(ask) for _ in range(2)]
            assert [one.result().status_code for one in late] == [503, 503]
            judged = [moderate(url, passed()).status_code for _ in range(2)]
            waiting = get(f"{url}/metrics").text
            over.set()
            assert first.result().status_code == 200
    assert judged == [200, 200]
    assert "latentguard_queue_prompts 0.0" in waiting
    assert len(begun) == 1


def test_a_verdict_does_not_wait_for_a_place_among_the_chats(monkeypatch):
    """All places are taken by chats that go on and on; a flagged one is refused all the same."""
    over, begun = endless(monkeypatch)
    with running(chats=1, deadline=60) as url, ThreadPoolExecutor() as pool:
        ask = functools.partial(post, f"{url}/v1/chat/completions", timeout=90)
        first = pool.submit(ask, json=dict(messages=[{"role": "user", "content": passed()}]))
        wait_for(url, "latentguard_chats 1.0")
        answer = ask(json=dict(messages=[{"role": "user", "content": flagged()}]))
        assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
        over.set()
        assert first.result().status_code == 200
    assert len(begun) == 1


class Held:
    """Keeps the first prompt that is read in segments waiting until somebody else was answered."""

    def __init__(self, monkeypatch, module):
        self.answered, self.began = threading.Event(), threading.Event()
        inner = module.prefill

        def prefill(model, row, layers, segments, **how):
            if self.began.is_set():
                return inner(model, row, layers, segments, **how)
            self.began.set()

            def patient():
                until = time.monotonic() + 60
                while not self.answered.is_set() and time.monotonic() < until:
                    segments.between()
                    time.sleep(0.01)

            return inner(model, row, layers, Segments(segments.size, patient), **how)

        monkeypatch.setattr(module, "prefill", prefill)


def asked(url, key, text, path="moderations", **body):
    headers = {"authorization": f"Bearer {key}"}
    body = body or {"input": text}
    return post(f"{url}/v1/{path}", json=body, headers=headers, timeout=120).json()


@pytest.mark.parametrize("sentences", [1, 4])
def test_a_prompt_is_read_between_the_segments_of_anothers_long_one(monkeypatch, sentences):
    """The long one waits between two segments until the other client has its verdict."""
    held = Held(monkeypatch, shared_model)
    long, other = " ".join(PROMPTS[:5]), " ".join([flagged()] * sentences)
    with running(keys=["a", "b"], segment_tokens=64) as url, ThreadPoolExecutor() as pool:
        slow = pool.submit(asked, url, "a", long)
        held.began.wait(60)
        quick = asked(url, "b", other)["results"][0]
        held.answered.set()
        found = slow.result()["results"][0]
    guard, model = opener()
    expected = [verdict.score for verdict in guard.scan(model, [long, other])]
    scores = [one["latentguard"]["score"] for one in (found, quick)]
    assert scores == pytest.approx(expected, abs=1e-4)


def test_a_prompt_is_read_between_the_segments_of_anothers_chat(monkeypatch):
    held = Held(monkeypatch, conversation)
    long = dict(messages=[{"role": "user", "content": passed()}], max_tokens=2)
    with running(keys=["a", "b"], segment_tokens=16) as url, ThreadPoolExecutor() as pool:
        slow = pool.submit(asked, url, "a", "", "chat/completions", **long)
        held.began.wait(60)
        quick = asked(url, "b", flagged())["results"][0]
        assert not slow.done()
        held.answered.set()
        answer = slow.result()
    assert quick["flagged"]
    expected = offline()[passed()].score
    assert answer["latentguard"]["score"] == pytest.approx(expected, abs=1e-4)
    assert answer["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("is_chat", [False, True])
def test_what_nobody_waits_for_any_more_is_not_read_to_its_end(monkeypatch, is_chat):
    ends = []
    module = conversation if is_chat else shared_model
    inner = module.prefill

    def prefill(model, row, layers, segments, **how):
        try:
            for _ in range(6000):
                segments.between()
                time.sleep(0.01)
        except Exception as error:
            ends.append(type(error).__name__)
            raise
        return inner(model, row, layers, segments, **how)

    with running(keys=["a"], segment_tokens=16, deadline=0.5) as url:
        monkeypatch.setattr(module, "prefill", prefill)
        chat = dict(messages=[{"role": "user", "content": passed()}], max_tokens=2)
        path = "chat/completions" if is_chat else "moderations"
        assert "error" in asked(url, "a", passed(), path, **(chat if is_chat else {}))
        monkeypatch.setattr(module, "prefill", inner)
        assert asked(url, "a", flagged())["results"][0]["flagged"]
        headers = {"authorization": "Bearer a"}
        assert "latentguard_crashes 0.0" in get(f"{url}/metrics", headers=headers).text
    assert ends == ["Abandoned"]


def test_one_client_who_fills_the_queue_does_not_keep_another_out():
    over, entered = threading.Event(), threading.Event()

    def held():
        guard, model = opener()
        model = Faulty(model)
        inner = model.capture

        def capture(prompts, **how):
            entered.set()
            over.wait(60)
            return inner(prompts, **how)

        model.capture = capture
        return guard, model

    def ask(url, key, texts):
        headers = {"authorization": f"Bearer {key}"}
        body = {"input": texts}
        return post(f"{url}/v1/moderations", json=body, headers=headers, timeout=60).status_code

    with running(held, keys=["a", "b"], queue=20) as url, ThreadPoolExecutor() as pool:
        flood = [pool.submit(ask, url, "a", PROMPTS[:1])]
        entered.wait(30)
        flood += [pool.submit(ask, url, "a", PROMPTS[:5]) for _ in range(4)]
        wait_for(url, "latentguard_queue_prompts 20.0", "b")
        other = pool.submit(ask, url, "b", PROMPTS[:2])
        while not any(one.done() for one in flood):
            time.sleep(0.01)
        over.set()
        assert other.result() == 200
        assert sorted(one.result() for one in flood) == [200] * 4 + [429]


def leave(url, **body):
    """Ask, and be gone before the answer."""
    with contextlib.suppress(httpx.TimeoutException):
        post(url, json=body, timeout=httpx.Timeout(10, read=0.3))


def noted(audit):
    return [json.loads(line).get("error") for line in audit.read_text().splitlines()]


def test_a_chat_whose_client_leaves_waits_no_longer(monkeypatch, tmp_path):
    """Long before the deadline its place is free, and the log says why there is no verdict."""
    over, begun = endless(monkeypatch)
    body, audit = dict(messages=[{"role": "user", "content": passed()}]), tmp_path / "audit.jsonl"
    with running(chats=1, queue=1, deadline=300, audit=audit) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(post, f"{url}/v1/chat/completions", json=body, timeout=60)
        wait_for(url, "latentguard_chats 1.0")
        leave(f"{url}/v1/chat/completions", **body)
        wait_for(url, "latentguard_queue_prompts 0.0")
        over.set()
        assert first.result().status_code == 200
    assert len(begun) == 1
    assert noted(audit) == [None, None, "client_left"]  # its verdict did not wait for a place


@pytest.mark.parametrize("policy", ["block", "shadow"])
def test_prompts_whose_client_leaves_are_not_read(policy, tmp_path):
    """Nor is a shadow's chat sent on, as nobody waits for its answer."""
    audit, seen, over = tmp_path / "audit.jsonl", [], threading.Event()

    def watched():
        guard, model = faulty()
        inner = model.capture

        def capture(prompts, **how):
            seen.extend(prompts := list(prompts))
            if "LAST" in prompts[0].text:
                over.wait(60)
            return inner(prompts, **how)

        model.capture = capture
        return guard, model

    how = dict(policy=policy, upstream="http://127.0.0.1:9/v1", wait=0.0, deadline=300)
    with running(watched, audit=audit, **how) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(moderate, url, "LAST")
        while not (seen and "LAST" in seen[-1].text):
            time.sleep(0.02)
        leave(f"{url}/v1/moderations", input="GONE")
        leave(f"{url}/v1/chat/completions", messages=[{"role": "user", "content": "GONE TOO"}])
        wait_for(url, "latentguard_queue_prompts 0.0")
        over.set()
        assert first.result().status_code == 200
        assert moderate(url, passed()).status_code == 200
    assert not [prompt for prompt in seen if "GONE" in prompt.text]
    assert noted(audit) == ["client_left", "client_left", None, None]


def test_a_crash_fails_its_batch_and_nothing_else():
    with running(faulty) as url:
        broken = moderate(url, "please BREAK")
        assert broken.status_code == 503
        assert "broke" not in broken.text
        again = moderate(url, flagged())
        assert again.json()["results"][0]["flagged"]
        assert get(f"{url}/readyz").status_code == 200


def test_a_thread_that_dies_fails_the_request_and_stops_the_service():
    with running(faulty) as url:
        assert moderate(url, "DIE").status_code == 503
        until = time.monotonic() + 10
        while url.server.failure is None and time.monotonic() < until:
            time.sleep(0.02)
        assert isinstance(url.server.failure, SystemExit)
        assert url.server.should_exit


def test_a_thread_that_hangs_is_noticed():
    with running(faulty, stall=0.3, drain=1.0) as url:
        assert moderate(url, "HANG").status_code == 503
        assert "stuck" in str(url.server.failure)


def test_too_many_crashes_end_it():
    with running(faulty) as url:
        answers = [moderate(url, "BREAK").status_code for _ in range(5)]
        assert answers == [503] * 5
        time.sleep(0.1)
        assert "crashes" in str(url.server.failure)


def test_a_crash_during_a_chat_is_told_in_the_stream(monkeypatch):
    from latentguard.serve import guarded_chat as talk

    def pieces(self, sampling):
        yield ReplyPiece("Well")
        raise RuntimeError("the model broke")

    monkeypatch.setattr(talk.Conversation, "pieces", pieces)
    with running() as url:
        body = dict(messages=[{"role": "user", "content": passed()}], stream=True)
        with stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert moderate(url, passed()).status_code == 200
    assert '"error"' in lines[-1]
    assert "broke" not in lines[-1]


def test_a_guard_of_another_model_is_never_ready():
    def wrong():
        guard, _ = opener()
        from models.architectures import chat_model

        other = chat_model("llama", tiny_model().tokenizer, seed=1)
        guard.verify_model(other)
        return guard, other

    with running(wrong, ready=False) as url:
        deadline = time.monotonic() + 10
        while url.server.failure is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert isinstance(url.server.failure, ModelMismatch)


def test_it_is_alive_but_not_ready_while_it_loads():
    go = threading.Event()

    def slow():
        go.wait(20)
        return opener()

    with running(slow, ready=False) as url:
        assert get(f"{url}/healthz").status_code == 200
        assert get(f"{url}/readyz").status_code == 503
        assert moderate(url, passed()).status_code == 503
        go.set()
        from serve.running import wait_ready

        wait_ready(url)
        assert moderate(url, passed()).status_code == 200
