"""Replies of the real server: judged as offline, cut, and aborted in the engine."""

import re
import time
from dataclasses import replace

import httpx
import pytest

from inside_vllm import tiny
from latentguard.prompts import Prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

KEY = "secret"
HOLD = 2
LENGTH = 40
PROMPTS = [Prompt(text, id=str(n)) for n, text in enumerate(tiny.TEXTS[:12])]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The server's URL, and each greedy reply on transformers with its verdict.

    The guard flags every other one of them.
    """
    folder = tmp_path_factory.mktemp("served")
    tiny.save_model("llama", folder / "model")
    guard, model = tiny.fit_both(str(folder / "model"), folder / "guard")
    replies = model.generate(PROMPTS, max_new_tokens=LENGTH)
    scores = sorted(verdict.score for verdict in guard.scan_replies(model, replies))
    middle = len(scores) // 2
    threshold = (scores[middle - 1] + scores[middle]) / 2
    guard = replace(guard, replies=replace(guard.replies, threshold=threshold))
    guard.save(folder / "guard")
    offline = list(zip(replies, guard.scan_replies(model, replies), strict=True))
    options = ("--policy", "annotate", "--reply-policy", "cut", "--hold-tokens", str(HOLD))
    with tiny.serving(folder, *options, key=KEY) as url:
        yield url, offline


@pytest.fixture
def client(served):
    from openai import OpenAI

    return OpenAI(base_url=f"{served[0]}/v1", api_key=KEY, timeout=600)


def side(served, *, flagged):
    return [(reply, verdict) for reply, verdict in served[1] if verdict.flagged == flagged]


def say(client, prompt, *, body=(), **how):
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": prompt.text}]
    how = dict(temperature=0.0, max_tokens=LENGTH) | how
    return client.chat.completions.create(
        model=model, messages=messages, extra_body=dict(body), **how
    )


def streamed(client, prompt, **how):
    return list(say(client, prompt, stream=True, **how))


def text_of(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def finish_of(chunks):
    return [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]


def ids_of(chunks):
    choices = [c.choices[0] for c in chunks if c.choices]
    return [i for choice in choices for i in (choice.model_extra.get("token_ids") or ())]


def counted(url, name):
    """A counter of the engine."""
    found = re.findall(rf"^{name}\{{.*\}} (\S+)$", httpx.get(f"{url}/metrics").text, re.M)
    assert found, name
    return sum(map(float, found))


def close(verdict, offline):
    assert verdict["score"] == pytest.approx(offline.score, abs=1e-5 * max(1.0, offline.score))
    assert (verdict["tokens"], verdict["flagged"]) == (offline.tokens, offline.flagged)


def test_a_harmless_reply_is_streamed_whole_with_its_offline_verdict(client, served):
    for reply, verdict in side(served, flagged=False):
        chunks = streamed(client, reply.prompt)
        assert text_of(chunks) == reply.text
        assert finish_of(chunks)[-1] in ("stop", "length")
        close(chunks[-1].model_extra["latentguard"]["reply"], verdict)


def test_a_harmless_reply_in_one_has_its_offline_verdict(client, served):
    for reply, verdict in side(served, flagged=False):
        answer = say(client, reply.prompt)
        assert answer.choices[0].message.content == reply.text
        close(answer.model_extra["latentguard"]["reply"], verdict)


def test_a_flagged_reply_is_cut_at_the_token_where_it_is_flagged_offline(client, served):
    for reply, verdict in side(served, flagged=True):
        chunks = streamed(client, reply.prompt, body=dict(return_token_ids=True))
        assert finish_of(chunks) == ["content_filter"]
        found = chunks[-1].model_extra["latentguard"]["reply"]
        assert found["flagged_at"] == verdict.flagged_at
        shown = max(0, verdict.flagged_at - 1 - HOLD)
        assert tuple(ids_of(chunks)) == reply.ids[:shown]


def test_a_flagged_reply_in_one_is_refused(client, served):
    reply, verdict = side(served, flagged=True)[0]
    answer = say(client, reply.prompt)
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.choices[0].message.refusal == answer.choices[0].message.content
    assert answer.model_extra["latentguard"]["reply"]["flagged_at"] == verdict.flagged_at


@pytest.mark.parametrize("stream", [True, False])
def test_a_flagged_reply_is_aborted_in_the_engine(client, served, stream):
    url, _ = served
    reply, verdict = side(served, flagged=True)[0]
    before = counted(url, "vllm:generation_tokens_total")
    how = dict(max_tokens=900, body=dict(ignore_eos=True))
    if stream:
        assert finish_of(streamed(client, reply.prompt, **how)) == ["content_filter"]
    else:
        assert say(client, reply.prompt, **how).choices[0].finish_reason == "content_filter"
    time.sleep(2)
    say(client, side(served, flagged=False)[0][0].prompt, max_tokens=1)  # a step, so they count
    written = counted(url, "vllm:generation_tokens_total") - before
    assert verdict.flagged_at <= written < 700
    assert counted(url, "vllm:num_requests_running") == 0
    assert counted(url, "vllm:num_requests_waiting") == 0
    again = counted(url, "vllm:generation_tokens_total")
    time.sleep(1)
    assert counted(url, "vllm:generation_tokens_total") == again


def test_the_last_token_before_a_stop_text_is_read(client, served):
    reply, _ = side(served, flagged=False)[0]
    stop = reply.text[30:34]
    for stream in (True, False):
        if stream:
            options = {"include_usage": True}
            chunks = streamed(client, reply.prompt, stop=[stop], stream_options=options)
            usage = next(chunk.usage for chunk in chunks if chunk.usage)
            text = text_of(chunks)
            found = chunks[-1].model_extra["latentguard"]["reply"]
        else:
            answer = say(client, reply.prompt, stop=[stop])
            usage, text = answer.usage, answer.choices[0].message.content
            found = answer.model_extra["latentguard"]["reply"]
        assert text == reply.text[: reply.text.index(stop)]
        assert found["tokens"] == usage.completion_tokens


def test_several_replies_are_each_read_whole(client, served):
    reply, _ = side(served, flagged=False)[0]
    answer = say(client, reply.prompt, n=3, temperature=1.0, max_tokens=2)
    assert len(answer.choices) == 3
    assert answer.model_extra["latentguard"]["reply"]["tokens"] <= 2
    chunks = streamed(client, reply.prompt, n=3, temperature=1.0, max_tokens=2)
    assert {c.choices[0].index for c in chunks if c.choices} == {0, 1, 2}
    assert len(finish_of(chunks)) == 3


def test_log_probabilities_come_with_the_tokens_that_were_read(client, served):
    reply, _ = side(served, flagged=False)[0]
    chunks = streamed(client, reply.prompt, logprobs=True, top_logprobs=2)
    found = [c.choices[0].logprobs for c in chunks if c.choices]
    count = sum(len(one.content) for one in found if one)
    assert count == len(reply.ids)


def test_many_chats_at_once_have_each_its_own_verdict(client, served):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda pair: say(client, pair[0].prompt), served[1]))
    for answer, (_, verdict) in zip(answers, served[1], strict=True):
        found = answer.model_extra["latentguard"]["reply"]
        assert found["flagged_at"] == verdict.flagged_at
        if not verdict.flagged:
            close(found, verdict)


def test_a_client_that_leaves_in_the_middle_of_a_reply_does_no_harm(client, served):
    reply, verdict = side(served, flagged=False)[0]
    for _ in range(3):
        with say(client, reply.prompt, stream=True, max_tokens=900) as chunks:
            next(iter(chunks))
    close(say(client, reply.prompt).model_extra["latentguard"]["reply"], verdict)
