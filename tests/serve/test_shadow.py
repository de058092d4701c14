"""A shadow guard judges what the guard judges: counted, logged, and without any effect."""

import json
import time
from dataclasses import replace

import pytest
import torch

from latentguard.guard.cascade import Cascade
from latentguard.guard.thresholds import Thresholds
from latentguard.serve.gateway_guardrail import PATH as GUARDRAIL
from latentguard.serve.server import GuardSource
from latentguard.serve.shadow import RECENT, Comparison, outcome_of
from serve.running import (
    PROMPTS,
    band_guard,
    flagged,
    get,
    offline,
    passed,
    post,
    reviewed,
    running,
    tiny_guard,
    tiny_model,
)
from serve.shadow_guards import (
    CountingModel,
    agreeing,
    audited,
    broken,
    compared,
    contrary,
    elsewhere,
    unchecked,
    weighted,
)
from serve.test_guards import NAMED, with_threshold
from serve.test_second_opinion import Says
from serve.test_upstream import answers, chat, upstream


def outcomes(url):
    """The outcomes that were counted, by endpoint."""
    return {(one["endpoint"], one["outcome"]): one["count"] for one in compared(url)["counts"]}


@pytest.fixture(scope="module")
def plain():
    with running() as url:
        yield url


def without_id(answer):
    body = answer.json()
    return {name: value for name, value in body.items() if name not in ("id", "created")}


@pytest.mark.parametrize("shadow", [contrary(), elsewhere(), broken()], ids=["1", "2", "broken"])
def test_answers_are_those_without_a_shadow(start, plain, shadow):
    url = start(shadow, guards=unchecked(shadow))
    for body in ({"input": PROMPTS[:8]}, {"messages": chat(flagged())["messages"]}):
        for path in ("/v1/moderations", "/v1/score"):
            alone, beside = (post(f"{one}{path}", json=body) for one in (plain, url))
            assert without_id(alone) == without_id(beside)
    for text in (flagged(), passed()):
        body = chat(text, max_tokens=3, temperature=0)
        alone, beside = (post(f"{one}/v1/chat/completions", json=body) for one in (plain, url))
        assert without_id(alone) == without_id(beside)
    assert sum(compared(url)["totals"].values()) == 2 * (8 + 1) + 2


class TestCounts:
    def test_of_a_guard_that_always_disagrees(self, start):
        url = start(contrary())
        post(f"{url}/v1/moderations", json={"input": PROMPTS})
        many = sum(verdict.flagged for verdict in offline().values())
        assert outcomes(url) == {
            ("moderations", "only_guard_blocks"): many,
            ("moderations", "only_shadow_blocks"): len(PROMPTS) - many,
        }

    def test_of_one_that_always_agrees(self, start):
        url = start(agreeing())
        post(f"{url}/v1/moderations", json={"input": PROMPTS})
        many = sum(verdict.flagged for verdict in offline().values())
        assert outcomes(url) == {
            ("moderations", "both_block"): many,
            ("moderations", "both_allow"): len(PROMPTS) - many,
        }
        assert compared(url)["recent"] == []

    def test_of_one_that_reviews(self, start):
        url = start(band_guard(), lambda: (with_threshold("lax"), tiny_model()))
        post(f"{url}/v1/score", json={"input": PROMPTS})
        decisions = [v.decision for v in band_guard().scan(tiny_model(), PROMPTS)]
        totals = compared(url)["totals"]
        assert totals["only_shadow_reviews"] == decisions.count("review") > 0
        assert totals["only_shadow_blocks"] == decisions.count("block") > 0
        assert totals["both_allow"] == decisions.count("allow") > 0

    def test_each_endpoint_that_judges_prompts(self, start):
        with upstream(answers) as (_, where):
            url = start(contrary(), upstream=where)
            post(f"{url}/v1/chat/completions", json=chat(flagged()))
            post(f"{url}/v1/responses", json={"input": flagged(), "model": "any"})
            body = dict(input_type="request", texts=[flagged()])
            post(f"{url}{GUARDRAIL}", json=body)
            post(f"{url}/ext_authz/v1/chat/completions", json=chat(flagged()))
            post(f"{url}/v1/score", json={"input": flagged()})
        one = "only_guard_blocks"
        names = ("chat", "responses", "guardrail", "ext_authz", "score")
        assert outcomes(url) == {(name, one): 1 for name in names}

    def test_the_metrics_and_the_page_have_them(self, start):
        url = start(contrary())
        post(f"{url}/v1/moderations", json={"input": [flagged(), flagged(), passed()]})
        labels = (
            f'{{decided_by="{tiny_guard().digest[:12]}",endpoint="moderations",'
            'outcome="only_guard_blocks",segment=""}'
        )
        metrics = get(f"{url}/metrics").text
        assert f"latentguard_shadow_verdicts_total{labels} 2.0" in metrics
        assert "latentguard_promoted 0.0" in metrics
        shown = get(f"{url}/v1/guard").json()["shadow"]
        assert shown["guard"] == contrary().digest[:12]
        assert shown["totals"]["only_shadow_blocks"] == 1

    def test_without_a_shadow_there_is_nothing_of_it(self, plain):
        post(f"{plain}/v1/moderations", json={"input": flagged()})
        assert "shadow" not in get(f"{plain}/v1/guard").json()
        assert "latentguard_shadow_verdicts_total{" not in get(f"{plain}/metrics").text

    def test_by_segment_where_a_guard_has_it(self, start):
        guard = band_guard()
        part = replace(guard.thresholds, segments={"app": guard.thresholds.common})
        assert isinstance(part, Thresholds)
        guard = replace(guard, thresholds=part)
        url = start(contrary(), lambda: (guard, tiny_model()), segment_header="x-segment")
        for segment in ("app", "made up", ""):
            headers = {"x-segment": segment}
            post(f"{url}/v1/score", json={"input": flagged()}, headers=headers)
        counts = {one["segment"]: one["count"] for one in compared(url)["counts"]}
        assert counts == {"app": 1, None: 2}

    def test_guards_by_name_have_no_shadow(self, start):
        url = start(contrary(), guards=replace(NAMED, shadow=contrary()))
        post(f"{url}/v1/score", json={"input": flagged(), "model": "strict"})
        assert compared(url)["counts"] == []
        assert "shadow" not in audited(url)[-1]


class TestAuditLog:
    def test_it_names_the_guard_that_decided_and_what_the_shadow_says(self, start):
        url = start(contrary())
        post(f"{url}/v1/moderations", json={"input": flagged()})
        (line,) = audited(url)
        assert (line["guard"], line["folder"]) == (tiny_guard().digest[:12], "mine")
        shadow = line["shadow"]
        assert (shadow["guard"], shadow["folder"]) == (contrary().digest[:12], "new")
        assert (line["decision"], shadow["decision"]) == ("block", "allow")
        assert shadow["score"] == pytest.approx(-line["score"], abs=1e-4)
        assert shadow["threshold"] == contrary().threshold

    def test_requests_that_differ_are_kept_by_id_and_few(self, start):
        url = start(contrary())
        answer = post(f"{url}/v1/moderations", json={"input": flagged()})
        (line,) = compared(url)["recent"]
        assert line["request"] == answer.headers["x-request-id"] == audited(url)[0]["request"]
        assert flagged() not in json.dumps(compared(url))
        comparison = Comparison()
        for number in range(3 * RECENT):
            comparison.add("score", "", "only_guard_blocks", f"req-{number}")
        assert len(comparison.recent) == RECENT
        assert comparison.recent[-1]["request"] == f"req-{3 * RECENT - 1}"


class TestPasses:
    def read(self, start, shadow):
        """Prompts that the model read for some requests, and passes."""
        model = CountingModel(tiny_model())
        url = start(shadow, lambda: (tiny_guard(), model))
        model.read = model.passes = 0
        post(f"{url}/v1/score", json={"input": PROMPTS[:6]})
        body = [dict(role="user", content=text) for text in PROMPTS[6:8]]
        post(f"{url}/v1/score", json={"messages": body})
        return model.read, model.passes

    def test_both_are_scored_from_one(self, start):
        alone = self.read(start, None)
        assert self.read(start, contrary()) == alone

    def test_a_guard_that_reads_elsewhere_is_read_on_its_own_and_the_log_says_so(
        self, start, caplog
    ):
        alone = self.read(start, None)
        assert "read twice" not in caplog.text
        assert self.read(start, elsewhere()) == tuple(2 * number for number in alone)
        assert "each prompt is read twice" in caplog.text
        assert "The shadow guard failed" not in caplog.text

    def test_its_verdicts_are_those_of_a_scan(self, start):
        for shadow in (contrary(), elsewhere()):
            url = start(shadow)
            post(f"{url}/v1/score", json={"input": PROMPTS[:12]})
            lines = audited(url)[-12:]
            for line, own in zip(lines, shadow.scan(tiny_model(), PROMPTS[:12]), strict=True):
                assert line["shadow"]["score"] == pytest.approx(own.score, abs=1e-3)
                assert line["shadow"]["decision"] == own.decision

    def test_the_shadow_of_an_own_chat_is_read_with_its_reply(self, start):
        for shadow in (contrary(), elsewhere()):
            url = start(shadow)
            body = chat(passed(), max_tokens=2)
            assert post(f"{url}/v1/chat/completions", json=body).status_code == 200
            (own,) = shadow.scan(tiny_model(), [passed()])
            assert audited(url)[-1]["shadow"]["score"] == pytest.approx(own.score, abs=1e-3)

    def test_texts_that_are_kept_keep_their_shadow(self, start):
        url = start(contrary())
        body = chat(flagged())
        for _ in range(3):
            post(f"{url}/v1/score", json=body | {"model": "default"})
        assert outcomes(url) == {("score", "only_guard_blocks"): 3}


class TestFaults:
    def test_a_shadow_that_raises_is_counted_and_blocks_nothing(self, start, caplog):
        url = start(None, guards=unchecked(broken()))
        for text in (flagged(), passed()):
            answer = post(f"{url}/v1/score", json={"input": text})
            assert answer.json()["results"][0]["flagged"] is (text == flagged())
        assert outcomes(url) == {("score", "failed"): 2}
        assert audited(url)[-1]["shadow"]["decision"] == "failed"
        assert "The shadow guard failed: Exception" in caplog.text
        assert flagged() not in caplog.text
        assert url.server.service.engine.crashes == type(url.server.service.engine.crashes)()

    @pytest.mark.parametrize("part", ["weight", "threshold"])
    def test_one_that_is_not_finite_while_it_judges(self, start, part):
        guard = contrary()
        nan = dict(
            weight=replace(
                guard, probe=replace(guard.probe, weight=guard.probe.weight * torch.nan)
            ),
            threshold=replace(guard, threshold=torch.nan),
        )[part]
        url = start(None, guards=unchecked(nan))
        answer = post(f"{url}/v1/score", json={"input": passed()})
        assert answer.json()["results"][0]["flagged"] is False

    def test_not_finite_weights_are_refused_before_anything_is_served(self):
        guard = contrary()
        guard = replace(guard, probe=replace(guard.probe, weight=guard.probe.weight * torch.nan))
        self.refused(guard, "The shadow guard cannot be used: A score or a belief is not a finite")

    def test_a_guard_of_another_model_is_refused_before_anything_is_served(self):
        guard = contrary()
        guard = replace(guard, fingerprint=replace(guard.fingerprint, weights="0" * 64))
        self.refused(guard, "The shadow guard cannot be used: This guard was fitted on")

    def refused(self, guard, reason):
        with running(guards=GuardSource(shadow=guard), ready=False) as url:
            deadline = time.monotonic() + 30
            while url.server.failure is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert reason in str(url.server.failure)


class TestChats:
    def test_a_chat_that_is_blocked_early_is_unread_by_the_shadow(self, start):
        """The own model's chat is not read on once a text of it is blocked."""
        url = start(with_threshold("lax"), lambda: (with_threshold("strict"), tiny_model()))
        body = chat("Hello.")
        body["messages"] = [dict(role="system", content=passed()), *body["messages"]]
        answer = post(f"{url}/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["finish_reason"] == "content_filter"
        assert outcomes(url) == {("chat", "unread"): 1}

    def test_its_own_thresholds_decide_for_the_shadow(self, start):
        url = start(with_threshold("strict"), lambda: (with_threshold("lax"), tiny_model()))
        turns = [dict(role="user", content=text) for text in (passed(), flagged())]
        post(f"{url}/v1/score", json={"messages": turns})
        assert outcomes(url) == {("score", "only_shadow_blocks"): 1}


class TestSecondOpinion:
    def asking(self, start, opinion, shadow):
        second = Says(opinion)
        source = GuardSource(
            shadow=shadow,
            bind=lambda guard, model: Cascade.of(guard, second).guard,
            second_opinion=second,
        )
        guard = Cascade.of(band_guard(), second).guard
        return start(None, lambda: (guard, tiny_model()), guards=source), second

    @pytest.mark.parametrize(
        ("opinion", "outcome"),
        [("block", "both_block"), ("allow", "both_allow"), ("failed", "both_review")],
    )
    def test_is_of_both_if_both_review(self, start, opinion, outcome):
        shadow = replace(band_guard(), spread=band_guard().spread * 1.01)
        url, second = self.asking(start, opinion, shadow)
        post(f"{url}/v1/score", json={"input": reviewed()})
        post(f"{url}/v1/score", json=chat(reviewed()) | {"model": "default"})
        assert outcomes(url) == {("score", outcome): 2}
        assert second.asked == [reviewed()] * 2  # once a request, not for each guard

    def test_is_not_asked_for_a_shadow_alone(self, start):
        guard = band_guard()
        common = guard.thresholds.common
        low = replace(common.review, threshold=common.review.threshold - 1e3)
        thresholds = replace(guard.thresholds, common=replace(common, review=low))
        url, second = self.asking(start, "block", replace(guard, thresholds=thresholds))
        post(f"{url}/v1/score", json={"input": passed()})
        assert outcomes(url) == {("score", "only_shadow_reviews"): 1}
        assert second.asked == []


@pytest.mark.parametrize(
    ("decision", "shadow", "outcome"),
    [
        ("allow", "allow", "both_allow"),
        ("review", "review", "both_review"),
        ("block", "block", "both_block"),
        ("block", "allow", "only_guard_blocks"),
        ("block", "review", "only_guard_blocks"),
        ("allow", "block", "only_shadow_blocks"),
        ("review", "block", "only_shadow_blocks"),
        ("review", "allow", "only_guard_reviews"),
        ("allow", "review", "only_shadow_reviews"),
        ("block", "failed", "failed"),
        ("allow", "unread", "unread"),
    ],
)
def test_outcomes(decision, shadow, outcome):
    assert outcome_of(decision, shadow) == outcome


def test_weights_of_any_size_agree():
    """The planted guards are what they say."""
    for factor, same in ((2.0, True), (-1.0, False)):
        verdicts = list(weighted(factor).scan(tiny_model(), PROMPTS))
        assert all(
            (own.flagged == other.flagged) is same
            for own, other in zip(offline().values(), verdicts, strict=True)
        )
