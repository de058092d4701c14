"""Replies in the service: judged in the pass that writes them, as they are offline."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentguard.errors import GuardError
from latentguard.guard.replies import WINDOW, ReplyProbe
from latentguard.guard.reply_fitting import fit_replies
from latentguard.models.conversation import Conversation, Sampling, TokenProbe
from latentguard.probes.probe import Probe
from latentguard.prompts import Prompt, Reply
from latentguard.serve.reply_reading import ReplyGate
from serve.running import PROMPTS, passed, post, running, stream, tiny_guard, tiny_model

LENGTH = 24
HOW = dict(model="tiny", temperature=0, max_tokens=LENGTH)
WORDS = "river garden window teacher engine letter school winter music paper city doctor".split()


@functools.cache
def judging_guard():
    """A guard that flags no prompt, and that also judges replies."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(60):
        words = list(rng.choice(WORDS, size=8))
        text = (" bad " if n % 2 else " and ").join(words)
        rows.append(Reply(Prompt(f"Question {n // 2}?"), text, harmful=bool(n % 2)))
    guard = replace(tiny_guard(), threshold=1e6)
    return fit_replies(tiny_model(), guard, rows)


@functools.cache
def generated():
    """The model's own replies, with what the guard says of them offline."""
    model = tiny_model()
    replies = model.generate([Prompt(t) for t in PROMPTS[:6]], max_new_tokens=LENGTH)
    return replies, list(judging_guard().scan_replies(model, replies))


def flagging(share=0.5):
    """The same guard with a threshold that the highest-scoring reply passes half way."""
    replies, verdicts = generated()
    best = max(range(len(replies)), key=lambda n: verdicts[n].score)
    prefixes = [replace(replies[best], ids=replies[best].ids[: n + 1]) for n in range(LENGTH)]
    prefixes = [p for p in prefixes if p.ids]
    scores = [v.score for v in judging_guard().scan_replies(tiny_model(), prefixes)]
    at = next(n for n, score in enumerate(scores) if score > share * scores[-1])
    below = scores[at - 1] if at else scores[0] - 1
    judge = replace(judging_guard().replies, threshold=(below + scores[at]) / 2)
    return replace(judging_guard(), replies=judge), replies[best], at + 1


def serve(guard, **options):
    def opener():
        return guard, tiny_model()

    return running(opener, **options)


def ask(url, text, **how):
    body = dict(messages=[{"role": "user", "content": text}]) | HOW | how
    return post(f"{url}/v1/chat/completions", json=body).json()


def events(url, text):
    body = dict(messages=[{"role": "user", "content": text}], stream=True) | HOW
    with stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(chunks):
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)


class TestGate:
    def gate(self, policy="cut", hold=0, threshold=0.5):
        probe = Probe("linear", (1,), torch.zeros(1, 2), 0.0)
        judge = ReplyProbe(probe, (1.0, 0.0), 1.0, {}, threshold=threshold)
        return ReplyGate(judge, policy, hold)

    def scores(self, *running):
        """Token scores that make these running scores, fewer than a window."""
        return np.diff([value * WINDOW for value in running], prepend=0.0).tolist()

    def texts(self, gate, *running):
        shown = []
        for n, score in enumerate(self.scores(*running)):
            shown.append("".join(piece.text for piece in gate.push(f"<{n}>", score)))
        return shown

    def test_a_token_is_shown_once_so_many_after_it_were_read(self):
        gate = self.gate(hold=2)
        assert self.texts(gate, 0, 0, 0, 0) == ["", "", "<0>", "<1>"]
        assert "".join(piece.text for piece in gate.finish("!")) == "<2><3>!"

    def test_cut_shows_neither_the_flagged_token_nor_those_that_are_held_back(self):
        gate = self.gate(hold=1)
        assert self.texts(gate, 0, 0, 0.9) == ["", "<0>", ""]
        assert gate.must_end
        assert gate.finish("!") == []
        verdict = gate.verdict("a")
        assert (verdict.flagged, verdict.flagged_at, verdict.tokens) == (True, 3, 3)

    def test_block_shows_nothing_before_the_end(self):
        gate = self.gate("block")
        assert self.texts(gate, 0, 0.1) == ["", ""]
        assert [piece.text for piece in gate.finish("")] == ["<0>", "<1>"]

    def test_annotate_shows_all_with_the_running_scores(self):
        gate = self.gate("annotate")
        shown = [piece for score in self.scores(0.2, 0.8) for piece in gate.push("x", score)]
        assert [piece.score for piece in shown] == pytest.approx([0.2, 0.8])
        assert gate.is_flagged
        assert not gate.must_end

    def test_a_shadow_holds_nothing_back(self):
        gate = self.gate("shadow", hold=5)
        assert self.texts(gate, 0.9, 0.9) == ["<0>", "<1>"]
        assert gate.verdict("").flagged

    @pytest.mark.parametrize("policy", ["cut", "block", "annotate"])
    def test_an_undefined_score_ends_the_reply_and_has_no_verdict(self, policy):
        gate = self.gate(policy)
        assert gate.push("x", float("nan")) == []
        assert gate.must_end
        with pytest.raises(GuardError, match="not a finite number"):
            gate.verdict()


class TestOwnModel:
    def test_tokens_score_as_they_do_offline(self):
        """The decoding pass reads what a pass over the whole reply reads."""
        model = tiny_model()
        own = judging_guard().replies.probe
        replies, verdicts = generated()
        for reply, verdict in zip(replies, verdicts, strict=True):
            probe = TokenProbe(own.layers, own.weight)
            said = Conversation(model, reply.prompt, positions=(), layers=(1,), probe=probe)
            pieces = list(said.pieces(Sampling(max_tokens=LENGTH, temperature=0)))
            scores = torch.tensor([p.score for p in pieces if p.score is not None])
            streamed = judging_guard().replies.verdict(reply.prompt.id, scores)
            assert "".join(piece.text for piece in pieces) == reply.text
            assert streamed.tokens == verdict.tokens
            assert streamed.score == pytest.approx(verdict.score, abs=1e-5)

    def test_a_reply_is_annotated_with_the_verdict_that_it_has_offline(self):
        replies, verdicts = generated()
        quiet = replace(judging_guard().replies, threshold=1e6)
        with serve(replace(judging_guard(), replies=quiet)) as url:
            answer = ask(url, replies[0].prompt.text)
        assert answer["choices"][0]["message"]["content"] == replies[0].text
        said = answer["latentguard"]["reply"]
        assert said["score"] == pytest.approx(verdicts[0].score, abs=1e-5)
        assert (said["tokens"], said["decision"]) == (verdicts[0].tokens, "allow")

    @pytest.mark.parametrize("hold", [0, 3])
    def test_a_flagged_reply_is_cut_where_the_running_score_passes(self, hold, tmp_path):
        guard, reply, at = flagging()
        with serve(guard, hold_tokens=hold, audit=tmp_path / "a.jsonl") as url:
            answer = ask(url, reply.prompt.text)
            chunks = events(url, reply.prompt.text)
        text = answer["choices"][0]["message"]["content"]
        assert answer["choices"][0]["finish_reason"] == "content_filter"
        assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert text_of(chunks) == text
        shown = tiny_model().tokenizer.decode(reply.ids[: max(0, at - 1 - hold)])
        assert text.rstrip("\ufffd") == shown.rstrip("\ufffd")
        assert answer["latentguard"]["reply"]["flagged_at"] == at
        log = (tmp_path / "a.jsonl").read_text()
        lines = [json.loads(line) for line in log.splitlines()]
        cuts = [line for line in lines if "reply" in line]
        assert [line["action"] for line in cuts] == ["cut", "cut"]
        assert {line["reply"]["flagged_at"] for line in cuts} == {at}
        assert all("text" not in line for line in lines)

    def test_blocked_a_flagged_reply_is_refused_whole(self):
        guard, reply, _ = flagging()
        with serve(guard, reply_policy="block") as url:
            answer = ask(url, reply.prompt.text)
            chunks = events(url, reply.prompt.text)
        assert (
            answer["choices"][0]["message"]["content"] == "I'm sorry, but I can't help with that."
        )
        assert text_of(chunks) == "I'm sorry, but I can't help with that."
        assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"

    def test_annotated_each_chunk_has_its_score(self):
        guard, reply, at = flagging()
        with serve(guard, reply_policy="annotate", hold_tokens=0) as url:
            chunks = events(url, reply.prompt.text)
        assert text_of(chunks) == reply.text
        scores = [c["latentguard"]["reply_score"] for c in chunks[1:-1] if "latentguard" in c]
        assert max(scores) > guard.replies.threshold
        assert chunks[-1]["latentguard"]["reply"]["flagged_at"] == at

    def test_a_shadow_says_nothing_and_logs(self, tmp_path):
        guard, reply, at = flagging()
        with serve(guard, reply_policy="shadow", audit=tmp_path / "a.jsonl") as url:
            answer = ask(url, reply.prompt.text)
        assert answer["choices"][0]["message"]["content"] == reply.text
        assert "reply" not in answer["latentguard"]
        lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert [line["reply"]["flagged_at"] for line in lines if "reply" in line] == [at]

    def test_a_guard_of_prompts_alone_is_silent_on_replies(self, service):
        answer = ask(service, passed())
        assert "reply" not in answer["latentguard"]


def chat_of(reply):
    return [
        {"role": "user", "content": reply.prompt.text},
        {"role": "assistant", "content": reply.text},
    ]


class TestChatsThatEndWithTheAssistant:
    def test_the_reply_is_judged_as_offline(self, tmp_path):
        replies, _ = generated()
        given = Reply(replies[0].prompt, "It is in the old town, near the river.")
        [wanted] = judging_guard().scan_replies(tiny_model(), [given])
        with serve(judging_guard(), audit=tmp_path / "a.jsonl") as url:
            scored = post(f"{url}/v1/score", json={"messages": chat_of(given)}).json()
            moderated = post(f"{url}/v1/moderations", json={"messages": chat_of(given)}).json()
            asked = post(f"{url}/v1/score", json={"messages": chat_of(given)[:1]}).json()
        for said in (
            scored["results"][0]["reply"],
            moderated["results"][0]["latentguard"]["reply"],
        ):
            assert said["score"] == pytest.approx(wanted.score, abs=1e-5)
            assert said["tokens"] == wanted.tokens
            assert said["threshold"] == judging_guard().replies.threshold
        assert asked["results"][0]["reply"] is None
        lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert [line["action"] for line in lines if "reply" in line] == ["score", "score"]
        assert given.text not in (tmp_path / "a.jsonl").read_text()

    @pytest.mark.parametrize("over", [True, False])
    def test_a_moderation_is_flagged_exactly_if_prompt_or_reply_is(self, over):
        given = Reply(Prompt(PROMPTS[0]), "It is in the old town.")
        [wanted] = judging_guard().scan_replies(tiny_model(), [given])
        threshold = wanted.score + (-0.01 if over else 0.01)
        judge = replace(judging_guard().replies, threshold=threshold)
        with serve(replace(judging_guard(), replies=judge)) as url:
            answer = post(f"{url}/v1/moderations", json={"messages": chat_of(given)}).json()
        result = answer["results"][0]
        assert result["flagged"] is over
        assert result["categories"]["illicit"] is over

    def test_either_texts_or_a_chat(self, service):
        for body in ({}, {"input": "a", "messages": chat_of(Reply(Prompt("a"), "b"))}):
            assert post(f"{service}/v1/moderations", json=body).status_code == 400
