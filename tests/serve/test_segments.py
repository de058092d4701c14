"""A guard calibrated by segments: the header that names one, and who may not use it."""

import json
from dataclasses import replace

import pytest

from serve.running import PROMPTS, band_guard, flagged, passed, post, running, tiny_model

HEADER = "X-Traffic"
ENDPOINTS = ("moderations", "score", "chat/completions")


def strict_guard():
    """A guard whose segment ``strict`` flags whatever it reads."""
    guard = band_guard()
    part = guard.thresholds
    low = min(v.score for v in guard.scan(tiny_model(), PROMPTS)) - 1
    block = replace(part.common.block, threshold=low)
    segments = {"strict": replace(part.common, block=block, review=None)}
    return replace(guard, thresholds=replace(part, segments=segments))


def opener():
    return strict_guard(), tiny_model()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with running(
        opener, segment_header=HEADER, audit=tmp_path_factory.mktemp("audit") / "log"
    ) as made:
        yield made


def asked(url, endpoint, text, **headers):
    """What the endpoint says of a text: whether it is flagged, and the threshold."""
    body = {"input": text}
    if endpoint == "chat/completions":
        body = dict(messages=[dict(role="user", content=text)], max_tokens=2)
    answer = post(f"{url}/v1/{endpoint}", json=body, headers=headers).json()
    if endpoint == "chat/completions":
        return answer["latentguard"]["flagged"], answer["latentguard"]["threshold"]
    (result,) = answer["results"]
    return result["flagged"], result.get("latentguard", result)["threshold"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_segment_has_its_own_threshold(url, endpoint):
    guard = strict_guard()
    strict = guard.thresholds.segments["strict"].block.threshold
    assert asked(url, endpoint, passed(), **{HEADER: "strict"}) == (True, strict)
    assert asked(url, endpoint, passed()) == (False, guard.threshold)


@pytest.mark.parametrize("value", ["", "lenient", "strict, strict"])
def test_another_value_is_judged_by_the_common_threshold(url, value):
    guard = strict_guard()
    assert asked(url, "score", passed(), **{HEADER: value}) == (False, guard.threshold)
    assert asked(url, "score", flagged(), **{HEADER: value}) == (True, guard.threshold)


def test_a_category_is_over_a_half_exactly_if_the_segment_flags(url):
    for headers in ({}, {HEADER: "strict"}):
        answer = post(f"{url}/v1/moderations", json={"input": PROMPTS}, headers=headers).json()
        for result in answer["results"]:
            assert (max(result["category_scores"].values()) > 0.5) is result["flagged"]


def test_the_log_says_which_segment(tmp_path):
    with running(opener, segment_header=HEADER, audit=tmp_path / "log") as url:
        asked(url, "score", passed(), **{HEADER: "strict"})
        asked(url, "score", passed())
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["segment"] for line in lines] == ["strict", None]
    assert [line["flagged"] for line in lines] == [True, False]


def test_without_the_option_a_client_cannot_pick_a_segment(tmp_path):
    with running(opener, audit=tmp_path / "log") as url:
        assert asked(url, "score", passed(), segment="strict", **{HEADER: "strict"})[0] is False
    assert "segment" not in json.loads((tmp_path / "log").read_text())
